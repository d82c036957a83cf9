"""The CUDA backend for masks of single entries: a sampled dense-dense product (SDDMM) in Triton.

An entry is a dot product over the tokens, so x is transposed once, for all layers that have it. What bounds
the product is how often activations are moved from the L2 cache, not arithmetic: a feature of x an entry is
1.5 GB at 5120 x 5120, density 0.35% and 8,192 tokens, 0.3 ms of an H100. Two things keep it low:

- Rows come in groups of 16, 32 or 64. A feature of x that rows of a group have entries in is a slot: it is
  moved once for all of them, and grad_y is read as it lies, in whole sectors. The group size that moves least
  is chosen for each mask. Gradient masks crowd into columns: of SmolLM2-135M's at 0.5%, 0.2 (v_proj) to 1.2
  (gate_proj) features are moved an entry, of a uniform one 1.1.
- Slots are the rows of a tensor-core tile and the group its columns: most of a tile is computed in vain, and
  still in less time than it takes to move it.

Tokens are split so that x's part stays in the L2 cache; partial sums [splits, k] are added in order.

Reckoned, not measured: times as fast as the dense product on an H100, for a uniform mask and 8,192 tokens, in
brackets where x is transposed already (dense 600 TFLOP/s, L2 cache 5 TB/s, memory 2.5 TB/s):

    density          0.1%        0.35%       1%          dense
    5120 x 5120      4.2 (7.0)   1.7 (2.1)   0.7 (0.8)   0.72 ms
    13824 x 5120     5.6 (7.0)   1.9 (2.1)   0.8 (0.8)   1.93 ms
    1024 x 4096      1.6 (6.7)   1.1 (2.1)   0.6 (0.8)   0.11 ms
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from speft_ds.sparse.kernels import triton_launch
from speft_ds.sparse.kernels.transpose import SharedTranspose
from speft_ds.sparse.kernels.triton_launch import is_available

__all__ = ["ElementGradient", "is_available", "shared_transpose"]

GROUP_ROWS = (16, 32, 64)

shared_transpose = SharedTranspose(triton_launch.transpose)


@dataclass
class Slots:
    """A mask's entries in the order in which they are computed: by group of rows, column, row.

    Attributes:
        rows: rows of a group.
        order: [k] the entries' places in the index.
        entry_row: [k] uint8 row in the group.
        first: [slots + 1] a slot's first entry.
        column: [slots] int32.
        segment_first: [segments + 1] int32: a segment is up to SLOTS slots of one group.
        segment_group: [segments] int32.
        moved: features of x and grad_y moved for each token.
    """

    rows: int
    order: Tensor
    entry_row: Tensor
    first: Tensor
    column: Tensor
    segment_first: Tensor
    segment_group: Tensor
    moved: int

    @classmethod
    def of(cls, index: Tensor, in_features: int, rows: int, most_slots: int) -> Slots:
        """Lay out [k] sorted flat indices in groups of `rows` rows and segments of `most_slots`."""
        row = torch.div(index, in_features, rounding_mode="floor")
        group = torch.div(row, rows, rounding_mode="floor")
        key = group.to(torch.int64) * in_features + (index - row * in_features)
        key, order = key.sort(stable=True)
        slot, counts = key.unique_consecutive(return_counts=True)
        slot_group = torch.div(slot, in_features, rounding_mode="floor")
        segment_first, segment_group = _segments(slot_group, most_slots)
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


def _segments(slot_group: Tensor, most_slots: int) -> tuple[Tensor, Tensor]:
    """[slots] sorted groups -> ([segments + 1] first slot, [segments] group): equal parts of each group."""
    groups, sizes = slot_group.unique_consecutive(return_counts=True)
    parts = torch.div(sizes + most_slots - 1, most_slots, rounding_mode="floor")
    of = torch.repeat_interleave(torch.arange(groups.numel(), device=groups.device), parts)
    part = torch.arange(of.numel(), device=of.device) - _starts(parts)[of]
    first = _starts(sizes)[of] + torch.div(part * sizes[of], parts[of], rounding_mode="floor")
    return torch.cat([first, first.new_tensor([slot_group.numel()])]), groups[of]


class ElementGradient:
    """Sparse weight gradient of single entries on tensor cores.

    Keeps 5 bytes per entry and 8 per slot, beside the index.

    Attributes:
        pays: whether it should be faster than the dense product on an H100, by the traffic of this mask.

    Args:
        index: [k] sorted flat indices.
        shape: (out_features, in_features) of the weight.
    """

    def __init__(self, index: Tensor, shape: tuple[int, int]):
        self.shape, self.num_entries = shape, index.numel()
        layouts = (Slots.of(index, shape[1], rows, triton_launch.SLOTS) for rows in GROUP_ROWS)
        self.slots = min(layouts, key=lambda slots: slots.moved)
        # The transposed copy is read from memory and written, at half the cache's rate.
        self.pays = triton_launch.pays(self.slots.moved + 4 * shape[1], shape)

    def __call__(self, x: Tensor, grad_y: Tensor, x_t: Tensor | None = None) -> Tensor:
        """Values of the entries.

        Args:
            x: [..., in] activations, bf16, fp16 or fp32.
            grad_y: [..., out], in x's dtype.
            x_t: `triton_launch.transpose(x)` if it is there; else it is made, and kept for others of this x.
        Returns:
            [k] fp32, in index order.
        """
        from speft_ds.sparse.kernels import programs

        assert x.dtype == grad_y.dtype, f"activations in {x.dtype}, gradients in {grad_y.dtype}"
        if self.num_entries == 0:
            return torch.zeros(0, dtype=torch.float32, device=x.device)
        x_t = shared_transpose(x) if x_t is None else x_t
        grad_y = grad_y.reshape(-1, self.shape[0]).contiguous()
        tokens, slots = grad_y.shape[0], self.slots
        padded = -(-tokens // triton_launch.TOKENS) * triton_launch.TOKENS
        assert x_t.is_contiguous() and x_t.shape == (self.shape[1], padded), x_t.shape
        splits, length = triton_launch.split_tokens(tokens, self.shape[1], x.dtype.itemsize, self.num_entries)
        partial = torch.empty(splits, self.num_entries, dtype=torch.float32, device=x.device)
        # Segments vary fastest: what runs at a time shares one split's part of x.
        programs.slot_products[(slots.segment_group.numel(), splits)](
            x_t, grad_y, partial,
            slots.segment_first, slots.segment_group, slots.column, slots.first, slots.entry_row,
            tokens, padded, self.shape[0], self.num_entries, length,
            ROWS=slots.rows, **triton_launch.options(x.dtype),
        )  # fmt: skip
        return triton_launch.sum_over_splits(partial, slots.order)
