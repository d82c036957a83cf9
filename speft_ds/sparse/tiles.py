"""What is chosen as one: the tiles of a weight, that is, its blocks, rows or columns."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from speft_ds.comm import collectives
from speft_ds.zero.shards import shard_range

SUM_BITS = 61  # of the fixed-point sums, one less than would overflow


@dataclass(frozen=True)
class Tiles:
    """A weight cut into rectangles of `height` x `width`, numbered row by row of the grid that they form.

    Where the block size does not divide a weight, the blocks at its right and lower edge are smaller.
    """

    shape: tuple[int, int]  # (out, in) of the weight
    height: int
    width: int

    @classmethod
    def of(cls, granularity: str, block_size: int, shape: tuple[int, int]) -> Tiles:
        rows, columns = shape
        height, width = {
            "element": (1, 1),
            "block": (min(block_size, rows), min(block_size, columns)),
            "row": (1, columns),
            "column": (rows, 1),
        }[granularity]
        return cls(shape, height, width)

    @classmethod
    def of_mask(cls, granularity: str, block_size: int, shape: tuple[int, int], index: Tensor) -> Tiles:
        """As `of`; the entries [k] of a head or a channel are rows of one weight and columns of another."""
        if granularity in ("head", "channel"):
            granularity = "row" if cls.of("row", block_size, shape).are_full(index) else "column"
        return cls.of(granularity, block_size, shape)

    @property
    def grid(self) -> tuple[int, int]:
        return -(-self.shape[0] // self.height), -(-self.shape[1] // self.width)

    @property
    def num_tiles(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def largest(self) -> int:
        """Entries of a tile that is not at an edge."""
        return self.height * self.width

    def tile_of(self, index: Tensor) -> Tensor:
        """[n] flat indices into the weight -> [n] int64 tile numbers."""
        row, column = _divmod(index.to(torch.int64), self.shape[1])
        return row // self.height * self.grid[1] + column // self.width

    def sizes(self, tile: Tensor) -> Tensor:
        """[n] tile numbers -> [n] int64 entries of each."""
        row, column = _divmod(tile.to(torch.int64), self.grid[1])
        heights = (self.shape[0] - row * self.height).clamp_(max=self.height)
        return heights * (self.shape[1] - column * self.width).clamp_(max=self.width)

    def are_full(self, index: Tensor) -> bool:
        """Whether [k] sorted flat indices are every entry of each tile that they touch."""
        tile, counts = self.tile_of(index).unique(return_counts=True)
        return torch.equal(counts, self.sizes(tile))

    def entries(self, tile: Tensor) -> Tensor:
        """[n] tile numbers -> sorted int64 flat indices of all their entries."""
        row, column = _divmod(tile.to(torch.int64), self.grid[1])
        rows = row[:, None] * self.height + torch.arange(self.height, device=tile.device)
        columns = column[:, None] * self.width + torch.arange(self.width, device=tile.device)
        inside = (rows < self.shape[0])[:, :, None] & (columns < self.shape[1])[:, None, :]
        return (rows[:, :, None] * self.shape[1] + columns[:, None, :])[inside].sort().values


def _divmod(value: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
    quotient = value // divisor
    return quotient, value - quotient * divisor


def tile_scores(scores: dict[str, Tensor], tiles: dict[str, Tiles]) -> dict[str, Tensor]:
    """Mean score of the entries of each tile, sharded over the ranks as the elements of a weight are.

    A mean rather than a sum: the same order among full blocks, and it lets smaller edge blocks, or rows of
    unequal length, compete by what one entry is worth. The sums are taken in integers, so that they do not
    depend on how many ranks take part; the scores' resolution is 2^-SUM_BITS of all ranks' largest sum.

    Args:
        scores: weight -> [local elements] fp32 of this rank's shard, finite.
    Returns:
        weight -> [local tiles] fp32; this rank has the tiles `shard_range(num_tiles, rank, world_size)`.
    """
    shift = fixed_point_shift(largest_score(scores), max(tile.largest for tile in tiles.values()))
    return {name: local_means(score, tiles[name], shift) for name, score in scores.items()}


def largest_score(scores: dict[str, Tensor]) -> float:
    """The largest absolute value over all weights and ranks; 1 where all are 0."""
    largest = max((score.abs().max().item() for score in scores.values() if score.numel()), default=0.0)
    largest = torch.tensor([largest], dtype=torch.float64, device=collectives.device())
    return collectives.all_reduce_max(largest).item() or 1.0


def fixed_point_shift(largest: float, count: int) -> int:
    """The power of two by which scores up to `largest` are multiplied; no sum of `count` overflows."""
    return SUM_BITS - math.frexp(largest)[1] - math.frexp(count)[1]


def local_means(score: Tensor, tiles: Tiles, shift: int) -> Tensor:
    """`tile_scores` of one weight, whose scores are multiplied by 2^shift to be summed."""
    rank, world_size = collectives.rank(), collectives.world_size()
    numel = tiles.shape[0] * tiles.shape[1]
    start, stop = shard_range(numel, rank, world_size)
    fixed = (score.double() * 2.0**shift).round().to(torch.int64)
    size = -(-tiles.num_tiles // world_size)
    sums = torch.zeros(size * world_size, dtype=torch.int64, device=score.device)
    sums.index_add_(0, tiles.tile_of(torch.arange(start, stop, device=score.device)), fixed)
    own = collectives.all_to_all(sums.view(world_size, size).to(collectives.device())).sum(0)
    first, last = shard_range(tiles.num_tiles, rank, world_size)
    counts = tiles.sizes(torch.arange(first, last, device=own.device))
    mean = own[: last - first].double() * 2.0**-shift / counts
    return mean.to(score.device, torch.float32)
