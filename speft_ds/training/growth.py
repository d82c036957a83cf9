"""Which entries a mask grows by: two estimates of the gradient outside the mask (Ansell et al., 2024)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from speft_ds.comm import collectives
from speft_ds.model.linear import WeightGradHook
from speft_ds.selection.calibration import ShardSum, weight_gradient
from speft_ds.selection.radix import Groups
from speft_ds.selection.topk import gather_mask, groups_by, select_local
from speft_ds.sparse.gradient import GradientOptions, SparseGradient
from speft_ds.sparse.layout import EntryTable, RankShards
from speft_ds.sparse.mask import Mask
from speft_ds.sparse.state import SparseState
from speft_ds.training.checkpoint.parts import Parts
from speft_ds.zero.shards import full_shape, own_elements, own_range

Shape = dict[str, tuple[int, int]]  # weight -> (out, in)
Chosen = tuple[dict[str, Tensor], list[int]]  # weight -> local indices to grow; how many in each group


class Growth:
    """A growth criterion. `drop_grow` calls the methods in this order within a step."""

    is_ready = True  # it has seen what `select` goes by

    def hook(self, name: str, steps_left: int | None) -> WeightGradHook | None:
        """What looks at a weight's backward; the mask changes after `steps_left` steps, or not any more."""

    def on_gradient(self, state: SparseState, gradient: Tensor) -> None:
        """Sees the summed gradient [num_local] of this rank's entries."""

    def after_step(self, state: SparseState) -> None:
        """Called after the weights moved."""

    def skip_step(self) -> None:
        """Called in place of `after_step` where the step's gradients were not finite: forget them."""

    def select(self, state: SparseState, group: Groups, wanted: list[int]) -> Chosen:
        """The best entries outside the mask, `wanted` of each group or as many as there are."""
        raise NotImplementedError

    def restart(self) -> None:
        """Called after the mask changed."""

    def snapshot(self) -> tuple[dict[str, EntryTable], dict[str, Tensor]]:
        """All that it has gathered between two steps: tables of this rank, and what all ranks hold alike."""
        return {}, {}

    def restore(self, parts: Parts, shape: Shape) -> None:
        """Go on where `snapshot` was taken."""


def groups_of(mask: Mask, budget: str) -> tuple[Groups, list[int]]:
    """Which weights compete with each other, and how many entries of the mask each group has."""
    group = groups_by(budget, mask.index)
    counts = [0] * (max(group.values()) + 1)
    for name, index in mask.index.items():
        counts[group[name]] += index.numel()
    return group, counts


def at_most(wanted: list[int], group: Groups, there: dict[str, int]) -> list[int]:
    """`wanted` of each group, at most what its weights have."""
    room = [0] * len(wanted)
    for name, count in there.items():
        room[group[name]] += count
    return [min(count, most) for count, most in zip(wanted, room, strict=True)]


def shards_of(mask: Mask) -> RankShards:
    """This rank's shards of the weights of a mask."""
    return RankShards({name: mask.numel(name) for name in mask.shape})


def free_entries(mask: Mask) -> dict[str, int]:
    """Weight -> elements outside the mask."""
    return {name: mask.numel(name) - index.numel() for name, index in mask.index.items()}


def shut_out(scores: dict[str, Tensor], state: SparseState) -> dict[str, Tensor]:
    """Put the entries of the mask below every other, in place; scores are not negative."""
    for name in state.mask.shape:
        index = state.index[name]
        scores[name][index.to(scores[name].device)] = -1.0
    return scores


class AccumulatedGradient(Growth):
    """`sft_ag`: the candidates with the largest gradient accumulated over the last `growth_steps` steps.

    Candidates are as many entries outside the mask as the mask has: those with the largest dense gradient
    in the first of these steps, the only one that computes dense gradients (one layer at a time).

    Args:
        weights: every targeted weight, by name.
        budget: of the mask: whether weights compete with each other.
        growth_steps: see above.
        options: of the candidates' gradient, which is reduced after a step's last backward.
    """

    def __init__(
        self, weights: dict[str, nn.Parameter], budget: str, growth_steps: int, options: GradientOptions
    ):
        self.weights, self.budget, self.growth_steps, self.options = weights, budget, growth_steps, options
        self.restart()

    def restart(self) -> None:
        self.dense: dict[str, ShardSum] = {}
        self.gradient: SparseGradient | None = None  # of the candidates, once they are chosen
        self.total: Tensor | None = None  # [own candidates] accumulated gradient

    def hook(self, name: str, steps_left: int | None) -> WeightGradHook | None:
        in_window = steps_left is not None and steps_left <= self.growth_steps
        if in_window and self.gradient is None:
            weight = self.weights[name]
            total = self.dense[name] = ShardSum(weight, own_elements(weight)[0].device)
            return lambda x, grad_y: total.add(weight_gradient(x, grad_y))
        return self.gradient.hooks[name] if self.gradient else None

    def after_step(self, state: SparseState) -> None:
        if self.dense:
            self._choose_candidates(state)
        elif self.gradient is not None:
            self.gradient.finish()
            self.total += self.gradient.pop()

    def _choose_candidates(self, state: SparseState) -> None:
        dense, self.dense = {name: total.value for name, total in self.dense.items()}, {}
        bad = torch.tensor([float(any(not v.isfinite().all() for v in dense.values()))])
        if collectives.all_reduce_max(bad.to(collectives.device())).item():
            return  # the next step of the window chooses
        scores = shut_out({name: value.abs() for name, value in dense.items()}, state)
        group, counts = groups_of(state.mask, self.budget)
        counts = at_most(counts, group, free_entries(state.mask))
        self._collect(gather_mask(select_local(scores, group, counts), state.mask.shape))
        own = [dense[n][index.to(dense[n].device)] for n, index in self.gradient.local_index().items()]
        self.total = torch.cat(own).to(collectives.device())

    def _collect(self, candidates: Mask) -> None:
        self.gradient = SparseGradient(candidates, collectives.device(), self.options)

    def skip_step(self) -> None:
        self.dense = {}
        if self.gradient is not None:
            self.gradient.clear()

    @property
    def is_ready(self) -> bool:
        return self.gradient is not None

    def snapshot(self) -> tuple[dict[str, EntryTable], dict[str, Tensor]]:
        if self.gradient is None:
            return {}, {}
        index = shards_of(self.gradient.mask).to_global(self.gradient.local_index())
        return {"candidates": EntryTable(index, {"total": self.total})}, {}

    def restore(self, parts: Parts, shape: Shape) -> None:
        self.restart()
        if parts.has("candidates"):
            candidates = parts.mask("candidates", shape)
            self._collect(candidates)
            found = parts.table("candidates", shards_of(candidates).spans)
            self.total = found.columns["total"].to(collectives.device())

    def select(self, state: SparseState, group: Groups, wanted: list[int]) -> Chosen:
        local = self.gradient.local_index()
        pieces = self.total.abs().split([index.numel() for index in local.values()])
        there = {name: index.numel() for name, index in self.gradient.mask.index.items()}
        wanted = at_most(wanted, group, there)
        chosen = select_local(dict(zip(local, pieces, strict=True)), group, wanted)
        return {name: index[chosen[name].to(index.device)] for name, index in local.items()}, wanted


class RowColumnMomentum(Growth):
    """`sft_ma`: SM3's row and column statistics r, c of the trained entries' squared gradients.

    SM3-II with decay b (Anil et al., 2019): v_ij = b min(r_i, c_j) + (1 - b) g_ij^2 for the entries of the
    mask; then r_i is the largest v of its row, c_j that of its column; a row or column without entries
    keeps its value. An entry outside the mask is estimated by sqrt(r_i c_j).

    Args:
        weights: every targeted weight, by name.
        decay: b.
    """

    def __init__(self, weights: dict[str, nn.Parameter], decay: float):
        self.decay = decay
        self.shape = {name: tuple(full_shape(weight)) for name, weight in weights.items()}
        self.span = {name: own_range(weight) for name, weight in weights.items()}
        lengths = [length for shape in self.shape.values() for length in shape]
        self.statistics = torch.zeros(sum(lengths), device=collectives.device())

    def _views(self, flat: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Weight -> views of its rows and its columns."""
        pieces = iter(flat.split([length for shape in self.shape.values() for length in shape]))
        return {name: (next(pieces), next(pieces)) for name in self.shape}

    def snapshot(self) -> tuple[dict[str, EntryTable], dict[str, Tensor]]:
        return {}, {"statistics": self.statistics}

    def restore(self, parts: Parts, shape: Shape) -> None:
        self.statistics = parts.shared("statistics").to(self.statistics.device)

    def on_gradient(self, state: SparseState, gradient: Tensor) -> None:
        largest = torch.full_like(self.statistics, -1.0)
        new, old = self._views(largest), self._views(self.statistics)
        for name in self.shape:
            own = state.slices[name]
            index = state.index[name].to(gradient.device, torch.int64) + self.span[name][0]
            row = index // self.shape[name][1]
            column = index - row * self.shape[name][1]
            least = torch.minimum(old[name][0][row], old[name][1][column])
            value = self.decay * least + (1 - self.decay) * gradient[own].square()
            new[name][0].scatter_reduce_(0, row, value, "amax")
            new[name][1].scatter_reduce_(0, column, value, "amax")
        largest = collectives.all_reduce_max(largest)
        self.statistics = torch.where(largest < 0, self.statistics, largest)

    def select(self, state: SparseState, group: Groups, wanted: list[int]) -> Chosen:
        roots = self._views(self.statistics.sqrt())
        scores = {name: _outer(*roots[name], *self.span[name]) for name in self.shape}
        wanted = at_most(wanted, group, free_entries(state.mask))
        return select_local(shut_out(scores, state), group, wanted), wanted


def _outer(rows: Tensor, columns: Tensor, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of the flattened outer product."""
    width = columns.numel()
    first, last = start // width, -(-stop // width)
    return torch.outer(rows[first:last], columns).view(-1)[start - first * width : stop - first * width]
