"""Optimizers of the flat delta, gradient clipping and learning-rate schedules."""
