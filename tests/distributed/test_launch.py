"""The real launcher and the real command, as a user types them."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from limits import HANG_S
from live import finishes, is_refused
from tiny import make_model, read_rows, recipe_values
from transformers import AutoModelForCausalLM

import speft_ds
from speft_ds.cli.commands.compare_masks import compare
from speft_ds.sparse.mask import read_mask, save_mask

CURVES = ("grad_norm", "loss", "lr", "peak_memory_gib", "time", "tokens_per_s")
PICTURES = sorted(f"{name}.svg" for name in (*CURVES, "mask"))


@pytest.fixture
def values(tiny, tmp_path):
    tasks = {"tasks": ["tiny_generate", "tiny_choice"], "include_path": str(tiny["tasks"])}
    scores = {**tasks, "batch_size": 8, "limit": 9}
    return recipe_values(tiny, eval=scores, output_dir=str(tmp_path / "run"))


@pytest.fixture
def launch(write, launcher):
    """launch(overrides, job): the recipe, run by `deepspeed` to its end."""

    def run(*overrides, job="train"):
        command, env = launcher(job)
        env.pop("OMP_NUM_THREADS", None)  # the ranks share the cores, as for a user
        command += ["--recipe", str(write()), *overrides]
        return subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, env=env, check=False)

    return run


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_run_leaves_what_the_readme_says(launch, start, tiny, tmp_path):
    shared_memory = sorted(Path("/dev/shm").glob("deepspeed*"))
    finished = launch()
    assert finished.returncode == 0, finished.stderr
    assert sorted(Path("/dev/shm").glob("deepspeed*")) == shared_memory
    run = tmp_path / "run"
    assert files(run) == [
        ".lock",
        "adapter/README.md",
        "adapter/adapter.json",
        "adapter/adapter.safetensors",
        *[
            f"checkpoints/step_000004/{name}"
            for name in ("COMPLETE", "manifest.json", "part_00000.safetensors", "part_00001.safetensors")
        ],
        "eval/after.json",
        "eval/after/tiny_choice.jsonl",
        "eval/after/tiny_generate.jsonl",
        "eval/before.json",
        "eval/before/tiny_choice.jsonl",
        "eval/before/tiny_generate.jsonl",
        "metrics.jsonl",
        "recipe.yaml",
        "report.html",
        "report.md",
        *[f"report/{name}" for name in PICTURES],
        "run.json",
    ]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ["step", "loss", "lr", "grad_norm", "num_skipped"]
    keys += ["num_tokens", "tokens_per_s", "step_ms", "peak_memory_gib"]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(sorted(line) == sorted(keys) for line in lines)
    facts = json.loads((run / "run.json").read_text())
    mask = facts["mask"]
    assert facts["recipe"] == "mine"  # its file, which `speft runs` shows
    assert facts["world_size"] == 2 and sum(mask["per_layer"].values()) == mask["num_trainable"] == 892
    labels = sum(row.num_labels for row in read_rows(tiny["data"]))
    trained = {"rows": 48, "packs": None, "label_tokens": labels, "epochs": pytest.approx(4 * 8 / 48)}
    assert facts["data"] == {"rows_read": 48, "left_out": {}, "truncated": {}, **trained}
    assert "48 read, 0 left out" in finished.stdout
    assert sum(mask["entries_by_rank"]) == 892 and len(mask["sha256"]) == 64
    for moment in ("before", "after"):
        scores = json.loads((run / "eval" / f"{moment}.json").read_text())["scores"]
        assert sorted(row["task"] for row in scores) == ["tiny_choice", "tiny_generate"]
    assert "trained entries" in finished.stdout and "tiny_choice acc" in finished.stdout
    assert str(run / "adapter") in finished.stdout
    assert finished.stdout.count("step ") >= 4
    # The recipe in the run folder is a recipe: the same run again, elsewhere, on one rank.
    arguments = [f"output_dir={tmp_path / 'again'}", "eval.tasks=[]"]
    finishes(start(*arguments, num_ranks=1, recipe=run / "recipe.yaml"))
    models = [AutoModelForCausalLM.from_pretrained(tiny["untied"], dtype=torch.float32) for _ in range(2)]
    for model, folder in zip(models, (run, tmp_path / "again"), strict=True):
        speft_ds.apply_adapter(model, folder / "adapter")
    for (name, one), two in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-5), name
    assert json.loads((tmp_path / "again" / "run.json").read_text())["mask"]["sha256"] == mask["sha256"]
    others = [json.loads(line) for line in (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in others] == pytest.approx([line["loss"] for line in lines], abs=1e-5)


def test_a_mask_is_scored_once_and_trained(launch, start, tmp_path, capsys):
    scored = launch(f"output_dir={tmp_path / 'mask'}", "mask.salience=snip", job="score")
    assert scored.returncode == 0, scored.stderr
    assert files(tmp_path / "mask") == ["mask.png", "mask.safetensors", "recipe.yaml", "score.json"]
    assert (tmp_path / "mask" / "mask.png").read_bytes().startswith(b"\x89PNG")
    facts = json.loads((tmp_path / "mask" / "score.json").read_text())
    assert facts["mask"]["num_trainable"] == 892 and facts["timings_s"]["salience"] > 0
    assert "q_proj" in scored.stdout and "base unchanged" in scored.stdout
    load = [f"mask.load={tmp_path / 'mask'}", "eval.tasks=[]"]
    finishes(start(*load, num_ranks=1))
    mask = json.loads((tmp_path / "run" / "run.json").read_text())["mask"]
    assert mask["sha256"] == facts["mask"]["sha256"] and mask["loaded_from"] == str(tmp_path / "mask")
    # A mask and the adapter trained with it compare as equal, of one base; a mask of another is noted.
    compare([tmp_path / "mask", tmp_path / "run"], None)
    assert "fingerprints differ" not in capsys.readouterr().out
    mask, facts = read_mask(tmp_path / "mask" / "mask.safetensors")
    save_mask(tmp_path / "alien.safetensors", mask, {**facts, "fingerprint_bfloat16": "0" * 64})
    compare([tmp_path / "alien.safetensors", tmp_path / "run"], None)
    assert "fingerprints differ" in capsys.readouterr().out
    # Another base: the same shapes, other weights.
    other = make_model(tmp_path / "other", seed=5)
    refused = start(*load, f"model.name_or_path={other}", f"output_dir={tmp_path / 'no'}")
    is_refused(refused)
    assert refused.text().count("the mask was scored on another base") == 1
    assert not (tmp_path / "no").exists()


def test_changes_of_the_mask_are_logged(start, tmp_path):
    changing = ["mask.schedule=periodic", "mask.update_every=1", "train.steps=3", "eval.tasks=[]"]
    printed = finishes(start(*changing))
    mask = json.loads((tmp_path / "run" / "run.json").read_text())["mask"]
    assert [change["step"] for change in mask["changes"]] == [1, 2]
    assert all(0 < change["overlap_with_first"] < 1 for change in mask["changes"])
    assert mask["changes"][-1]["sha256"] == mask["sha256"]
    assert "mask changed after step 2" in printed and "mask changes" in printed
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter.json").read_text())
    assert adapter["num_entries"] > mask["num_trainable"] == 892


def test_bad_input_is_said_once_and_leaves_nothing(launch, tmp_path):
    """Every rank finds it, before torch is imported."""
    finished = launch("mask.load=/nowhere/mask.safetensors", "data.template='{nowhere}'")
    assert finished.returncode != 0
    for message in ("no mask file /nowhere/mask.safetensors", "no column 'nowhere'"):
        assert finished.stderr.count(message) == 1, finished.stderr
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "run").exists()


def test_bad_input_that_ranks_find_together_is_said_once_and_leaves_nothing(start, tmp_path):
    """What else there is: `REFUSED` of test_invariants.py."""
    run = start("eval.tasks=[]", "mask.targets=[c_attn]")
    is_refused(run)
    assert run.text().count("no weight matches c_attn") == 1, run.text()
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_is_not_empty_is_refused(start, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("keep")
    refused = start()
    is_refused(refused)
    assert "is not empty" in refused.text() and "output_dir=" in refused.text()
    assert files(tmp_path / "run") == ["precious"]
