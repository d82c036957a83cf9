"""A searched prompt as a baseline: chosen without the test documents, the same for any number of ranks."""

import json

import pytest
import yaml

from distributed import evaluation_checks
from distributed.reference import make_recipe
from speft_ds.errors import UserError
from speft_ds.evaluation.prompt_tasks import labelled_rows
from speft_ds.evaluation.tasks import find_tasks, load_tasks

LABELS = ["odd", "even"]
NUM_TEST, ROWS, FORWARDS = 9, 6, 2 * 6 * 14


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Tasks of two label words, one with training rows, and of one choice per document; a folder."""
    folder = tmp_path_factory.mktemp("labelled")
    for split, count in (("test", NUM_TEST), ("train", 12)):
        rows = [{"text": f"{split} {n}", "label": n % 2, "own": [f"a{n}", "b", "c"]} for n in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds = {
        "parity": {"doc_to_choice": LABELS, "training_split": "train"},
        "own_choices": {"doc_to_choice": "own", "fewshot_split": "train"},
        "test_only": {"doc_to_choice": LABELS},
        "generated": {"output_type": "generate_until", "doc_to_target": "x", "training_split": "train"},
    }
    for name, more in kinds.items():
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {s: str(folder / f"{s}.jsonl") for s in ("test", "train")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}",
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**task, **more}))
    return folder


def recipe_for(tiny, tasks, folder, names=("parity", "own_choices"), chat=False, **auto_prompt):
    asked = {"shots": ROWS, "examples": 3, "forwards": FORWARDS, **auto_prompt}
    section = {"tasks": list(names), "include_path": str(tasks), "chat_template": chat, "batch_size": 4}
    return make_recipe(tiny, folder, eval={**section, "auto_prompt": asked})


@pytest.mark.parametrize("chat", [False, True])
def test_no_test_document_is_asked_for_before_the_choice(ranks, tiny, tasks, tmp_path, chat):
    recipe = recipe_for(tiny, tasks, tmp_path, chat=chat)
    (found,) = ranks(1)(evaluation_checks.check_auto_prompt, recipe=recipe)
    *searched, scored = found["asked"]
    assert not any("test" in prompt for call in searched for prompt, _ in call)
    # Not even opened, but by lm-eval, which looks at a first one where it makes a task.
    assert found["opened"].count(0) == 2 and min(filter(None, found["opened"])) == len(searched)
    assert len(scored) == NUM_TEST * 2 + NUM_TEST * 3  # each document once, for each of its choices
    for number in range(NUM_TEST):
        assert sum(f"test {number}" in prompt for prompt, _ in scored) == 2 + 3
    document = found["document"]
    scores = {(score["task"], score["metric"]) for score in document["scores"]}
    assert scores == {("own_choices", "acc"), ("parity", "acc")}
    forwards = {task: facts["forwards"] for task, facts in document["auto_prompt"].items()}
    assert sum(forwards.values()) == sum(len(call) for call in searched)
    assert max(forwards.values()) <= FORWARDS and document["kind"] == "auto"
    for task, facts in document["auto_prompt"].items():
        answers = facts["label_words"] or (LABELS if task == "parity" else None)
        for _, arguments, _ in found["samples"][task]:
            assert all(prompt.count("train") == len(facts["examples"]) for prompt, _ in arguments)
            assert answers is None or [word.strip() for _, word in arguments] == list(answers)
    json.dumps(document)


def test_the_choice_does_not_depend_on_the_number_of_ranks(ranks, tiny, tasks, tmp_path):
    recipe = recipe_for(tiny, tasks, tmp_path)
    one, two = (ranks(n)(evaluation_checks.check_auto_prompt, recipe=recipe)[0] for n in (1, 2))
    for found in (one, two):
        for facts in found["document"]["auto_prompt"].values():
            assert facts.pop("seconds") >= 0
    assert one["document"]["auto_prompt"] == two["document"]["auto_prompt"]
    assert one["samples"] == two["samples"] and one["results"] == two["results"]


@pytest.mark.parametrize(
    ("name", "shots", "fix"),
    [
        ("test_only", 2, "eval.auto_prompt.shots=null"),
        ("parity", 13, "eval.auto_prompt.shots=12"),
        ("generated", 2, "eval.tasks"),
    ],
)
def test_what_cannot_be_searched_is_refused(tasks, name, shots, fix):
    (task,) = load_tasks(find_tasks([name], str(tasks)), [name]).values()
    with pytest.raises(UserError) as refused:
        labelled_rows(task, shots, seed=0)
    assert fix in refused.value.fix


def test_rows_are_drawn_by_the_seed(tasks):
    (task,) = load_tasks(find_tasks(["parity"], str(tasks)), ["parity"]).values()
    first, again, other = (labelled_rows(task, 6, seed) for seed in (0, 0, 1))
    assert first == again != other and len({row.text for row in first}) == 6
    assert all(row.label == int(row.text.split()[1]) % 2 and row.choices == ("odd", "even") for row in first)
