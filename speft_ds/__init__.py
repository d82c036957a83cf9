"""Sparse fine-tuning of large language models on DeepSpeed ZeRO-3."""

import importlib

__version__ = "0.1.0"


def __getattr__(name: str):
    """`speft_ds.apply_adapter` and so on, loaded when asked for: recipes are checked without torch."""
    if name in ("apply_adapter", "remove_adapter", "switch_adapter"):
        return getattr(importlib.import_module("speft_ds.adapter.apply"), name)
    raise AttributeError(name)
