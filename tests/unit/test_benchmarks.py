"""The benchmarks: what they count, when they call a method broken, and that `--quick` runs to its end."""

import argparse
import importlib.util
import json
import math
import sys
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
import yaml
from live import run_script
from tiny import recipe_values
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))

import counting  # noqa: E402
import models  # noqa: E402
import rounds  # noqa: E402
import scale  # noqa: E402
import step  # noqa: E402

MIB = 2**20
# By its path: `gpu` is a package of tests, too.
spec = importlib.util.spec_from_file_location("make_gpu", BENCHMARKS / "gpu.py")
gpu = sys.modules["make_gpu"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)


@pytest.fixture
def run(tmp_path):
    """run(script, arguments): what a benchmark prints that runs to its end."""

    def done(script: str, *arguments: str) -> str:
        own = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        code, said = run_script(f"benchmarks/{script}", ["--quick", *arguments], tmp_path, **own)
        assert code == 0, said
        return said

    return done


def test_peak_is_all_that_lives_at_once():
    device, held = torch.device("cpu"), torch.zeros(MIB)  # 4 MiB that were there before

    def work():
        one = held + 1  # 4 MiB
        one = one.sum()
        two = torch.cat([held, held]).relu()  # 8 MiB, and 8
        return one + two.sum()

    before = counting.peak_bytes(lambda: None, device)
    assert before >= 4 * MIB
    assert counting.peak_bytes(work, device) - before == pytest.approx(16 * MIB, abs=1000)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_peak_counts_sparse_tensors():
    before = counting.peak_bytes(lambda: None, torch.device("cpu"))
    index, values = torch.arange(MIB).repeat(2, 1), torch.ones(MIB)

    def work():
        torch.sparse_coo_tensor(index, values, (MIB, MIB)) * 2.0

    peak = counting.peak_bytes(work, torch.device("cpu"))
    assert peak - before >= (16 + 4 + 4) * MIB  # indices and values of before, and the new values


@pytest.mark.parametrize("trains", [True, False])
def test_saved_is_what_only_the_backward_needs(trains):
    first, second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
    model = nn.Sequential(first, second).requires_grad_(trains)
    x = torch.zeros(100, 64, requires_grad=True)

    saved, loss = counting.saved_bytes(model, lambda: model(x).sum())
    loss.backward()
    inputs = 2 * 100 * 64 * 4  # of both linears; the weights are the model's
    assert saved == (inputs if trains else 0)
    assert (first.weight.grad is not None) == trains


@pytest.mark.filterwarnings("ignore:.*torch.distributed.*deprecated:FutureWarning")
def test_traffic_of_a_ring():
    """A group of two ranks of which there is one: what it would send."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with counting.Traffic(2) as sent:
            dist.reduce_scatter_tensor(torch.zeros(50), torch.ones(100))
            dist.all_reduce(torch.ones(10))
            dist.all_gather_into_tensor(torch.zeros(200), torch.ones(100))
    finally:
        dist.destroy_process_group()
    assert sent.gradients == 400 / 2 + 2 * 40 / 2
    assert sent.weights == 800 / 2


def row_of(losses: list[float], num_trainable: int = 5) -> dict:
    return {**rounds.empty_row("lora", 2), "losses": losses, "num_trainable": num_trainable}


def test_methods_that_train_nothing_or_otherwise_fail():
    assert rounds.does_not_fall([2.0, 1.9]) is None
    assert "trains nothing" in rounds.does_not_fall([2.0, 2.0])
    assert "trains nothing" in rounds.does_not_fall([2.0, math.nan])

    alone = row_of([2.0, 1.5, 1.0])
    assert rounds.differs_from_alone(row_of([2.0, 1.501, 1.001]), alone, "float32") is None
    assert "as in one process" in rounds.differs_from_alone(row_of([2.0, 1.9, 1.8]), alone, "float32")
    assert rounds.differs_from_alone(row_of([2.0, 1.6, 1.2]), alone, "bfloat16") is None
    assert "trains 4 weights" in rounds.differs_from_alone(row_of([2.0, 1.5, 1.0], 4), alone, "float32")


def test_a_sharded_method_that_trains_otherwise_has_no_figures():
    alone = {**row_of([2.0, 1.0]), "world_size": 1, "step_over_floor": 1.1}
    good = {**row_of([2.0, 1.0]), "step_over_floor": 1.2}
    bad = {**row_of([2.0, 1.9]), "step_over_floor": 1.3}
    assert step.compare_with_one([alone, good], "float32") == [alone, good]
    checked = step.compare_with_one([alone, bad], "float32")[1]
    assert checked["step_over_floor"] is None
    assert "as in one process" in checked["error"]


def test_nothing_is_measured_twice():
    arguments = argparse.Namespace(sizes=["27M", "135M"], base="135M", densities=[0.005, 0.05], ranks=[1, 2])
    assert scale.cases(arguments) == {"135M": {1: [0.005, 0.05], 2: [0.005]}, "27M": {1: [0.005]}}


def test_exponents():
    assert scale.exponent([(x, 3 * x**1.5) for x in (1.0, 2.0, 8.0)]) == pytest.approx(1.5)
    assert scale.exponent([(1.0, 2.0)]) is None
    assert scale.exponent([(1.0, 2.0), (2.0, -0.1)]) is None


def test_step_runs(run, tiny, tmp_path):
    arguments = ["--model", str(tiny["tied"]), "--rows", "2", "--length", "16", "--ranks", "2"]
    arguments += ["--compute", "0.3"]
    methods = ["--methods", "speft_ds", "shira", "supertuning"]
    out = run("step.py", *arguments, *methods, "--json", str(tmp_path / "step.json"))
    floor, ours, shira, supertuning, confined = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert out.count("\n| ") == 2 + 5
    for row in (floor, ours, shira, confined):
        assert row["error"] is None and row["step_over_floor"] > 0 and row["tokens"] == 32
    assert floor["sent_bytes"] == 0
    half = 2 * ours["num_trainable"]  # of 4 bytes
    assert half <= ours["sent_bytes"] <= half + 100
    assert ours["saved_over_floor"] < shira["saved_over_floor"]
    assert "0 elements" in supertuning["error"]  # it looks for the largest of weights that are elsewhere
    assert supertuning["step_over_floor"] is None


def test_scale_runs(run, tiny, tmp_path):
    config, json_file = tmp_path / "small.json", tmp_path / "scale.json"
    config.write_text((tiny["untied"] / "config.json").read_text())
    arguments = ["--sizes", str(config), "--ranks", "1", "--densities", "0.005"]
    out = run("scale.py", *arguments, "--rows", "2", "--length", "16", "--json", str(json_file))
    document = json.loads(json_file.read_text())
    (row,) = document["rows"]
    assert (row["model"], row["density"], row["world_size"]) == ("small", 0.005, 1)
    assert row["extra_ms"] == row["step_ms"] - row["floor_ms"]
    assert {fit["over"]: fit["num_points"] for fit in document["fits"]} == {"num_weights": 1, "density": 1}
    assert "small" in out


def test_selection_runs(run, tiny, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_values(tiny)))
    out = run("selection.py", "--recipe", str(recipe), "--json", str(tmp_path / "selection.json"))
    document = json.loads((tmp_path / "selection.json").read_text())
    assert document["machine"]["num_cores"] >= 1
    rows = {row["what"]: row for row in document["rows"]}
    assert rows["frozen forward and backward"]["over_floor"] == 1.0
    assert rows["salience + selection"]["seconds"] >= rows["salience"]["seconds"] > 0
    assert "16 rows" in out


@pytest.mark.parametrize(
    ("name", "num_weights"),
    [
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("meta-llama/Meta-Llama-3-8B", 8_030_261_248),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
    ],
)
def test_a_step_of_a_published_geometry_is_measured_where_it_fits(tmp_path, name, num_weights):
    """No weight is allocated."""
    model = models.build(models.config_of(name), "bfloat16", "meta")
    assert sum(weight.numel() for weight in model.parameters()) == num_weights
    both = 4 * num_weights / 2**30
    (fits,) = gpu.step_parts([name], both + gpu.ROOM_GIB + 1, tmp_path)
    (too_large,) = gpu.step_parts([name], both + gpu.ROOM_GIB - 1, tmp_path)
    assert fits.why_not is None and fits.words[fits.words.index("--geometry") + 1] == name
    assert "GiB" in too_large.why_not


def test_a_small_gpu_measures_a_smaller_model(tmp_path):
    (part,) = gpu.step_parts(None, 24.0, tmp_path)
    assert part.why_not is None and part.words[part.words.index("--geometry") + 1] == "1B"


def test_the_parts_of_make_gpu_take_under_ten_minutes(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "gpu_gib", lambda: 80.0)
    made = {part.name: part for part in gpu.parts(True, tmp_path)}
    assert sum(part.limit_s for part in made.values()) < 600
    names = {"tests", "ranks", "choice", "kernels", "loss", "step_Llama-2-7b-hf", "quickstart"}
    assert set(made) == names
    assert all((ROOT / word).is_file() for word in made["ranks"].words if word.endswith(".py"))


def test_a_part_past_its_limit_leaves_no_process_behind(tmp_path):
    """Not even one that has a session of its own."""
    words = ["sh", "-c", "setsid sleep 600 & echo $!; wait"]
    result = gpu.run(gpu.Part("stuck", words, 5), tmp_path)["result"]
    assert result.startswith("stopped")
    pid = int((tmp_path / "stuck.log").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_formats_runs(run, tiny, tmp_path):
    (tmp_path / "text.txt").write_text("The cat , a half @-@ wild one , sat . " * 9)
    arguments = ["--model", str(tiny["untied"]), "--text", str(tmp_path / "text.txt"), "--ranks", "1"]
    arguments += ["--include-path", str(tiny["tasks"]), "--tasks", "tiny_choice", "--formats", "bfp4"]
    out = run("formats.py", *arguments, "--json", str(tmp_path / "formats.json"))
    document = json.loads((tmp_path / "formats.json").read_text())
    untouched, bfp4 = document["rows"]
    assert (untouched["bits per weight"], bfp4["bits per weight"]) == ("32", "4.5")
    assert untouched["same answers"] == "4 of 4" and untouched["perplexity"] != bfp4["perplexity"]
    assert document["tokens"] == 9 * len("The cat, a half-wild one, sat. ")  # a byte each
    assert "bfp4" in out


def test_the_rehearsal_of_make_gpu_runs(tmp_path):
    out = tmp_path / "gpu"
    said = run_script("benchmarks/gpu.py", ["--rehearse", "--out", str(out)], tmp_path, DS_ACCELERATOR="cpu")
    assert said[0] == 0, said[1]
    parts = {part["part"]: part["result"] for part in json.loads((out / "summary.json").read_text())["parts"]}
    done = [name for name, result in parts.items() if result == "ok"]
    assert done == ["tests", "ranks", "choice", "kernels", "loss", "step"]
    assert "quickstart" in parts and (out / "summary.md").is_file()
    assert json.loads((out / "step.json").read_text())["rows"]


def test_stash_runs(run, tiny, tmp_path):
    """The step; and the table of runs that are finished, which are not made again."""
    for name, loss in (("null", 1.0), ("bfp8", 1.01), ("bfp4", 1.2), ("dynamic", 1.1)):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        facts = {"finished": True, "resources": [{"peak_bytes": 1, "saved": {}}]}
        (folder / "run.json").write_text(json.dumps(facts))
        formats = ["bfp4"] * 15 + ["bfp6"] * 5 if name == "dynamic" else [name] * 20
        lines = [{"loss": loss if n >= 10 else 9.0, "stash": each} for n, each in enumerate(formats)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    json_file = tmp_path / "stash.json"
    arguments = ["--model", str(tiny["untied"]), "--rows", "2", "--length", "16", "--rounds", "1"]
    arguments += ["--recipe", "no_such", "--output", str(tmp_path / "runs")]
    out = run("stash.py", *arguments, "--json", str(json_file))
    plain, eight, four = json.loads(json_file.read_text())["steps"]
    assert plain["kept_bytes"] > eight["kept_bytes"] > four["kept_bytes"] > 0
    cells = [[cell.strip() for cell in line.split("|")[1:4]] for line in out.splitlines()]
    assert ["bfp4", "bfp4", "1.2000 (+0.2000)"] in cells
    assert ["dynamic", "bfp4, from step 16 bfp6", "1.1000 (+0.1000)"] in cells
    others = [*arguments, "--only-train", "--steps", "7", "--json", str(tmp_path / "other.json")]
    assert run_script("benchmarks/stash.py", others, tmp_path)[0] == 1
    assert not (tmp_path / "other.json").exists()
