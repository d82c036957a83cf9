"""Gradient of the entries of a stack of experts: a backend for each expert that has entries."""

from __future__ import annotations

import torch
from torch import Tensor

from speft_ds.sparse.kernels.backends import DEFAULT_TOKENS, Backend, make_backend
from speft_ds.sparse.kernels.costs import KernelCosts
from speft_ds.sparse.tiles import Tiles


def make_stacked(
    name: str,
    index: Tensor,
    shape: tuple[int, int],
    tiles: Tiles,
    few_columns: bool,
    num_experts: int,
    costs: KernelCosts | None = None,
    num_tokens: int = DEFAULT_TOKENS,
) -> tuple[str, StackedGradient]:
    """Prepare the gradient of the entries of a stack; arguments and errors as of `make_backend`.

    Args:
        index: [k] sorted flat indices into all experts.
        shape: (experts x rows, columns).
        num_tokens: of all experts together.
    """
    rows, columns = shape[0] // num_experts, shape[1]
    # A column goes through all experts. Blocks that reach over two of them are no blocks of either: single
    # entries.
    height = rows if tiles.height == shape[0] else tiles.height
    own_tiles = Tiles((rows, columns), height, tiles.width) if rows % height == 0 else None
    edges = torch.arange(num_experts + 1, dtype=torch.int64, device=index.device) * (rows * columns)
    starts = torch.searchsorted(index.to(torch.int64), edges).tolist()
    names, backends = set(), {}
    how = (few_columns, costs, max(1, num_tokens // num_experts))
    for expert in range(num_experts):
        own = index[starts[expert] : starts[expert + 1]] - expert * rows * columns
        if own.numel():
            used, backends[expert] = make_backend(name, own, (rows, columns), own_tiles, *how)
            names.add(used)
    return "+".join(sorted(names)), StackedGradient(backends, starts)


class StackedGradient:
    """The backends of a stack's experts.

    Args:
        backends: expert -> its backend; only of those with entries.
        starts: expert -> where its entries start among those of the stack; and their number.
    """

    def __init__(self, backends: dict[int, Backend], starts: list[int]):
        self.backends, self.starts = backends, starts

    def __call__(self, columns: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
        """Values of the entries; those of an expert without tokens are 0.

        Args:
            columns, rows: [tokens, ...] factors of the gradients, sorted by expert; see
                `WeightGradHook`.
            ends: [experts] where each expert's tokens end.
        Returns:
            [k] fp32, in index order.
        """
        values = torch.zeros(self.starts[-1], dtype=torch.float32, device=columns.device)
        bounds = [0, *ends.tolist()]
        for expert, backend in self.backends.items():
            first, last = bounds[expert], bounds[expert + 1]
            if first < last:
                own = slice(self.starts[expert], self.starts[expert + 1])
                values[own] = backend(columns[first:last], rows[first:last])
        return values
