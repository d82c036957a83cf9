"""Kernels of the sparse weight gradient."""
