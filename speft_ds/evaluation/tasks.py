"""lm-eval's tasks by name, and their data sets from local files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from speft_ds.errors import UserError, shell
from speft_ds.untrusted import path_within

SPLITS = ("training_split", "validation_split", "fewshot_split")


def find_tasks(names: Sequence[str], include_path: str | None) -> TaskManager:
    """lm-eval's index of tasks, together with those of the folder `include_path`.

    Raises:
        UserError: lm-eval does not know one of the tasks and groups that are wanted.
    """
    if include_path:  # reading lm-eval's own 14,000 files takes seconds, on every rank
        own = TaskManager(include_path=include_path, include_defaults=False)
        if all(own.match_tasks([name]) for name in names):
            return own
    manager = TaskManager(include_path=include_path)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        fix = "see `lm-eval ls tasks`; tasks of your own need eval.include_path"
        raise UserError(f"lm-eval knows no task {', '.join(unknown)}", "eval.tasks", fix)
    return manager


@contextmanager
def local_data(folder: str | None) -> Iterator[list[str]]:
    """Inside the block, tasks read their data sets from `folder`/<hub id> where that exists.

    A local copy may have some of the splits only. Few-shot examples then come from a split that it has.

    Yields:
        notes on such tasks, added while they are loaded.
    Raises:
        UserError: a task's data set can be read neither there nor from the hub.
    """
    download, notes = ConfigurableTask.download, []

    def download_or_read(self: ConfigurableTask, dataset_kwargs: dict | None = None, **more: object) -> None:
        hub_id, local = str(self.DATASET_PATH), _local_copy(folder, self.DATASET_PATH)
        is_local = local is not None
        if is_local:
            self.DATASET_PATH = str(local)
        try:
            download(self, dataset_kwargs, **more)
        except Exception as error:  # any type: it depends on what `datasets` finds wrong
            raise _no_data(self.config.task, hub_id, folder, error) from error
        if is_local:
            notes.extend(_drop_missing_splits(self))

    ConfigurableTask.download = download_or_read
    try:
        yield notes
    finally:
        ConfigurableTask.download = download


def _local_copy(folder: str | None, hub_id: object) -> Path | None:
    """The folder of a data set below `folder`; a task's file may name anything."""
    try:
        local = None if folder is None else path_within(Path(folder), hub_id, subfolders=True)
    except ValueError:
        return None
    return local if local is not None and local.is_dir() else None


def _drop_missing_splits(task: ConfigurableTask) -> list[str]:
    """Have a task use the splits that its data set has; returns what to tell the user."""
    config, splits = task.config, task.dataset
    wanted = task.fewshot_cfg.split or config.training_split
    for key in SPLITS:
        if getattr(config, key) is not None and getattr(config, key) not in splits:
            setattr(config, key, None)
    if wanted is None or wanted in splits:
        return []
    # By name: only then does lm-eval keep a document out of its own examples.
    task.fewshot_cfg.split = config.training_split or config.validation_split or config.test_split
    examples = f"few-shot examples are of {task.fewshot_cfg.split}"
    return [f"{config.task}: {task.DATASET_PATH} has no split {wanted}: {examples}"]


def _no_data(task: str, hub_id: str, folder: str | None, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    words = ("--repo-type", "dataset", hub_id, "--local-dir", f"{folder or 'DATA'}/{hub_id}")
    fix = shell("hf", "download", *words)
    if folder is None:
        fix += ", where there is a network; then eval.data_dir=DATA"
    return UserError(f"the data of task {task} ({hub_id}) cannot be read: {reason}", "eval.data_dir", fix)
