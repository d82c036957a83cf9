"""Writing checkpoints while training goes on: the state is copied first, and one save at most is in flight.

Only the thread of a rank's own part runs beside training. That all parts are there is agreed in the main
thread, at the end of a step, and rank 0 then makes a checkpoint of them; so no collective call is ever made
beside another one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

from speft_ds.comm import collectives
from speft_ds.config.train_config import TrainConfig
from speft_ds.errors import UserError
from speft_ds.training.checkpoint.folder import folder_of, prune, publish, temporary_of
from speft_ds.training.checkpoint.parts import Snapshot, write_part


@dataclass
class Save:
    """One checkpoint on its way to the disk: this rank's part of it."""

    step: int
    manifest: dict
    thread: Thread
    result: dict | Exception | None = None


class Writer:
    """The checkpoints of a run; every method but `is_written` is entered by all ranks.

    Args:
        run: the run folder.
        recipe: the `train` section of its recipe: what to keep.
        saved: step of the checkpoint that the run goes on from; 0: none.
    Attributes:
        saved: step of the newest checkpoint; 0: there is none.
        seconds: that training waited for its checkpoints.
    """

    def __init__(self, run: Path, recipe: TrainConfig, saved: int = 0):
        self.run, self.recipe, self.saved = run, recipe, saved
        self.in_flight: Save | None = None
        self.seconds = 0.0

    def start(self, step: int, snapshot: Snapshot, manifest: dict) -> None:
        """Copy the state, and write it in the background. A save that is still in flight is waited for."""
        self.finish()
        start = time.perf_counter()
        rank, world_size = collectives.rank(), collectives.world_size()
        tensors, metadata = snapshot.tensors(rank, world_size)
        manifest = {**manifest, "step": step, "world_size": world_size, "state": snapshot.facts}
        temporary = temporary_of(folder_of(self.run, step))
        save = Save(step, manifest, Thread(name=f"save of step {step}", daemon=True))

        def write() -> None:
            try:
                temporary.mkdir(parents=True, exist_ok=True)
                save.result = write_part(temporary, rank, tensors, metadata)
            except Exception as error:  # whatever it is, the main thread has to hear of it
                save.result = error

        save.thread.run = write
        self.in_flight = save
        save.thread.start()
        self.seconds += time.perf_counter() - start

    @property
    def is_written(self) -> bool:
        """Whether this rank's part of the save in flight is on the disk, or failed to get there."""
        return self.in_flight is not None and self.in_flight.result is not None

    def finish(self) -> None:
        """Wait for the save in flight, if there is one, and make a checkpoint of its parts.

        Raises:
            UserError: on every rank, where one could not write; the older checkpoints stay valid.
        """
        if self.in_flight is None:
            return
        start = time.perf_counter()
        save = self.in_flight
        save.thread.join()
        self.in_flight = None
        results = collectives.all_gather_objects(save.result)
        failed = {rank: result for rank, result in enumerate(results) if isinstance(result, Exception)}
        if failed:
            rank, error = next(iter(failed.items()))
            raise self._cannot_write(save.step, f"rank {rank}: {error}") from error

        def make() -> None:
            folder = folder_of(self.run, save.step)
            try:
                publish(temporary_of(folder), folder, {**save.manifest, "parts": results})
            except OSError as error:
                raise self._cannot_write(save.step, str(error)) from error
            self._prune(folder)

        collectives.run_on_rank0(make)
        self.saved = save.step
        self.seconds += time.perf_counter() - start

    def _prune(self, newest: Path) -> None:
        recipe = self.recipe
        try:
            prune(newest, recipe.keep_last, recipe.keep_every, recipe.keep_best)
        except OSError as error:  # the new checkpoint is complete: no reason to stop
            print(f"note: an old checkpoint could not be removed: {error}", flush=True)

    def _cannot_write(self, step: int, why: str) -> UserError:
        fix = "free space or raise the quota, then go on with --resume"
        what = f"cannot write the checkpoint of step {step}: {why}; {self.last()}"
        return UserError(what, str(self.run), fix)

    def last(self) -> str:
        """What there is to go back to, in words."""
        if not self.saved:
            return "there is no checkpoint yet"
        return f"the last complete checkpoint is {folder_of(self.run, self.saved)}"
