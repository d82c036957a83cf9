"""What a rank of a live run is made to suffer: hooks that it calls before it starts.

A hook is picklable: a function of this module, or a `functools.partial` of one.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from limits import HANG_S

sockets: list[socket.socket] = []  # open for the life of the process


def _before_step(number: int, action: Callable) -> None:
    """Have the run call action(trainer) before step `number` (from 1)."""
    from speft_ds.training.trainer import Trainer

    train_step = Trainer.train_step

    def step_with(self, step):
        if step + 1 == number:
            action(self)
        return train_step(self, step)

    Trainer.train_step = step_with


def raises() -> None:
    _before_step(6, _boom)


def raises_in_a_backward() -> None:
    def spoil(trainer):
        trainer.gradient.add = lambda *_: _boom(trainer)

    _before_step(6, spoil)


def _boom(trainer) -> None:
    while trainer.writer.in_flight and not trainer.writer.is_written:
        time.sleep(0.01)
    raise RuntimeError("boom")


def hangs() -> None:
    _before_step(4, lambda trainer: time.sleep(2 * HANG_S))


def writes_step_8_at_once() -> None:
    """This rank's part of the save of step 8 is on the disk before step 9, which then publishes it."""
    _before_step(9, lambda trainer: trainer.writer.in_flight.join())


def dies_after_step_9() -> None:
    writes_step_8_at_once()
    _before_step(10, lambda trainer: os.kill(os.getpid(), signal.SIGKILL))


def nan_in_steps(first: int, last: int) -> None:
    """Make the loss of this rank NaN in these steps (from 1)."""
    from speft_ds.training.trainer import Trainer

    train_step = Trainer.train_step

    def step_with(self, step):
        context, objective = self.context, self.context.objective

        def spoilt(*arguments):
            loss, num_correct = objective(*arguments)
            in_training = len(arguments) == 2  # scoring gives a temperature, too
            return (loss * math.nan if in_training and first <= step + 1 <= last else loss), num_correct

        self.context = replace(context, objective=spoilt)
        try:
            return train_step(self, step)
        finally:
            self.context = context

    Trainer.train_step = step_with


def infinite_gradient_in_step_6() -> None:
    """The loss is finite, one entry of the gradient of this rank is not."""

    def spoil(trainer):
        trainer.schedule.gradient.own[0] = math.inf

    _before_step(6, spoil)


def short_wait() -> None:
    from speft_ds.training import run_dir

    run_dir.LOCK_WAIT_S = 1.0


def asked_in_step(number: int, signal_number: int) -> None:
    """A signal to this rank in step `number` (from 1), which it has heard of before the step begins."""

    def ask(trainer):
        os.kill(os.getpid(), signal_number)
        _until_asked()

    _before_step(number, ask)


def _until_asked() -> None:
    from speft_ds.comm import signals

    deadline = time.monotonic() + HANG_S
    while signals.stop_reason() is None:
        assert time.monotonic() < deadline, "nobody asked this rank to stop"
        time.sleep(0.01)


def _asked_in(owner, name: str, what: str, when: Callable[..., bool] | None = None) -> None:
    """This rank says what it is about to do, and waits to be asked to stop, before `owner.name` is called."""
    call = getattr(owner, name)

    def asked(*arguments, **named):
        if when is None or when(*arguments, **named):
            print(what, flush=True)
            _until_asked()
        return call(*arguments, **named)

    setattr(owner, name, asked)


def asked_while_loading() -> None:
    from speft_ds.training import trainer

    _asked_in(trainer, "load_context", "loading")


def asked_while_selecting() -> None:
    """When the mask is chosen anew."""
    from speft_ds.training import trainer

    _asked_in(trainer, "choose_mask", "choosing anew", lambda context, timings, number=0: number > 0)


def asked_while_scoring() -> None:
    from speft_ds.evaluation.runner import EvalRunner

    _asked_in(EvalRunner, "slice_scores", "scoring a slice")


def endless_steps() -> None:
    """From the first checkpoint on."""
    from speft_ds.training.checkpoint.folder import list_checkpoints
    from speft_ds.training.trainer import Trainer

    step = Trainer.train_step

    def endless(self, number):
        if any(checkpoint.problem is None for checkpoint in list_checkpoints(self.folder)):
            print("an endless step", flush=True)
            time.sleep(2 * HANG_S)
        return step(self, number)

    Trainer.train_step = endless


def port_is_taken() -> None:
    sockets.append(socket.create_server(("", int(os.environ["MASTER_PORT"]))))


def stale_build_lock() -> None:
    """The compiled op in a folder of its own, with the lock of a build that was killed an hour ago."""
    compiled = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    own = Path(tempfile.mkdtemp()) / "extensions"
    shutil.copytree(compiled, own)
    (own / "deepspeed_shm_comm" / "lock").touch()
    os.utime(own / "deepspeed_shm_comm" / "lock", (time.time() - 3600,) * 2)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(own)


def answers_for_the_hardware(multiplies_bfloat16: bool) -> None:
    from speft_ds.model import dtype

    dtype.multiplies_bfloat16 = lambda device: multiplies_bfloat16
