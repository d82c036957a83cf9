"""`train.stash`: which format what is saved for the backward has at each step.

`dynamic` starts with the fewest bits and takes the next format when the loss stops falling, as in dynamic
stashing quantization (Yang et al., 2023). It goes by the loss of the global batch, over all ranks, and so is
the same on all of them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from statistics import mean

from torch import nn

from speft_ds.config.train_config import STASH_FORMATS
from speft_ds.env import log_rank0
from speft_ds.model.codecs import codec
from speft_ds.model.stash import Stash

WINDOW = 20  # steps whose mean loss is compared with that of as many steps before
MIN_FALL = 0.01  # the share by which it must have fallen


@dataclass
class DynamicFormat:
    """The format of the moment, and the losses that the next one is chosen by.

    Attributes:
        losses: of the steps of this window so far.
        before: mean loss of the last window with this format; None: there was none.
    """

    name: str = STASH_FORMATS[0]
    losses: list[float] = field(default_factory=list)
    before: float | None = None

    def add(self, loss: float) -> bool:
        """Take in the loss of a step; returns whether another format follows."""
        if self.name == STASH_FORMATS[-1]:
            return False
        self.losses.append(loss)
        if len(self.losses) < WINDOW:
            return False
        now, self.losses = mean(self.losses), []
        falls = self.before is None or now < self.before - MIN_FALL * abs(self.before)
        self.before = now
        if falls:
            return False
        self.name, self.before = STASH_FORMATS[STASH_FORMATS.index(self.name) + 1], None
        return True


class TrainingStash:
    """The stash of a run, or none.

    Args:
        model: of the engine.
        asked: `train.stash`.
    """

    def __init__(self, model: nn.Module, asked: str | None):
        self.dynamic = DynamicFormat() if asked == "dynamic" else None
        name = self.dynamic.name if self.dynamic else asked
        self.stash = None if name is None else Stash(model, codec(name))

    def packing(self, num_tokens: int) -> AbstractContextManager:
        """Around the forward of a batch with so many tokens."""
        return nullcontext() if self.stash is None else self.stash.packing(num_tokens)

    def after_step(self, step: int, loss: float, skipped: bool) -> dict[str, str]:
        """Choose the next step's format, after step `step` (from 0); what the metrics say of this one."""
        if self.stash is None:
            return {}
        used = self.stash.codec.name
        if self.dynamic is not None and not skipped and self.dynamic.add(loss):
            self.stash.codec = codec(self.dynamic.name)
            log_rank0(f"stash: {self.dynamic.name} after step {step + 1}: the loss has stopped falling")
        return {"stash": used}

    def note_saved(self) -> None:
        """Say what the stash saves, after a forward."""
        if self.stash is None:
            return
        saved = self.stash.saved
        if not saved.packed:
            log_rank0("note: train.stash has no effect: the forward saves no activation for its backward")
            return
        before, after = saved.activations / 2**20, saved.packed / 2**20
        log_rank0(
            f"stash: activations of {before:,.1f} MiB are kept in {after:,.1f} MiB until their backward; "
            f"{saved.others / 2**20:,.1f} MiB are left as they are"
        )

    def facts(self) -> dict[str, int]:
        """Bytes of the last forward, for run.json; empty without a stash."""
        return {} if self.stash is None else asdict(self.stash.saved)

    def progress(self) -> dict | None:
        """What a resumed run goes on from, as JSON holds it."""
        return None if self.dynamic is None else asdict(self.dynamic)

    def restore(self, progress: dict | None) -> None:
        """Go on where `progress` was taken. Raises KeyError, TypeError, ValueError: it was not."""
        if self.dynamic is None:
            return
        losses, before = [float(loss) for loss in progress["losses"]], progress["before"]
        self.dynamic = DynamicFormat(progress["name"], losses, None if before is None else float(before))
        if self.dynamic.name not in STASH_FORMATS or len(losses) >= WINDOW:
            raise ValueError(f"no state of a dynamic stash: {progress!r:.100}")
        self.stash.codec = codec(self.dynamic.name)
