"""Adapters: what a run learnt, on disk and on a model."""

from speft_ds.adapter.apply import apply_adapter, remove_adapter, switch_adapter
from speft_ds.adapter.format import Adapter, write_adapter
from speft_ds.adapter.save import save_adapter

__all__ = ["Adapter", "apply_adapter", "remove_adapter", "save_adapter", "switch_adapter", "write_adapter"]
