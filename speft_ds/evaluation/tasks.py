"""lm-eval's tasks by their names, and their data from local files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from speft_ds.errors import UserError

SPLITS = ("training_split", "validation_split", "fewshot_split")


def find_tasks(names: Sequence[str], include_path: str | None) -> TaskManager:
    """lm-eval's index of tasks, with those of a folder in it.

    Args:
        names: of tasks and groups that are wanted.
        include_path: a folder of task files.
    Raises:
        UserError: lm-eval does not know a task.
    """
    if include_path:  # reading all of lm-eval's own 14,000 files takes seconds, on every rank
        own = TaskManager(include_path=include_path, include_defaults=False)
        if all(own.match_tasks([name]) for name in names):
            return own
    manager = TaskManager(include_path=include_path)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise UserError(
            f"lm-eval knows no task {', '.join(unknown)}",
            where="eval.tasks",
            fix="see `lm-eval ls tasks`; tasks of your own need eval.include_path",
        )
    return manager


@contextmanager
def local_data(folder: str | None) -> Iterator[list[str]]:
    """Inside the block, tasks read their data sets from `folder`/<hub id> where that is there.

    Of a local copy that has some splits only, a task keeps those: few-shot examples come from what is left.

    Yields:
        what to tell of that, filled while tasks are loaded.
    Raises:
        UserError: a task's data can be read neither there nor from the hub.
    """
    download, notes = ConfigurableTask.download, []

    def look_there_first(self: ConfigurableTask, dataset_kwargs: dict | None = None, **more: object) -> None:
        hub_id, local = str(self.DATASET_PATH), Path(folder or "", str(self.DATASET_PATH))
        is_local = folder is not None and local.is_dir()
        if is_local:
            self.DATASET_PATH = str(local)
        try:
            download(self, dataset_kwargs, **more)
        except Exception as error:  # whatever `datasets` raises: it depends on what is wrong
            raise _no_data(self.config.task, hub_id, folder, error) from error
        if is_local:
            notes.extend(_leave_out_what_is_missing(self))

    ConfigurableTask.download = look_there_first
    try:
        yield notes
    finally:
        ConfigurableTask.download = download


def _leave_out_what_is_missing(task: ConfigurableTask) -> list[str]:
    """Point a task at the splits that are there; returns what to tell."""
    named = {split: getattr(task.config, split) for split in SPLITS}
    wanted = task.fewshot_cfg.split or named["training_split"]
    for split, name in named.items():
        if name is not None and name not in task.dataset:
            setattr(task.config, split, None)
    if wanted is None or wanted in task.dataset:
        return []
    left = task.config.training_split or task.config.validation_split or task.config.test_split
    # By name: only then does lm-eval keep a document out of its own examples.
    task.fewshot_cfg.split = left
    return [f"{task.config.task}: {task.DATASET_PATH} has no split {wanted}: few-shot examples are of {left}"]


def _no_data(task: str, hub_id: str, folder: str | None, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    fix = f"hf download --repo-type dataset {hub_id} --local-dir {folder or 'DATA'}/{hub_id}"
    return UserError(
        f"the data of task {task} ({hub_id}) cannot be read: {reason}",
        where="eval.data_dir",
        fix=fix if folder else f"{fix}, where there is a network; then eval.data_dir=DATA",
    )
