"""Runs that are scored in every way, and scored again afterwards: the real command on real ranks."""

import json

import pytest
import torch
import yaml
from live import LiveRun, finishes
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny import recipe_values
from transformers import AutoModelForCausalLM, AutoTokenizer

import speft_ds

LABELS = ["after", "after-format-1", "before", "before-2shot", "before-format-1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluated")


@pytest.fixture(scope="module")
def recipe(tiny, folder):
    (folder / "general.txt").write_text("The cat sat on the mat. " * 40)
    scores = {
        "tasks": ["tiny_generate", "tiny_choice"],
        "include_path": str(tiny["tasks"]),
        "limit": 7,
        "batch_size": 4,
        "chat_template": False,
        "manual_fewshot": [2],
        "format_spread": 2,
        "forgetting_tasks": ["tiny_letters"],
        "forgetting_text": str(folder / "general.txt"),
        "every": 2,
        "slice": 3,
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(recipe_values(tiny, eval=scores)))
    return folder / "mine.yaml"


@pytest.fixture(scope="module")
def run(recipe, folder):
    finishes(LiveRun(folder / "log", ["--recipe", str(recipe), f"output_dir={folder / 'run'}"]))
    return folder / "run"


def read(run, label):
    return json.loads((run / "eval" / f"{label}.json").read_text())


def answers(run, label, task):
    """Document -> what was answered."""
    lines = (run / "eval" / label / f"{task}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert sorted(row["doc_id"] for row in rows) == list(range(len(rows)))
    return {row["doc_id"]: row["filtered_resps"] for row in rows}


def test_every_baseline_is_there(run):
    assert sorted(path.stem for path in (run / "eval").glob("*.json")) == LABELS
    before, after = read(run, "before"), read(run, "after")
    roles = {row["task"]: row["role"] for row in after["scores"]}
    assert roles == {"tiny_generate": "task", "tiny_choice": "task", "tiny_letters": "forgetting"}
    assert (before["model"], after["model"]) == ("base", "tuned")
    assert before["perplexity"]["num_tokens"] == after["perplexity"]["num_tokens"] > 100
    assert before["perplexity"]["token_perplexity"] != after["perplexity"]["token_perplexity"]
    assert {row["num_fewshot"] for row in read(run, "before-2shot")["scores"]} == {2}
    formats = [read(run, f"{moment}-format-1")["settings"]["format_text"] for moment in ("before", "after")]
    assert formats[0] == formats[1] is not None


def test_slices_are_scored_while_training(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scored = {line["step"]: line["scores"] for line in lines if "scores" in line}
    assert list(scored) == [2]  # the last step is scored whole
    assert scored[2].keys() == {"tiny_generate exact_match", "tiny_choice acc"}


def test_the_base_is_not_scored_twice(recipe, folder, run):
    again = LiveRun(folder / "again", ["--recipe", str(recipe), f"output_dir={folder / 'run2'}"], num_ranks=1)
    finishes(again)
    for label in LABELS:
        first, second = read(run, label), read(folder / "run2", label)
        assert second["cached"] == label.startswith("before")
        assert [row["value"] for row in first["scores"]] == pytest.approx(
            [row["value"] for row in second["scores"]], abs=1e-4
        )


def test_stock_lm_eval_on_base_and_adapter_says_the_same(run, tiny):
    """Every document: prompts, answers and scores."""
    model = AutoModelForCausalLM.from_pretrained(tiny["untied"], dtype=torch.float32)
    speft_ds.apply_adapter(model, run / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(tiny["untied"])
    tasks = ["tiny_generate", "tiny_choice", "tiny_letters"]
    stock = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, backend="causal"),
        tasks=tasks,
        limit=7,
        task_manager=TaskManager(include_path=str(tiny["tasks"]), include_defaults=False),
    )
    for row in read(run, "after")["scores"]:
        assert row["value"] == stock["results"][row["task"]][f"{row['metric']},{row['filter']}"]
    generated = {row["doc_id"]: row["filtered_resps"] for row in stock["samples"]["tiny_generate"]}
    assert answers(run, "after", "tiny_generate") == generated
    chosen = {row["doc_id"]: row["filtered_resps"] for row in stock["samples"]["tiny_choice"]}
    for number, choices in answers(run, "after", "tiny_choice").items():
        ours = [float(likelihood) for likelihood, _ in choices]
        assert ours == pytest.approx([float(each) for each, _ in chosen[number]], abs=1e-4)


@pytest.mark.parametrize("what", ["run", "adapter"])
def test_a_finished_run_is_scored_again(run, tiny, folder, what):
    asked = ["--tasks", "tiny_generate,tiny_choice", "--limit", "7"]
    arguments, home = ["--run", str(run)], run
    if what == "adapter":
        home = folder / "scored"
        arguments = ["--model", str(tiny["untied"]), "--adapter", str(run / "adapter")]
        arguments += [f"output_dir={home}", f"eval.include_path={tiny['tasks']}", "eval.chat_template=false"]
    finishes(LiveRun(folder / f"log-{what}", [*arguments, *asked, "eval.format_spread=1"], job="evaluate"))
    label = "tuned-tiny_generate+tiny_choice-limit7"
    wanted = [row for row in read(run, "after")["scores"] if row["role"] == "task"]
    got = read(home, label)
    assert [row["value"] for row in got["scores"]] == [row["value"] for row in wanted]
    assert answers(home, label, "tiny_generate") == answers(run, "after", "tiny_generate")
