"""What is refused before the model is loaded, and what is counted of tasks that are scored all the same."""

import json

import pytest
import yaml
from tiny import make_tokenizer
from tokenizers import normalizers

from speft_ds.errors import UserError
from speft_ds.evaluation.eval_jobs import EvalJob
from speft_ds.evaluation.task_checks import check_tasks
from speft_ds.evaluation.tasks import find_tasks, local_data

CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{label}}",
    "doc_to_choice": "choices",
    "metric_list": [{"metric": "acc"}],
}
LIKELIHOOD = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{label}}",
    "metric_list": [{"metric": "acc"}],
}
GENERATE = {
    "output_type": "generate_until",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{label}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
    "metric_list": [{"metric": "exact_match"}],
}


def rows(*changes):
    """Four documents, changed by number."""
    plain = [{"prompt": f"say {n}", "label": 0, "choices": ["yes", "no"]} for n in range(4)]
    for number, change in changes:
        plain[number] |= change
    return plain


def check(folder, form=CHOICE, documents=None, shots=None, limit=None, kind="main", chat=False, **more):
    """The notes on a task of these documents, whose file has more keys."""
    splits = {"test": documents or rows(), "train": rows(), "validation": rows()}
    for split, each in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    files = {split: str(folder / f"{split}.jsonl") for split in splits}
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
    (folder / "quiz.yaml").write_text(yaml.safe_dump({"task": "quiz", **data, **form, **more}))
    job = EvalJob("before", kind, ("quiz",), shots, limit)
    with local_data(None):
        manager = find_tasks(["quiz"], str(folder))
        return check_tasks(job, manager, forgetful_tokenizer(), chat, max_length=256)


def forgetful_tokenizer():
    """It makes no token of a tilde."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    return tokenizer


@pytest.mark.parametrize(
    ("where", "asked"),
    [
        ("eval.num_fewshot", {"shots": 5}),
        ("eval.num_fewshot", {"shots": 5, "fewshot_split": "train"}),
        ("eval.num_fewshot", {"shots": 4, "fewshot_split": "test"}),  # a document is not its own example
        ("eval.num_fewshot", {"shots": 5, "fewshot_config": {"sampler": "first_n"}}),
        ("eval.num_fewshot", {"num_fewshot": 5}),  # by the task's file
        ("eval.manual_fewshot", {"shots": 5, "kind": "fewshot"}),
        ("eval.tasks", {"test_split": "tset"}),
        ("eval.tasks", {"test_split": None, "validation_split": "dev"}),
        ("eval.tasks", {"test_split": None}),
        ("eval.tasks", {"unsafe_code": True}),
        ("eval.tasks", {"doc_to_image": "prompt"}),
        ("eval.tasks", {"documents": rows((0, {"choices": ["", "b"]}))}),
        (
            "eval.tasks",
            {"documents": rows((3, {"choices": ["", "b"]})), "chat": True},
        ),  # no text at all to score
        ("eval.tasks", {"documents": rows((2, {"choices": ["a", "~~"]})), "chat": True}),
        ("eval.tasks", {"documents": rows((2, {"choices": ["a", "x" * 257]}))}),
        ("eval.tasks", {"documents": rows((2, {"choices": ["~", "a"], "prompt": "x" * 900})), "chat": True}),
        ("eval.tasks", {"form": LIKELIHOOD, "documents": rows((1, {"label": "~"})), "target_delimiter": ""}),
        ("eval.tasks", {"form": LIKELIHOOD, "documents": rows((1, {"label": "~", "prompt": ""}))}),
        ("eval.tasks", {"doc_to_text": "{{ nothing.here }}"}),
        ("eval.tasks", {"doc_to_choice": "{{prompt}}"}),
        ("eval.tasks", {"doc_to_target": ["yes"]}),  # found by lm-eval when all is computed
        ("eval.tasks", {"metric_list": [{"metric": "acuracy"}]}),
        ("eval.tasks", {"form": GENERATE, "documents": rows((3, {"prompt": ""}))}),
        ("eval.tasks", {"form": GENERATE, "generation_kwargs": {"max_gen_toks": 256}}),
        ("eval.tasks", {"form": GENERATE, "generation_kwargs": {"max_new_tokens": 512}}),
        ("eval.tasks", {"form": GENERATE, "generation_kwargs": {"until": ["."]}}),  # 256, by default
    ],
)
def test_what_lm_eval_would_not_score(tmp_path, where, asked):
    with pytest.raises(UserError, match="quiz") as caught:
        check(tmp_path, **asked)
    assert caught.value.where == where and caught.value.fix
    assert not isinstance(caught.value.__cause__, AttributeError)  # a fault of ours would look like theirs


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"shots": 4},
        {"shots": 3, "fewshot_split": "test"},
        {"shots": 4, "num_fewshot": 0},  # the file's 0 stays
        {"shots": 2, "chat": True},
        {"form": GENERATE, "shots": 2, "fewshot_split": "train", "documents": rows((3, {"prompt": ""}))},
        {"form": GENERATE, "generation_kwargs": {"max_gen_toks": 255}},
        {"limit": 3, "documents": rows((3, {"choices": ["", "b"]})), "chat": True},
        {"documents": rows((2, {"choices": ["~", "x" * 250], "prompt": "x" * 900}))},  # a space is a token
    ],
)
def test_what_it_scores(tmp_path, asked):
    assert not [note for note in check(tmp_path, **asked) if "own example" not in note]


@pytest.mark.parametrize(
    ("changes", "limit", "counted"),
    [
        ([(1, {"label": 2}), (2, {"label": 7})], None, "2 of 4"),
        ([(1, {"label": 2}), (2, {"label": 7})], 2, "1 of 2"),
        ([(1, {"label": 2}), (2, {"label": 7})], 0.5, "1 of 2"),
        ([(1, {"label": -1})], None, "1 of 4"),
        ([(3, {"choices": ["a", ""]})], None, "1 of 4"),
        ([(n, {"choices": ["a"], "label": 1}) for n in (1, 2, 3)], None, "3 of 4"),
    ],
)
def test_labels_and_choices_that_cannot_be_right_are_counted(tmp_path, changes, limit, counted):
    (note,) = check(tmp_path, documents=rows(*changes), limit=limit)
    assert note.startswith(f"quiz: {counted} documents")


def test_a_negative_label_counts(tmp_path):
    """lm-eval takes it for wrong, and says nothing."""
    (note,) = check(tmp_path, documents=rows((1, {"label": -1})), doc_to_target="label")
    assert note.startswith("quiz: 1 of 4 documents")


def test_a_column_that_is_not_there_is_the_label_of_every_document(tmp_path):
    (note,) = check(tmp_path, doc_to_target="no_such_column")
    assert note.startswith("quiz: 4 of 4 documents")


def test_a_task_without_a_test_split_is_scored_on_its_validation_split(tmp_path):
    (note,) = check(tmp_path, test_split=None, validation_split="validation")
    assert note.startswith("quiz: ") and note.endswith("scored on validation")


@pytest.mark.parametrize(
    ("splits", "is_noted"),
    [
        ({}, True),
        ({"fewshot_split": "test"}, False),
        ({"training_split": "train"}, False),
        ({"validation_split": "validation"}, False),
        ({"fewshot_config": {"samples": rows()}}, False),
    ],
)
def test_examples_of_the_documents_that_are_scored(tmp_path, splits, is_noted):
    notes = check(tmp_path, shots=2, **splits)
    assert [note.startswith("quiz: few-shot examples are of test") for note in notes] == [True] * is_noted
    only_validation = {"test_split": None, "validation_split": "validation", "fewshot_split": "validation"}
    assert len(check(tmp_path, shots=2, **only_validation)) == 2  # lm-eval compares with the test split alone


@pytest.mark.parametrize("pattern", ["qu*", "qui?", "[q]uiz"])
def test_a_pattern_is_refused_with_what_it_stands_for(tmp_path, pattern):
    check(tmp_path)
    with pytest.raises(UserError) as caught:
        find_tasks([pattern], str(tmp_path))
    assert caught.value.where == "eval.tasks" and "quiz" in caught.value.fix
