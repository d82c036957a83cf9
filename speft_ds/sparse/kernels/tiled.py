"""Backends for masks of full rows, columns or blocks: products of what the mask has, and of nothing else.

Rows and columns are one matrix product of gathered features, on any device. Blocks are Triton's, for CUDA: a
strip's blocks share rows of grad_y, and their columns, side by side, are the rows of a tensor-core tile.
Activations are read as they lie, each once for a full block's height: at density 0.35% and 16 x 16 blocks
less is moved from the L2 cache than the activations themselves have.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from speft_ds.sparse.kernels import triton_launch
from speft_ds.sparse.kernels.dense import matmul_fp32
from speft_ds.sparse.tiles import Tiles

MOST_ROWS = 64  # of a strip: a program's sums stay in registers


def is_tiled(index: Tensor, tiles: Tiles) -> bool:
    """Whether [k] sorted flat indices are full tiles: every entry of each tile that they touch."""
    tile, counts = tiles.tile_of(index).unique(return_counts=True)
    return torch.equal(counts, tiles.sizes(tile))


def make_tiled(index: Tensor, shape: tuple[int, int], tiles: Tiles):
    """The backend for an index of full tiles."""
    if tiles.width == shape[1]:
        return RowGradient(index, shape)
    return ColumnGradient(index, shape) if tiles.height == shape[0] else BlockGradient(index, shape, tiles)


class RowGradient:
    """Gradient of full rows.

    Attributes:
        pays: whether it should be faster than the dense product.

    Args:
        index: [k] sorted flat indices, full rows.
        shape: (out_features, in_features) of the weight.
    """

    def __init__(self, index: Tensor, shape: tuple[int, int]):
        self.rows = torch.div(index[:: shape[1]], shape[1], rounding_mode="floor")
        self.pays = 2 * self.rows.numel() <= shape[0]

    def __call__(self, x: Tensor, grad_y: Tensor) -> Tensor:
        chosen = grad_y.reshape(-1, grad_y.shape[-1])[:, self.rows]
        return matmul_fp32(chosen.t(), x.reshape(-1, x.shape[-1])).view(-1)


class ColumnGradient:
    """Gradient of full columns.

    Attributes:
        pays: whether it should be faster than the dense product.

    Args:
        index: [k] sorted flat indices, full columns.
        shape: (out_features, in_features) of the weight.
    """

    def __init__(self, index: Tensor, shape: tuple[int, int]):
        self.columns = index[: index.numel() // shape[0]].clone()  # of the first row, not a view of them all
        self.pays = 2 * self.columns.numel() <= shape[1]

    def __call__(self, x: Tensor, grad_y: Tensor) -> Tensor:
        chosen = x.reshape(-1, x.shape[-1])[:, self.columns]
        return matmul_fp32(grad_y.reshape(-1, grad_y.shape[-1]).t(), chosen).view(-1)


class BlockGradient:
    """Gradient of full blocks on tensor cores, in Triton.

    A segment of `segments` is (first row, rows, first slot, slots of the strip, strip's first block in
    `block_column`, strip's first entry); a slot is a column of a strip's blocks.

    Attributes:
        pays: whether it should be faster than the dense product on an H100, by the traffic of this mask.

    Args:
        index: [k] sorted flat indices, full blocks.
        shape: (out_features, in_features) of the weight.
        tiles: the weight cut into blocks.
    """

    def __init__(self, index: Tensor, shape: tuple[int, int], tiles: Tiles):
        self.shape, self.tiles, self.num_entries = shape, tiles, index.numel()
        rows = min(tiles.height, MOST_ROWS)
        self.rows = max(16, 1 << (rows - 1).bit_length())
        tile = tiles.tile_of(index).unique()
        self.block_column = (tile % tiles.grid[1]).to(torch.int32)
        segments = self._segments(tile.cpu(), rows)
        self.segments = torch.tensor(segments, dtype=torch.int64, device=index.device).view(-1, 6)
        # Powers of two that divide where blocks and rows of activations start: so wide may loads be.
        self.column_align = math.gcd(tiles.width, shape[1], 16)
        self.row_align = math.gcd(tiles.height, rows, 16)
        moved = sum(
            min(slots - slot, triton_launch.SLOTS) + self.rows for _, _, slot, slots, _, _ in segments
        )
        self.pays = triton_launch.pays(moved, shape)

    def _segments(self, tile: Tensor, rows: int) -> list[tuple[int, ...]]:
        """[blocks] sorted tile numbers, strips of up to `rows` rows -> the segments."""
        out_features, in_features = self.shape
        blocks, counts = torch.div(tile, self.tiles.grid[1], rounding_mode="floor").unique(return_counts=True)
        last_column = tile % self.tiles.grid[1] == self.tiles.grid[1] - 1
        overhang = self.tiles.grid[1] * self.tiles.width - in_features
        segments, block, entry = [], 0, 0
        for number, count in zip(blocks.tolist(), counts.tolist(), strict=True):
            slots = count * self.tiles.width - (overhang if last_column[block + count - 1] else 0)
            stop = min((number + 1) * self.tiles.height, out_features)
            for row in range(number * self.tiles.height, stop, rows):
                strip = min(rows, stop - row)
                for slot in range(0, slots, triton_launch.SLOTS):
                    segments.append((row, strip, slot, slots, block, entry))
                entry += strip * slots
            block += count
        return segments

    def __call__(self, x: Tensor, grad_y: Tensor) -> Tensor:
        """Values of the entries.

        Args:
            x: [..., in] activations, bf16, fp16 or fp32.
            grad_y: [..., out], in x's dtype.
        Returns:
            [k] fp32, in index order.
        """
        from speft_ds.sparse.kernels import programs

        assert x.dtype == grad_y.dtype, f"activations in {x.dtype}, gradients in {grad_y.dtype}"
        if self.num_entries == 0:
            return torch.zeros(0, dtype=torch.float32, device=x.device)
        out_features, in_features = self.shape
        x, grad_y = x.reshape(-1, in_features).contiguous(), grad_y.reshape(-1, out_features).contiguous()
        tokens = x.shape[0]
        splits, length = triton_launch.split_tokens(tokens, in_features, x.dtype.itemsize, self.num_entries)
        partial = torch.empty(splits, self.num_entries, dtype=torch.float32, device=x.device)
        programs.block_products[(self.segments.shape[0], splits)](
            x, grad_y, partial, self.segments, self.block_column,
            tokens, in_features, out_features, self.num_entries, length,
            WIDTH=self.tiles.width, COLUMN_ALIGN=self.column_align, ROW_ALIGN=self.row_align, ROWS=self.rows,
            **triton_launch.options(x.dtype),
        )  # fmt: skip
        return triton_launch.sum_over_splits(partial)
