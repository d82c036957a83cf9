"""Runs that are scored in every way, and scored again afterwards: the real command on real ranks."""

import json
import shutil
import signal

import pytest
import torch
import yaml
from live import LiveRun, finishes, metrics, whole_steps
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny import recipe_values
from transformers import AutoModelForCausalLM, AutoTokenizer

import speft_ds
from distributed import rank_hooks

LABELS = ["after", "after-format-1", "before", "before-2shot", "before-format-1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluated")


@pytest.fixture(scope="module")
def recipe(tiny, folder):
    (folder / "general.txt").write_text("The cat sat on the mat. " * 40)
    scores = {
        "tasks": ["tiny_generate", "tiny_letters"],
        "include_path": str(tiny["tasks"]),
        "limit": 7,
        "batch_size": 4,
        "chat_template": False,
        "manual_fewshot": [2],
        "format_spread": 2,
        "forgetting_tasks": ["tiny_choice"],
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


def read(run, label, folder="eval"):
    return json.loads((run / folder / f"{label}.json").read_text())


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
    assert roles == {"tiny_generate": "task", "tiny_letters": "task", "tiny_choice": "forgetting"}
    assert (before["model"], after["model"]) == ("base", "tuned")
    assert before["perplexity"]["num_tokens"] == after["perplexity"]["num_tokens"] > 100
    assert before["perplexity"]["token_perplexity"] != after["perplexity"]["token_perplexity"]
    assert {row["num_fewshot"] for row in read(run, "before-2shot")["scores"]} == {2}
    formats = [read(run, f"{moment}-format-1") for moment in ("before", "after")]
    assert formats[0]["settings"]["format_text"] == formats[1]["settings"]["format_text"] is not None
    for scored in formats:  # of the task whose prompts have a field to write otherwise
        assert [row["task"] for row in scored["scores"]] == ["tiny_letters"]
    prompts = [
        json.loads((run / "eval" / label / "tiny_letters.jsonl").read_text().partition("\n")[0])["arguments"][
            0
        ][0]
        for label in ("before", "before-format-1")
    ]
    assert "Question: " in prompts[0] and "Question: " not in prompts[1]


def test_what_is_scored_is_said_by_rounds(run, folder):
    said = [line for line in (folder / "log").read_text().splitlines() if line.startswith("round ")]
    tasks, more = "tiny_generate, tiny_letters", ", tiny_choice, the forgetting text"
    assert said == [
        f"round 1 of 5: {tasks}{more}, untouched",
        f"round 2 of 5: {tasks}, untouched, 2 examples in the prompt",
        f"round 3 of 5: {tasks}, untouched, prompt format 1",
        f"round 4 of 5: {tasks}{more}, trained",
        f"round 5 of 5: {tasks}, trained, prompt format 1",
    ]


def test_slices_are_scored_while_training(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scored = {line["step"]: line["scores"] for line in lines if "scores" in line}
    assert list(scored) == [2]  # the last step is scored whole
    assert scored[2].keys() == {"tiny_generate exact_match", "tiny_letters acc"}


def test_scores_change_nothing_in_the_training(recipe, folder, tiny):
    """With dropout, which draws at every step: the same run without them has the same bits."""
    model = shutil.copytree(tiny["untied"], folder / "dropout")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.3}))
    off = ["eval.tasks=[]", "eval.forgetting_tasks=[]", "eval.forgetting_text=null", "eval.slice=null"]
    off += ["eval.manual_fewshot=[]", "eval.format_spread=1"]
    homes = [folder / "dropout-scored", folder / "dropout-unscored"]
    for home, more in zip(homes, ([], off), strict=True):
        arguments = ["--recipe", str(recipe), f"model.name_or_path={model}", f"output_dir={home}", *more]
        finishes(LiveRun(folder / f"log-{home.name}", arguments))
    losses = [[line["loss"] for line in metrics(home)] for home in homes]
    assert losses[0] == losses[1] != [line["loss"] for line in metrics(folder / "run")]
    files = [home / "adapter" / "adapter.safetensors" for home in homes]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_stop_while_a_slice_is_scored_loses_nothing(recipe, folder):
    home = folder / "sliced"
    arguments = ["--recipe", str(recipe), f"output_dir={home}", "train.steps=60", "eval.before=false"]
    run = LiveRun(folder / "log-sliced", arguments, hooks={1: rank_hooks.asked_while_scoring})
    run.wait_for("scoring a slice")
    run.signal(signal.SIGTERM, 1)
    assert run.codes() == [85, 85], run.text()
    assert [line["step"] for line in metrics(home)] == [1, 2, 3] and whole_steps(home) == [3]


def test_scores_that_were_made_otherwise_are_said_on_a_resume(recipe, folder):
    """Stopped while it trains, and resumed with another limit: the base cannot be scored any more."""
    home = folder / "stopped"
    arguments = ["--recipe", str(recipe), f"output_dir={home}", "train.steps=60", "eval.slice=null"]
    first = LiveRun(folder / "log-stopped", arguments)
    first.wait_for("step     3/")
    first.signal(signal.SIGTERM, 0)
    assert first.codes() == [85, 85], first.text()
    arguments = ["--resume", str(home), "--resume-with", "eval.limit=5", "--resume-with", "eval.slice=null"]
    said = finishes(LiveRun(folder / "log-resumed", arguments))
    assert "note: before, before-2shot, before-format-1: not scored the way the recipe asks" in said
    assert not (home / "eval" / "before.json").exists()  # what is compared was made alike
    assert {row["num_documents"] for row in read(home / "eval", "before", "old")["scores"]} == {7}
    assert {row["num_documents"] for row in read(home, "after")["scores"]} == {5}


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
    tasks = ["tiny_generate", "tiny_letters", "tiny_choice"]
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
    asked = ["--tasks", "tiny_generate,tiny_letters", "--limit", "7"]
    arguments, home = ["--run", str(run)], run
    if what == "adapter":
        home = folder / "scored"
        arguments = ["--model", str(tiny["untied"]), "--adapter", str(run / "adapter")]
        arguments += [f"output_dir={home}", f"eval.include_path={tiny['tasks']}", "eval.chat_template=false"]
    finishes(LiveRun(folder / f"log-{what}", [*arguments, *asked, "eval.format_spread=1"], job="evaluate"))
    shown = (folder / f"log-{what}").read_text()
    assert ("before training" in shown) == (what == "run")  # the run's own scores, beside the new ones
    label = "tuned-tiny_generate+tiny_letters-limit7"
    wanted = [row for row in read(run, "after")["scores"] if row["role"] == "task"]
    got = read(home, label)
    assert [row["value"] for row in got["scores"]] == [row["value"] for row in wanted]
    assert answers(home, label, "tiny_generate") == answers(run, "after", "tiny_generate")


def test_the_base_in_few_bits_is_scored_apart(run, tiny, folder):
    """Its answers, of the same prompts, are not those that were kept of the untouched base."""
    home = folder / "bits"
    arguments = ["--model", str(tiny["untied"]), f"output_dir={home}", f"eval.include_path={tiny['tasks']}"]
    arguments += ["eval.chat_template=false", "eval.batch_size=4", "--tasks", "tiny_letters", "--limit", "7"]
    arguments += ["--text", str(folder / "general.txt"), "--weights", "bfp4", "--activations", "bfp6"]
    shown = finishes(LiveRun(folder / "log-bits", arguments, job="evaluate"))
    before, label = read(run, "before"), "base-tiny_letters+text-limit7-weights-bfp4-activations-bfp6"
    got = read(home, label)
    assert "weights in bfp4" in shown and "embed_tokens" in shown  # and what stays as it is
    assert (got["settings"]["weights"], got["settings"]["activations"]) == ("bfp4", "bfp6")
    assert not got["cached"] and got["model"] == "base"
    assert answers(home, label, "tiny_letters") != answers(run, "before", "tiny_letters")
    perplexities = [each["perplexity"]["token_perplexity"] for each in (got, before)]
    assert 0 < abs(perplexities[0] / perplexities[1] - 1) < 0.5
