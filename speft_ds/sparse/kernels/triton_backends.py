"""CUDA backends in Triton, for masks of single entries and of full blocks; this imports no Triton.

What bounds them is how often activations are moved from the L2 cache, not arithmetic. Tokens are split so
that x's part stays in that cache; partial sums [splits, k] are added in order.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from speft_ds.sparse.kernels.torch_backends import SharedTranspose
from speft_ds.sparse.tiles import Tiles

STEP_TOKENS = 64  # of one step: 128 bytes of 16-bit activations, a whole cache line
SLOTS = 128  # columns of the weight that one program takes
SUM_BLOCK = 1024
GROUP_ROWS = (16, 32, 64)
MOST_ROWS = 64  # of a strip of blocks: a program's sums stay in registers
# Tokens are split so that the part of x that all running programs share stays in the L2 cache, 50 MB on an
# H100. A split costs 8 bytes per entry, written and read once, hence a least length and a largest buffer.
SLAB_BYTES = 2**24
LEAST_TOKENS = 512
MOST_PARTIAL = 2**26
# Dense multiply-adds that an H100 does in the time in which it moves one bf16 number from its L2 cache:
# 300 T/s over 2.5 T/s. Not measured.
BREAK_EVEN = 120


def is_available() -> bool:
    """Whether Triton is installed and there is a GPU that programs are made for: NVIDIA's, 8.0 or later."""
    if importlib.util.find_spec("triton") is None or not torch.cuda.is_available():
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0)


def options(dtype: torch.dtype) -> dict[str, int]:
    """Launch options of the products: as many tokens and stages as shared memory holds on an A10 (99 KiB)."""
    if dtype.itemsize == 2:
        return {"SLOTS": SLOTS, "TOKENS": STEP_TOKENS, "num_warps": 4, "num_stages": 3}
    return {"SLOTS": SLOTS, "TOKENS": STEP_TOKENS // 2, "num_warps": 4, "num_stages": 2}


def split_tokens(tokens: int, features: int, itemsize: int, num_entries: int) -> tuple[int, int]:
    """(splits, tokens of each but the last, a multiple of STEP_TOKENS)."""
    least = max(LEAST_TOKENS, SLAB_BYTES // (features * itemsize))
    splits = max(1, min(-(-tokens // least), MOST_PARTIAL // max(1, num_entries)))
    length = max(1, -(-tokens // (splits * STEP_TOKENS))) * STEP_TOKENS
    return max(1, -(-tokens // length)), length


def transpose(x: Tensor) -> Tensor:
    """[..., features] -> [features, tokens] in x's dtype; tokens padded with zeros to whole STEP_TOKENS."""
    from speft_ds.sparse.kernels import triton_programs

    x = x.reshape(-1, x.shape[-1]).contiguous()
    tokens, features = x.shape
    padded = -(-tokens // STEP_TOKENS) * STEP_TOKENS
    x_t = torch.empty(features, padded, dtype=x.dtype, device=x.device)
    grid = (padded // STEP_TOKENS, -(-features // STEP_TOKENS))
    if x_t.numel():
        triton_programs.transpose_tile[grid](
            x, x_t, tokens, features, padded, TOKENS=STEP_TOKENS, FEATURES=STEP_TOKENS
        )
    return x_t


shared_transpose = SharedTranspose(transpose)


def sum_over_splits(partial: Tensor, order: Tensor | None = None) -> Tensor:
    """[splits, k] fp32 -> [k]: added over the splits in their order; entry e goes to place order[e], or e."""
    from speft_ds.sparse.kernels import triton_programs

    splits, num_entries = partial.shape
    if splits == 1 and order is None:
        return partial[0]
    ordered = order is not None
    values = torch.empty(num_entries, dtype=torch.float32, device=partial.device)
    triton_programs.sum_splits[(-(-num_entries // SUM_BLOCK),)](
        partial, values, order if ordered else partial, num_entries, splits, ORDERED=ordered, BLOCK=SUM_BLOCK
    )
    return values


@dataclass
class Slots:
    """A mask's entries in the order in which they are computed: by group of rows, column, row."""

    rows: int  # of a group
    order: Tensor  # [k] the entries' places in the index
    entry_row: Tensor  # [k] uint8 row in the group
    first: Tensor  # [slots + 1] a slot's first entry
    column: Tensor  # [slots] int32
    segment_first: Tensor  # [segments + 1] int32: a segment is up to SLOTS slots of one group
    segment_group: Tensor  # [segments] int32
    moved: int  # features of x and grad_y moved for each token

    @classmethod
    def of(cls, index: Tensor, in_features: int, rows: int) -> Slots:
        """Lay out [k] sorted flat indices in groups of `rows` rows."""
        row = torch.div(index, in_features, rounding_mode="floor")
        group = torch.div(row, rows, rounding_mode="floor")
        key = group.to(torch.int64) * in_features + (index - row * in_features)
        key, order = key.sort(stable=True)
        slot, counts = key.unique_consecutive(return_counts=True)
        slot_group = torch.div(slot, in_features, rounding_mode="floor")
        segment_first, segment_group = _segments(slot_group)
        narrow = torch.int32 if index.numel() < 2**31 else torch.int64
        return cls(
            rows,
            order.to(narrow),
            (row % rows).to(torch.uint8)[order],
            _starts(counts).to(narrow),
            (slot - slot_group * in_features).to(torch.int32),
            segment_first.to(torch.int32),
            segment_group.to(torch.int32),
            slot.numel() + segment_group.numel() * rows,
        )


def _starts(counts: Tensor) -> Tensor:
    """[n] -> [n + 1]: where each starts, and the end."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _segments(slot_group: Tensor) -> tuple[Tensor, Tensor]:
    """[slots] sorted groups -> ([segments + 1] first slot, [segments] group): equal parts of each group."""
    groups, sizes = slot_group.unique_consecutive(return_counts=True)
    parts = torch.div(sizes + SLOTS - 1, SLOTS, rounding_mode="floor")
    of = torch.repeat_interleave(torch.arange(groups.numel(), device=groups.device), parts)
    part = torch.arange(of.numel(), device=of.device) - _starts(parts)[of]
    first = _starts(sizes)[of] + torch.div(part * sizes[of], parts[of], rounding_mode="floor")
    return torch.cat([first, first.new_tensor([slot_group.numel()])]), groups[of]


class ElementGradient:
    """Gradient of single entries on tensor cores: a sampled dense-dense product (SDDMM).

    An entry is a dot product over the tokens, so x is transposed once, for all layers that have it. A feature
    of x an entry is 1.5 GB at 5120 x 5120, density 0.35% and 8,192 tokens, 0.3 ms of an H100. Two things keep
    what is moved low:

    - Rows come in groups of 16, 32 or 64. A feature of x that rows of a group have entries in is a slot: it
      is moved once for all of them, and grad_y is read as it lies, in whole sectors. The group size that
      moves least is chosen for each mask. Gradient masks crowd into columns: of SmolLM2-135M's at 0.5%, 0.2
      (v_proj) to 1.2 (gate_proj) features are moved an entry, of a uniform one 1.1.
    - Slots are the rows of a tensor-core tile and the group its columns: most of a tile is computed in vain,
      and still in less time than it takes to move it.

    Reckoned, not measured: times as fast as the dense product on an H100, for a uniform mask and 8,192
    tokens, in brackets where x is transposed already (dense 600 TFLOP/s, L2 cache 5 TB/s, memory 2.5 TB/s):

        density          0.1%        0.35%       1%          dense
        5120 x 5120      4.2 (7.0)   1.7 (2.1)   0.7 (0.8)   0.72 ms
        13824 x 5120     5.6 (7.0)   1.9 (2.1)   0.8 (0.8)   1.93 ms
        1024 x 4096      1.6 (6.7)   1.1 (2.1)   0.6 (0.8)   0.11 ms

    Keeps 5 bytes per entry and 8 per slot, beside the index.

    Attributes:
        load: features moved per token over the elements of the weight.
        pays: whether it should be faster than the dense product on an H100, by this traffic.

    Args:
        index: [k] sorted flat indices.
        shape: (out_features, in_features) of the weight.
    """

    def __init__(self, index: Tensor, shape: tuple[int, int]):
        self.shape, self.num_entries = shape, index.numel()
        layouts = (Slots.of(index, shape[1], rows) for rows in GROUP_ROWS)
        self.slots = min(layouts, key=lambda slots: slots.moved)
        # The transposed copy is read from memory and written, at half the cache's rate.
        self.load = (self.slots.moved + 4 * shape[1]) / (shape[0] * shape[1])
        self.pays = self.load * BREAK_EVEN < 1

    def __call__(self, x: Tensor, grad_y: Tensor, x_t: Tensor | None = None) -> Tensor:
        """Values of the entries.

        Args:
            x: [..., in] activations, bf16, fp16 or fp32.
            grad_y: [..., out], in x's dtype.
            x_t: `transpose(x)` if it is there; else it is made, and kept for others of this x.
        Returns:
            [k] fp32, in index order.
        """
        from speft_ds.sparse.kernels import triton_programs

        assert x.dtype == grad_y.dtype, f"activations in {x.dtype}, gradients in {grad_y.dtype}"
        if self.num_entries == 0:
            return torch.zeros(0, dtype=torch.float32, device=x.device)
        x_t = shared_transpose(x) if x_t is None else x_t
        grad_y = grad_y.reshape(-1, self.shape[0]).contiguous()
        tokens, slots = grad_y.shape[0], self.slots
        padded = -(-tokens // STEP_TOKENS) * STEP_TOKENS
        assert x_t.is_contiguous() and x_t.shape == (self.shape[1], padded), x_t.shape
        splits, length = split_tokens(tokens, self.shape[1], x.dtype.itemsize, self.num_entries)
        partial = torch.empty(splits, self.num_entries, dtype=torch.float32, device=x.device)
        # Segments vary fastest: what runs at a time shares one split's part of x.
        triton_programs.slot_products[(slots.segment_group.numel(), splits)](
            x_t, grad_y, partial,
            slots.segment_first, slots.segment_group, slots.column, slots.first, slots.entry_row,
            tokens, padded, self.shape[0], self.num_entries, length,
            ROWS=slots.rows, **options(x.dtype),
        )  # fmt: skip
        return sum_over_splits(partial, slots.order)


class BlockGradient:
    """Gradient of full blocks on tensor cores.

    A strip's blocks share rows of grad_y, and their columns, side by side, are the rows of a tensor-core
    tile. Activations are read as they lie, each once for a full block's height: at density 0.35% and 16 x 16
    blocks less is moved from the L2 cache than the activations themselves have.

    A segment of `segments` is (first row, rows, first slot, slots of the strip, strip's first block in
    `block_column`, strip's first entry); a slot is a column of a strip's blocks.

    Attributes:
        load: features moved per token over the elements of the weight.
        pays: whether it should be faster than the dense product on an H100, by this traffic.

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
        moved = sum(min(slots - slot, SLOTS) + self.rows for _, _, slot, slots, _, _ in segments)
        self.load = moved / (shape[0] * shape[1])
        self.pays = self.load * BREAK_EVEN < 1

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
                for slot in range(0, slots, SLOTS):
                    segments.append((row, strip, slot, slots, block, entry))
                entry += strip * slots
            block += count
        return segments

    def __call__(self, x: Tensor, grad_y: Tensor) -> Tensor:
        """Values of the entries, as those of `ElementGradient`."""
        from speft_ds.sparse.kernels import triton_programs

        assert x.dtype == grad_y.dtype, f"activations in {x.dtype}, gradients in {grad_y.dtype}"
        if self.num_entries == 0:
            return torch.zeros(0, dtype=torch.float32, device=x.device)
        out_features, in_features = self.shape
        x, grad_y = x.reshape(-1, in_features).contiguous(), grad_y.reshape(-1, out_features).contiguous()
        tokens = x.shape[0]
        splits, length = split_tokens(tokens, in_features, x.dtype.itemsize, self.num_entries)
        partial = torch.empty(splits, self.num_entries, dtype=torch.float32, device=x.device)
        triton_programs.block_products[(self.segments.shape[0], splits)](
            x, grad_y, partial, self.segments, self.block_column,
            tokens, in_features, out_features, self.num_entries, length,
            WIDTH=self.tiles.width, COLUMN_ALIGN=self.column_align, ROW_ALIGN=self.row_align, ROWS=self.rows,
            **options(x.dtype),
        )  # fmt: skip
        return sum_over_splits(partial)
