"""Markdown tables, for the benchmarks."""

from __future__ import annotations


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """As markdown, columns aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
