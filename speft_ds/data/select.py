"""The rows that are trained on: `data.select`. Imports no torch by itself."""

from __future__ import annotations

from collections.abc import Sequence

from speft_ds.config.data_config import DataConfig
from speft_ds.data.dataset import Row
from speft_ds.errors import UserError


def select_rows(
    rows: Sequence[Row], texts: Sequence[tuple[str, str]], data: DataConfig, seed: int
) -> set[int]:
    """Numbers of the rows that `data.select` takes.

    Args:
        rows: of all sources together.
        texts: (prompt, response) of each; used by `ifd` alone.
        seed: of the recipe, for `random`.
    Raises:
        UserError: there are fewer than `data.select_rows`.
    """
    count = data.select_rows
    if count > len(rows):
        what = f"data.select_rows={count} is more than the {len(rows)} rows there are"
        raise UserError(what, "data.select_rows", f"data.select_rows={len(rows)}, or data.select=all")
    if data.select == "longest":
        # By tokens of the response (Zhao et al., "Long Is More for Alignment", 2024); ties by position.
        return set(sorted(range(len(rows)), key=lambda number: -rows[number].num_labels)[:count])
    if data.select == "random":
        from speft_ds.data.sampler import permutation

        return set(permutation(len(rows), seed, "select")[:count])
    from speft_ds.data.ifd import choose, ifd_scores  # late: it imports torch

    return set(choose(ifd_scores(texts, data.scorer), count))
