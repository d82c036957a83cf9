"""The real launcher and the real command, typed by a user with secrets: what they leave and what they say."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from limits import HANG_S
from live import finishes, is_refused
from tiny import make_model, read_rows, recipe_values
from transformers import AutoModelForCausalLM

import speft_ds
from speft_ds.cli.commands.compare_masks import compare
from speft_ds.env import free_port
from speft_ds.report.summary import STAGES
from speft_ds.sparse.mask import read_mask, save_mask

ROOT = Path(__file__).resolve().parents[2]
CURVES = ("grad_norm", "loss", "lr", "peak_memory_gib", "time", "tokens_per_s")
PICTURES = sorted(f"{name}.svg" for name in (*CURVES, "mask"))


SECRETS = ["hf_" + "PlantedToken" * 3, "0123planted456789wandb", "planted-password", "planted-proxy-word"]
TOKEN, WANDB, PASSWORD, PROXY = SECRETS


def planted():
    """The environment of a user with tokens, and a hub and a proxy with passwords, where nobody listens."""
    hub, proxy = f"http://me:{PASSWORD}@127.0.0.1:9", f"http://me:{PROXY}@127.0.0.1:9"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    tokens = {"HF_TOKEN": TOKEN, "HUGGING_FACE_HUB_TOKEN": TOKEN, "WANDB_API_KEY": WANDB, "HF_ENDPOINT": hub}
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), proxy)
    own = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "PATH": path}
    return (
        {name: value for name, value in os.environ.items() if "OFFLINE" not in name} | tokens | proxies | own
    )


def said(*command, code=0):
    done = subprocess.run(command, capture_output=True, text=True, env=planted(), check=False, timeout=HANG_S)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def found_in(content):
    content = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    return [secret for secret in SECRETS if secret.encode() in content]


def recipe_in(folder, tiny):
    tasks = {"tasks": ["tiny_generate", "tiny_choice"], "include_path": str(tiny["tasks"])}
    scores = {**tasks, "batch_size": 8, "limit": 9}
    return recipe_values(tiny, eval=scores, output_dir=str(folder / "run"))


@pytest.fixture
def values(tiny, tmp_path):
    return recipe_in(tmp_path, tiny)


@pytest.fixture(scope="module")
def launched(tiny, tmp_path_factory):
    """A run by `deepspeed`, to its end, of a user with secrets: its folder, and all that it said."""
    folder, shared_memory = tmp_path_factory.mktemp("launched"), sorted(Path("/dev/shm").glob("deepspeed*"))
    values = recipe_in(folder, tiny)
    values["train"] |= {"monitor": "csv", "profile": [2, 3]}
    (folder / "mine.yaml").write_text(yaml.safe_dump(values))
    program = Path(sys.executable).with_name("deepspeed")
    words = [program, "--num_gpus", "2", "--master_port", str(free_port()), ROOT / "launch" / "train.py"]
    text = said(*words, "--recipe", folder / "mine.yaml")
    assert sorted(Path("/dev/shm").glob("deepspeed*")) == shared_memory
    return folder / "run", text


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_run_leaves_what_the_readme_says(launched, start, tiny, tmp_path):
    run, text = launched
    assert [file for file in files(run) if not file.startswith("csv/")] == [
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
        "profile/rank0.json.gz",
        "profile/rank1.json.gz",
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
    assert "48 read, 0 left out" in text
    assert facts["timings_s"].keys() - {"total"} <= STAGES.keys()  # the report has a name for each
    assert sum(mask["entries_by_rank"]) == 892 and len(mask["sha256"]) == 64
    for moment in ("before", "after"):
        scores = json.loads((run / "eval" / f"{moment}.json").read_text())["scores"]
        assert sorted(row["task"] for row in scores) == ["tiny_choice", "tiny_generate"]
    assert "trained entries" in text and "tiny_choice acc" in text
    assert str(run / "adapter") in text
    assert text.count("step ") >= 4
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


def test_a_mask_is_scored_once_and_trained(start, tmp_path, capsys):
    measured = {"SPEFT_DS_KERNELS": "measured", "SPEFT_DS_CACHE": str(tmp_path / "cache")}
    how = [f"output_dir={tmp_path / 'mask'}", "mask.salience=snip"]
    scored = finishes(start(*how, job="score", **measured))
    assert files(tmp_path / "mask") == ["mask.png", "mask.safetensors", "recipe.yaml", "score.json"]
    assert (tmp_path / "mask" / "mask.png").read_bytes().startswith(b"\x89PNG")
    facts = json.loads((tmp_path / "mask" / "score.json").read_text())
    assert facts["mask"]["num_trainable"] == 892 and facts["timings_s"]["salience"] > 0
    assert "q_proj" in scored and "base unchanged" in scored
    cost, (table,) = facts["gradient_cost"], (tmp_path / "cache" / "kernels").iterdir()
    assert cost["device"] == json.loads(table.read_text())["device"] and cost["device"] in scored
    assert 0 < cost["over_dense"] <= 1 and sum(cost["backends"].values()) <= 14
    used, width = facts["mask"]["num_used_columns"], facts["mask"]["num_columns"]
    assert 0 < used <= width and f"{used:,} of {width:,}" in scored
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


def test_bad_input_is_said_once_and_leaves_nothing(launcher, write, start, tmp_path):
    """What ranks find before torch is imported, each for itself: the launcher ends those that wait to say it.
    And what they find together. What else there is: test_bad_inputs.py, and `REFUSED` of test_invariants.py.
    """
    command, env = launcher()
    command += ["--recipe", str(write()), "mask.load=/nowhere/mask.safetensors", "data.template='{nowhere}'"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, env=env, check=False)
    together = start("eval.tasks=[]", "mask.targets=[c_attn]")
    is_refused(together)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    for message, text in (
        ("no mask file /nowhere/mask.safetensors", done.stderr),
        ("no column 'nowhere'", done.stderr),
        ("no weight matches c_attn", together.text()),
    ):
        assert text.count(message) == 1, text
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_is_not_empty_is_refused(start, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("keep")
    refused = start()
    is_refused(refused)
    assert "is not empty" in refused.text() and "output_dir=" in refused.text()
    assert files(tmp_path / "run") == ["precious"]


def test_no_secret_is_in_a_run(launched):
    folder, text = launched
    assert "step     4/4" in text and "no answer from http://127.0.0.1:9" in text
    assert found_in(text.encode()) == []
    assert {path.name for path in (folder / "csv").iterdir()} >= {"train_loss.csv"}
    assert {
        path: found for path in map(folder.joinpath, files(folder)) if (found := found_in(path.read_bytes()))
    } == {}


def test_no_secret_is_in_what_commands_say(launched, tmp_path):
    folder, _ = launched
    speft, mine = (sys.executable, "-m", "speft_ds.cli.main"), str(folder.parent / "mine.yaml")
    missing = (f"output_dir={tmp_path / 'new'}", "model.name_or_path=owner/name", f"data.path={TOKEN}")
    texts = [
        said(*speft, "validate", mine, *missing, code=2),
        said(*speft, "validate", mine, *missing[:2], code=2),
        said(*speft, "submit", mine, missing[0], "--dry-run"),
        said(*speft, "push", str(folder), "me/mine", code=2),
        said(*speft, "merge", str(folder), str(tmp_path / "merged"), "--base", "owner/name", code=2),
    ]
    assert all(texts) and "owner/name" in texts[1]
    assert [found_in(text.encode()) for text in texts] == [[]] * len(texts)
