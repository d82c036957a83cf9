"""The Triton programs of the CUDA backends; importing this module imports Triton.

Offsets are 64-bit: tokens times features may exceed 2^31. Sums over tokens have one order, and every value is
written by one program: two runs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def transpose_tile(x, x_t, tokens, features, padded, TOKENS: tl.constexpr, FEATURES: tl.constexpr):
    """x [tokens, features] -> x_t [features, padded], zero beyond the last token."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    inside = (token < tokens)[:, None] & (feature < features)[None, :]
    tile = tl.load(x + token.to(tl.int64)[:, None] * features + feature[None, :], inside, other=0.0)
    there = x_t + feature.to(tl.int64)[:, None] * padded + token[None, :]
    tl.store(there, tl.trans(tile), (feature < features)[:, None])


@triton.jit
def slot_products(
    x_t,  # [in, padded]
    grad_y,  # [tokens, out]
    partial,  # [splits, k] fp32
    segment_first,  # [segments + 1] slots
    segment_group,  # [segments] group of ROWS rows
    slot_column,  # [slots]
    slot_first,  # [slots + 1] entries
    entry_row,  # [k] row in its group
    tokens,
    padded,
    out_features,
    num_entries,
    tokens_per_split,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Products of a segment's slots with its group of rows, over one split of the tokens, at its entries."""
    segment, split = tl.program_id(0), tl.program_id(1)
    slot = tl.load(segment_first + segment) + tl.arange(0, SLOTS)
    used = slot < tl.load(segment_first + segment + 1)
    column = tl.load(slot_column + slot, used, other=0).to(tl.int64)
    row = tl.load(segment_group + segment) * ROWS + tl.arange(0, ROWS)
    start = split * tokens_per_split
    sums = tl.zeros([SLOTS, ROWS], tl.float32)
    for first_token in range(start, min(start + tokens_per_split, padded), TOKENS):
        token = first_token + tl.arange(0, TOKENS)
        left = tl.load(x_t + column[:, None] * padded + token[None, :], used[:, None], other=0.0)
        there = (token < tokens)[:, None] & (row < out_features)[None, :]
        right = tl.load(grad_y + token.to(tl.int64)[:, None] * out_features + row[None, :], there, other=0.0)
        sums = tl.dot(left, right, sums, input_precision="ieee")
    first = tl.load(slot_first + slot, used, other=0)
    count = tl.load(slot_first + slot + 1, used, other=0) - first
    partial += split.to(tl.int64) * num_entries
    for number in range(0, tl.max(count, 0)):  # the slots' first entries, their second ones, ...
        inside = number < count
        wanted = tl.load(entry_row + first + number, inside, other=0).to(tl.int32)
        chosen = tl.where(wanted[:, None] == tl.arange(0, ROWS)[None, :], sums, 0.0)
        tl.store(partial + first + number, tl.sum(chosen, 1), inside)


@triton.jit
def block_products(
    x,  # [tokens, in]
    grad_y,  # [tokens, out]
    partial,  # [splits, k] fp32
    segments,  # [segments, 6] int64, see triton_backends.BlockGradient
    block_column,  # [blocks] in tiles of WIDTH
    tokens,
    in_features,
    out_features,
    num_entries,
    tokens_per_split,
    WIDTH: tl.constexpr,
    COLUMN_ALIGN: tl.constexpr,
    ROW_ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Products of up to SLOTS columns of a strip's blocks with its rows over one split of the tokens."""
    segment, split = segments + tl.program_id(0) * 6, tl.program_id(1)
    first_row, num_rows = tl.multiple_of(tl.load(segment), ROW_ALIGN), tl.load(segment + 1)
    first_slot, num_slots = tl.load(segment + 2), tl.load(segment + 3)
    block, first_entry = tl.load(segment + 4), tl.load(segment + 5)
    slot = first_slot + tl.arange(0, SLOTS)
    used = slot < num_slots
    column = tl.load(block_column + block + slot // WIDTH, used, other=0).to(tl.int64) * WIDTH + slot % WIDTH
    # Unused slots read some column rather than being masked: a mask would forbid wide loads.
    column = tl.where(used, column, slot % COLUMN_ALIGN)
    column = tl.max_contiguous(tl.multiple_of(column, COLUMN_ALIGN), COLUMN_ALIGN)
    row = first_row + tl.arange(0, ROWS)
    start = split * tokens_per_split
    sums = tl.zeros([SLOTS, ROWS], tl.float32)
    for first_token in range(start, min(start + tokens_per_split, tokens), TOKENS):
        token = (first_token + tl.arange(0, TOKENS)).to(tl.int64)
        there = (token < tokens)[:, None]
        left = tl.load(x + token[:, None] * in_features + column[None, :], there, other=0.0)
        inside = there & (row < out_features)[None, :]
        right = tl.load(grad_y + token[:, None] * out_features + row[None, :], inside, other=0.0)
        sums = tl.dot(tl.trans(left), right, sums, input_precision="ieee")
    number = tl.arange(0, ROWS)
    entry = first_entry + number[None, :] * num_slots + slot[:, None]
    partial += split.to(tl.int64) * num_entries
    tl.store(partial + entry, sums, used[:, None] & (number < num_rows)[None, :])


@triton.jit
def sum_splits(partial, values, order, num_entries, num_splits, ORDERED: tl.constexpr, BLOCK: tl.constexpr):
    """values[order] = partial [splits, k] summed over the splits, first to last."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < num_entries
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, num_splits):
        total += tl.load(partial + entry, inside, other=0.0)
        partial += num_entries
    where = tl.load(order + entry, inside, other=0) if ORDERED else entry
    tl.store(values + where, total, inside)
