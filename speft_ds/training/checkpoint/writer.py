"""Writing checkpoints while training goes on: the state is copied first, and one save at most is in flight.

Only the thread of a rank's own part runs beside training. That all parts are there is agreed in the main
thread, at the end of a step, and rank 0 then makes a checkpoint of them; so no collective call is ever made
beside another one.
"""

from __future__ import annotations

import time
from pathlib import Path
from threading import Thread

from speft_ds.comm import collectives
from speft_ds.config.train_config import TrainConfig
from speft_ds.errors import UserError
from speft_ds.training.checkpoint.folder import folder_of, prune, publish, temporary_of
from speft_ds.training.checkpoint.parts import Snapshot, write_part


class Save(Thread):
    """This rank's part of one checkpoint on its way to the disk.

    Attributes:
        manifest: of the checkpoint, without the lines of its parts.
        result: this part's line, or why it could not be written; None: it is being written.
    """

    def __init__(self, folder: Path, snapshot: Snapshot, manifest: dict):
        super().__init__(name=f"save of {folder.name}", daemon=True)
        self.folder, self.manifest = folder, manifest
        self.tensors, self.metadata = snapshot.tensors(collectives.rank(), collectives.world_size())
        self.result: dict | Exception | None = None

    def run(self) -> None:
        temporary = temporary_of(self.folder)
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            self.result = write_part(temporary, collectives.rank(), self.tensors, self.metadata)
        except Exception as error:  # whatever it is, the main thread has to hear of it
            self.result = error


class Writer:
    """The checkpoints of a run; every method but `is_written` is entered by all ranks.

    Args:
        run: the run folder.
        train: what to keep.
        saved: step of the checkpoint that the run goes on from; 0: none.
    Attributes:
        saved: step of the newest checkpoint; 0: there is none.
        seconds: that training waited for its checkpoints.
    """

    def __init__(self, run: Path, train: TrainConfig, saved: int = 0):
        self.run, self.train, self.saved = run, train, saved
        self.in_flight: Save | None = None
        self.seconds = 0.0

    def start(self, step: int, snapshot: Snapshot, manifest: dict) -> None:
        """Copy the state, and write it in the background. A save that is still in flight is waited for."""
        self.finish()
        start = time.perf_counter()
        facts = {"step": step, "world_size": collectives.world_size(), "state": snapshot.facts}
        self.in_flight = Save(folder_of(self.run, step), snapshot, {**manifest, **facts})
        self.in_flight.start()
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
        save, self.in_flight = self.in_flight, None
        save.join()
        step, results = save.manifest["step"], collectives.all_gather_objects(save.result)
        for rank, result in enumerate(results):
            if isinstance(result, Exception):
                raise self._cannot_write(step, f"rank {rank}: {result}") from result

        def make() -> None:
            try:
                publish(temporary_of(save.folder), save.folder, {**save.manifest, "parts": results})
            except OSError as error:
                raise self._cannot_write(step, str(error)) from error
            try:
                prune(save.folder, self.train)
            except OSError as error:  # the new checkpoint is complete: no reason to stop
                print(f"note: an old checkpoint could not be removed: {error}", flush=True)

        collectives.run_on_rank0(make)
        self.saved = step
        self.seconds += time.perf_counter() - start

    def _cannot_write(self, step: int, why: str) -> UserError:
        fix = "free space or raise the quota, then go on with --resume"
        what = f"cannot write the checkpoint of step {step}: {why}; {self.last()}"
        return UserError(what, str(self.run), fix)

    def last(self) -> str:
        """What there is to go back to, in words."""
        if not self.saved:
            return "there is no checkpoint yet"
        return f"the last complete checkpoint is {folder_of(self.run, self.saved)}"
