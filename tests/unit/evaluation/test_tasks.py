"""Tasks by their stock names, with data from a folder."""

import datasets
import pytest
import yaml
from lm_eval.tasks import TaskManager

from speft_ds.errors import UserError
from speft_ds.evaluation.tasks import _local_copy, find_tasks, load_tasks, local_data

QUIZ = {
    "task": "quiz",
    "dataset_path": "someone/quiz",
    "dataset_name": "easy",
    "output_type": "multiple_choice",
    "training_split": "train",
    "fewshot_split": "train",
    "doc_to_text": "{{q}}",
    "doc_to_target": 0,
    "doc_to_choice": ["yes", "no"],
    "metric_list": [{"metric": "acc"}],
}


def load(folder, *splits, scored="validation_split"):
    """A task whose data set is on the hub, and of which these splits are in a folder."""
    data = folder / "hub" / "someone" / "quiz"
    for split in splits:
        (data / "easy").mkdir(parents=True, exist_ok=True)
        rows = [{"q": f"{split} {i}"} for i in range(3)]
        datasets.Dataset.from_list(rows).to_parquet(data / "easy" / f"{split}.parquet")
    if splits:
        files = [{"split": split, "path": f"easy/{split}.parquet"} for split in splits]
        header = yaml.safe_dump({"configs": [{"config_name": "easy", "data_files": files}]})
        (data / "README.md").write_text(f"---\n{header}---\n")
    (folder / "quiz.yaml").write_text(yaml.safe_dump({**QUIZ, scored: "validation"}))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    with local_data(str(folder / "hub")) as notes:
        return manager.load(["quiz"])["tasks"]["quiz"], notes


def test_data_are_read_from_the_folder_by_their_hub_id(tmp_path):
    task, notes = load(tmp_path, "train", "validation")
    assert [doc["q"] for doc in task.validation_docs()] == ["validation 0", "validation 1", "validation 2"]
    assert task.config.training_split == "train" and notes == []


def test_a_copy_without_the_training_split_still_scores(tmp_path):
    task, (note,) = load(tmp_path, "validation")
    assert not task.has_training_docs() and len(list(task.validation_docs())) == 3
    assert note.startswith("quiz: ") and "someone/quiz has no split train" in note


def test_data_that_are_nowhere_are_said_with_the_way_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"quiz \(someone/quiz\)") as caught:
        load(tmp_path)
    assert caught.value.where == "eval.data_dir"
    assert f"someone/quiz --local-dir {tmp_path}/hub/someone/quiz" in caught.value.fix


def test_files_that_a_task_names_are_asked_for_not_the_hub(tmp_path):
    files = {"dataset_path": "json", "dataset_kwargs": {"data_files": str(tmp_path / "gone.jsonl")}}
    task = {**QUIZ, **files, "dataset_name": None, "validation_split": "train"}
    (tmp_path / "quiz.yaml").write_text(yaml.safe_dump(task))
    with local_data(None), pytest.raises(UserError, match=r"gone\.jsonl") as caught:
        load_tasks(find_tasks(["quiz"], str(tmp_path)), ["quiz"])
    assert caught.value.where == "eval.tasks" and "hf download" not in caught.value.fix


@pytest.mark.parametrize("scored", ["validation_split", "test_split"])
def test_a_copy_without_the_split_to_score_is_refused(tmp_path, scored):
    with pytest.raises(UserError, match="quiz") as caught:
        load(tmp_path, "train", "test", scored=scored)
    assert caught.value.where == "eval.tasks" and "train, test" in caught.value.fix


def test_a_task_that_is_scored_twice_is_refused(tmp_path):
    load(tmp_path, "train", "validation")
    (tmp_path / "both.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["quiz"]}))
    manager = find_tasks(["quiz", "both"], str(tmp_path))
    with local_data(str(tmp_path / "hub")):
        assert list(load_tasks(manager, ["both"])) == list(load_tasks(manager, ["quiz", "quiz"])) == ["quiz"]
        with pytest.raises(UserError) as caught:
            load_tasks(manager, ["quiz", "both"])
    assert caught.value.where == "eval.tasks"


def test_an_unknown_task_is_refused():
    with pytest.raises(UserError, match="arc_esay") as caught:
        find_tasks(["arc_easy", "arc_esay"], None)
    assert caught.value.where == "eval.tasks" and caught.value.fix


def test_a_document_is_never_its_own_example(tmp_path):
    """Where only the split that is scored is there, lm-eval must know that the examples are of it."""
    task, _ = load(tmp_path, "validation", scored="test_split")
    task.set_config("num_fewshot", 2)
    task.set_fewshot_seed(1234)
    for document in task.test_docs():
        prompt = task.fewshot_context(document, 2)
        assert prompt.count(document["q"]) == 1 and prompt.count("validation ") == 3


def test_data_sets_are_looked_for_inside_the_data_folder_only(tmp_path):
    """Whatever a task's file names; elsewhere it is for lm-eval to find it."""
    (tmp_path / "data" / "owner" / "name").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    folder = str(tmp_path / "data")
    assert _local_copy(folder, "owner/name") == tmp_path / "data" / "owner" / "name"
    for name in ("../outside", str(tmp_path / "outside"), "owner/../../outside", "nobody/name", "", None, 3):
        assert _local_copy(folder, name) is None
    assert _local_copy(None, "owner/name") is None
