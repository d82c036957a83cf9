"""Sparse fine-tuning of large language models on DeepSpeed ZeRO-3."""

__version__ = "0.1.0"


def __getattr__(name: str):
    """`speft_ds.apply_adapter`, loaded when asked for: recipes are checked without importing torch."""
    if name == "apply_adapter":
        from speft_ds.adapter import apply_adapter

        return apply_adapter
    raise AttributeError(name)
