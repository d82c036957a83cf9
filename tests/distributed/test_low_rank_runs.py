"""Runs of LoRA and of a mask with low-rank matrices, from recipe to report, and what other tools read."""

import json
from functools import partial

import pytest
import torch
import yaml
from live import LiveRun, finishes
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny import recipe_values

from speft_ds.adapter.compress import compress
from speft_ds.adapter.export import export_peft
from speft_ds.adapter.format import tensors_sha256
from speft_ds.adapter.merge import merge
from speft_ds.errors import UserError

SECTIONS = {
    "lora": {"method": {"name": "lora", "rank": 4}},
    "sparse_lora": {"method": {"name": "sparse_lora"}, "mask": {"density": 0.2}},
}


@pytest.fixture(scope="module", params=SECTIONS)
def run(request, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    scores = {
        "tasks": ["tiny_letters"],
        "include_path": str(tiny["tasks"]),
        "limit": 7,
        "chat_template": False,
    }
    values = recipe_values(tiny, eval=scores, **SECTIONS[request.param])
    if request.param == "lora":
        del values["mask"]
    (folder / "mine.yaml").write_text(yaml.safe_dump(values))
    finishes(LiveRun(folder / "log", ["--recipe", str(folder / "mine.yaml"), f"output_dir={folder / 'run'}"]))
    return folder / "run"


def read(run, label):
    return json.loads((run / "eval" / f"{label}.json").read_text())


def test_what_a_run_leaves(run):
    facts, adapter = json.loads((run / "run.json").read_text()), run / "adapter"
    names = {
        "README.md",
        "adapter.json",
        "adapter.safetensors",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert {path.name for path in adapter.iterdir()} == names
    assert facts["finished"] and facts["low_rank"]["num_elements"] > 0 == facts["whole"]
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["r"] == facts["low_rank"]["rank"] and config["peft_type"] == "LORA"
    has_entries = facts["mask"]["num_trainable"] > 0
    card = (adapter / "README.md").read_text()
    assert ("PeftModel" in card) != ("apply_adapter" in card) == has_entries
    assert "density" in card or not has_entries
    assert read(run, "after")["asked"]["of"]["adapter"] == tensors_sha256(adapter)


def test_scores_of_stock_tools(run, tiny, tmp_path):
    """lm-eval reads the adapter of LoRA, and merged checkpoints, as they are: the scores of the run."""
    peft = {"peft": str(run / "adapter")}
    config = json.loads((run / "adapter" / "adapter.json").read_text())
    base = str(tiny["untied"])
    if config["num_entries"]:
        merge(None, run, tmp_path / "merged")
        peft, base = {}, str(tmp_path / "merged")
    stock = simple_evaluate(
        HFLM(pretrained=base, dtype=torch.float32, device="cpu", **peft),
        tasks=["tiny_letters"],
        limit=7,
        task_manager=TaskManager(include_path=str(tiny["tasks"]), include_defaults=False),
    )
    for row in read(run, "after")["scores"]:
        assert row["value"] == stock["results"][row["task"]][f"{row['metric']},{row['filter']}"]


def test_a_finished_run_is_scored_again(run, tmp_path):
    arguments = ["--run", str(run), "--tasks", "tiny_letters", "--limit", "7"]
    finishes(LiveRun(tmp_path / "log", arguments, job="evaluate"))
    label = "tuned-tiny_letters-limit7"
    assert [row["value"] for row in read(run, label)["scores"]] == [
        row["value"] for row in read(run, "after")["scores"]
    ]


def test_tools_for_entries_refuse_matrices(run, tmp_path):
    for tool in (export_peft, partial(compress, keep=0.5, method="topk")):
        with pytest.raises(UserError) as refused:
            tool(run, tmp_path / "out")
        assert "speft merge" in refused.value.fix and not (tmp_path / "out").exists()
