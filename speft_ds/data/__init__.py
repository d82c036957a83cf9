"""Rows: from a file to batches of token ids."""
