"""The optimizers of the flat delta, gradient clipping and learning-rate schedules."""

from speft_ds.optimizer.adamw import AdamW
from speft_ds.optimizer.adamw_8bit import AdamW8bit
from speft_ds.optimizer.clipping import Clip, clip_factor, global_norm
from speft_ds.optimizer.flat import FlatOptimizer, Saved
from speft_ds.optimizer.lion import Lion
from speft_ds.optimizer.lr_schedule import lr_factor, make_lr_schedule
from speft_ds.optimizer.make import make_optimizer
from speft_ds.optimizer.sgd import SGD

__all__ = [
    "SGD",
    "AdamW",
    "AdamW8bit",
    "Clip",
    "FlatOptimizer",
    "Lion",
    "Saved",
    "clip_factor",
    "global_norm",
    "lr_factor",
    "make_lr_schedule",
    "make_optimizer",
]
