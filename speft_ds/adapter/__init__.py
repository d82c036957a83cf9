"""Adapters: what a run learned, on disk and on a model."""
