"""Bodies of the monitor's tests, on every rank."""

import os

from speft_ds.comm import collectives
from speft_ds.training.metrics import Monitor

STEPS = (
    {"step": 1, "loss": 2.5, "grad_norm": None, "lr": 1e-3},
    {"step": 2, "loss": float("nan"), "grad_norm": 1.5, "lr": 9e-4, "scores": {"arc_easy acc": 0.5}},
    {"step": 3, "loss": 1.25, "grad_norm": 1.0, "lr": 8e-4, "validation_loss": 1.75},
)


def log_steps(recipe, folder):
    """Three steps on every rank, started as a run starts it."""
    made = []
    collectives.run_on_rank0(lambda: made.append(Monitor(recipe, folder)))
    monitor = made[0] if made else Monitor(recipe, folder)
    for values in STEPS:
        monitor.log(values["step"], values)
    monitor.close()
    monitor.close()  # a second time does nothing
    monitor.log(4, {"loss": 0.0})


def log_offline(recipe, folder):
    """As `log_steps`, without a W&B account."""
    folder.mkdir(exist_ok=True)
    os.environ["WANDB_MODE"] = "offline"
    log_steps(recipe, folder)


def start(recipe, folder):
    collectives.run_on_rank0(lambda: Monitor(recipe, folder))
