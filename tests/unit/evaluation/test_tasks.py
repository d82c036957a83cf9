"""Tasks by their stock names, with data from a folder."""

import datasets
import pytest
from lm_eval.tasks import TaskManager

from speft_ds.errors import UserError
from speft_ds.evaluation.tasks import find_tasks, local_data


@pytest.fixture
def manager(tmp_path):
    """A task whose data set is on the hub, in three splits."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "quiz.yaml").write_text(
        "task: quiz\ndataset_path: someone/quiz\ndataset_name: easy\noutput_type: multiple_choice\n"
        "training_split: train\nvalidation_split: validation\nfewshot_split: train\n"
        "doc_to_text: '{{q}}'\ndoc_to_target: 0\ndoc_to_choice: ['yes', 'no']\n"
        "metric_list:\n  - metric: acc\n"
    )
    return TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)


def write_split(hub, split):
    folder = hub / "someone" / "quiz" / "easy"
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list([{"q": f"{split} {i}"} for i in range(3)]).to_parquet(
        folder / f"{split}-00000-of-00001.parquet"
    )
    (folder.parent / "README.md").write_text(
        "---\nconfigs:\n- config_name: easy\n  data_files:\n"
        + "".join(
            f"  - split: {s}\n    path: easy/{s}-*\n"
            for s in ("train", "validation")
            if list(folder.glob(f"{s}-*"))
        )
        + "---\n"
    )


def load(manager, folder):
    with local_data(str(folder)) as notes:
        return manager.load(["quiz"])["tasks"]["quiz"], notes


def test_data_are_read_from_the_folder_by_their_hub_id(manager, tmp_path):
    for split in ("train", "validation"):
        write_split(tmp_path / "hub", split)
    task, notes = load(manager, tmp_path / "hub")
    assert [doc["q"] for doc in task.validation_docs()] == ["validation 0", "validation 1", "validation 2"]
    assert task.config.training_split == "train" and notes == []


def test_a_copy_without_the_training_split_still_scores(manager, tmp_path):
    write_split(tmp_path / "hub", "validation")
    task, notes = load(manager, tmp_path / "hub")
    assert not task.has_training_docs() and len(list(task.validation_docs())) == 3
    assert notes == [
        f"quiz: {tmp_path}/hub/someone/quiz has no split train: few-shot examples are of validation"
    ]


def test_data_that_are_nowhere_are_said_with_the_way_to_get_them(manager, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "hub").mkdir()
    with pytest.raises(UserError, match=r"the data of task quiz \(someone/quiz\) cannot be read") as caught:
        load(manager, tmp_path / "hub")
    assert caught.value.fix == (
        f"hf download --repo-type dataset someone/quiz --local-dir {tmp_path}/hub/someone/quiz"
    )


def test_an_unknown_task_is_refused(tmp_path):
    with pytest.raises(UserError, match="lm-eval knows no task arc_esay"):
        find_tasks(["arc_easy", "arc_esay"], None)


def test_a_document_is_never_its_own_example(manager, tmp_path):
    """Where only the split that is scored is there, lm-eval must know that the examples are of it."""
    write_split(tmp_path / "hub", "validation")
    tasks = tmp_path / "tasks" / "quiz.yaml"
    tasks.write_text(tasks.read_text().replace("validation_split: validation", "test_split: validation"))
    task, _ = load(TaskManager(include_path=str(tasks.parent), include_defaults=False), tmp_path / "hub")
    task.set_config("num_fewshot", 2)
    task.set_fewshot_seed(1234)
    for document in task.test_docs():
        prompt = task.fewshot_context(document, 2)
        assert prompt.count(document["q"]) == 1 and prompt.count("validation ") == 3
