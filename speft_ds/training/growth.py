"""Masks that drop entries and grow others, by two estimates of the gradient outside the mask.

Ansell et al., Scaling Sparse Fine-Tuning to Large Language Models, 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from speft_ds.comm import collectives
from speft_ds.env import log_rank0
from speft_ds.model.weight_grad_hooks import WeightGradHook
from speft_ds.selection.calibration import ShardSum, weight_gradient
from speft_ds.selection.columns import are_in
from speft_ds.selection.nonzero import count_over_ranks
from speft_ds.selection.radix import Groups
from speft_ds.selection.topk import gather_mask, groups_by, select_local
from speft_ds.sparse.gradient import GradientOptions, SparseGradient
from speft_ds.sparse.layout import EntryTable
from speft_ds.sparse.mask import Mask
from speft_ds.training.checkpoint.parts import Parts, Snapshot
from speft_ds.training.schedule import Schedule, shards_of
from speft_ds.training.setup import TrainContext

Grown = tuple[dict[str, Tensor], list[int]]  # weight -> local indices; how many there are of each group


class DropGrow(Schedule):
    """Every `update_every` steps a fraction of the entries is dropped and as many others are grown.

    Dropped are the entries whose delta changed least since they were grown from 0, that is, of smallest
    abs(delta); they get their pretrained values back. Grown ones, never just dropped, start with zero delta,
    moments and entry_step; a subclass says which. The fraction goes from `drop_rate` to 0 over the run. With
    the `per_layer` budget each weight drops and grows by itself.
    """

    is_ready = True  # it has seen what `grow` goes by

    def grow(self, group: Groups, wanted: list[int]) -> Grown:
        """The best entries outside the mask, `wanted` of each group or as many as there are."""
        raise NotImplementedError

    def restart(self) -> None:
        """Called after the mask changed."""

    def after_step(self, step: int, skipped: bool = False) -> None:
        if not self.is_time(step):
            return
        if not self.is_ready:
            log_rank0(f"note: the mask stays after step {step + 1}: every step that would tell was skipped")
            return
        group, counts = self.groups()
        grown, wanted = self.grow(group, [math.floor(self.rate(step) * count) for count in counts])
        smallest = {name: -delta.abs() for name, delta in self.by_weight(self.state.delta.detach()).items()}
        dropped = select_local(smallest, group, wanted)
        local = {}
        for name in self.mask.shape:
            index = self.state.index[name]
            keep = torch.ones_like(index, dtype=torch.bool)
            keep[dropped[name].to(keep.device)] = False
            local[name] = torch.cat([index[keep], grown[name].to(index)]).sort().values
        self.change_mask(gather_mask(local, self.mask.shape), step, revert=True)
        self.restart()

    def rate(self, step: int) -> float:
        """The fraction to drop after this step."""
        progress = (step + 1) / self.num_steps
        if self.recipe.drop_anneal == "cosine":
            return self.recipe.drop_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.recipe.drop_rate * (1.0 - progress)

    def groups(self) -> tuple[Groups, list[int]]:
        """Which weights compete with each other, and how many entries of the mask each group has."""
        group = groups_by(self.recipe.budget, self.mask.index)
        counts = [0] * (max(group.values()) + 1)
        for name, index in self.mask.index.items():
            counts[group[name]] += index.numel()
        return group, counts

    def best_outside(self, scores: dict[str, Tensor], group: Groups, wanted: list[int]) -> Grown:
        """As `grow`, by scores of all elements of this rank's shards, which are not negative; in place."""
        if self.recipe.compute is not None:  # in the columns that have entries
            for name, columns in self.mask.columns().items():
                scores[name][~are_in(columns.to(scores[name].device), self.mask.shape[name])] = -1.0
        for name, score in scores.items():
            score[self.state.index[name].to(score.device)] = -1.0
            if self.recipe.only_nonzero:  # what was dropped has its pretrained value back
                score[(self.context.targets[name].own_values() == 0).to(score.device)] = -1.0
        free = count_over_ranks({name: score >= 0 for name, score in scores.items()})
        wanted = at_most(wanted, group, free)
        return select_local(scores, group, wanted), wanted


def at_most(wanted: list[int], group: Groups, there: dict[str, int]) -> list[int]:
    """`wanted` of each group, at most what its weights have."""
    room = [0] * len(wanted)
    for name, count in there.items():
        room[group[name]] += count
    return [min(count, most) for count, most in zip(wanted, room, strict=True)]


class AccumulatedGradient(DropGrow):
    """`sft_ag`: grows those with the largest gradient accumulated over the last `growth_steps` steps.

    Candidates are as many entries outside the mask as the mask has: those with the largest dense gradient
    in the first of these steps, the only one that computes dense gradients (one layer at a time).

    Attributes:
        candidates: their gradient, once they are chosen; it is reduced after a step's last backward.
        total: [own candidates] what has accumulated.
    """

    def __init__(self, context: TrainContext, mask: Mask, num_steps: int, choose: Callable[[int], Mask]):
        super().__init__(context, mask, num_steps, choose)
        self.restart()

    def restart(self) -> None:
        self.dense: dict[str, ShardSum] = {}
        self.candidates: SparseGradient | None = None
        self.total: Tensor | None = None

    @property
    def is_ready(self) -> bool:
        return self.candidates is not None

    def extra_hook(self, name: str, step: int) -> WeightGradHook | None:
        if self.candidates is not None:
            return self.candidates.hooks[name]
        left = self.recipe.update_every - step % self.recipe.update_every  # until the mask changes, with this
        if left > self.recipe.growth_steps or not self.is_time(step + left - 1):
            return None
        target = self.context.targets[name]
        total = self.dense[name] = ShardSum(target.numel, target.device)
        return lambda *factors: total.add(weight_gradient(*factors))

    def after_step(self, step: int, skipped: bool = False) -> None:
        dense, self.dense = {name: total.value for name, total in self.dense.items()}, {}
        if self.candidates is not None and skipped:
            self.candidates.clear()
        elif self.candidates is not None:
            self.candidates.finish()
            self.total += self.candidates.own
            self.candidates.clear()
        elif dense and not skipped:
            self._choose_candidates(dense)
        super().after_step(step, skipped)

    def _choose_candidates(self, dense: dict[str, Tensor]) -> None:
        bad = torch.tensor([float(any(not v.isfinite().all() for v in dense.values()))])
        if collectives.all_reduce_max(bad.to(collectives.device())).item():
            return  # the next step of the window chooses
        chosen, _ = self.best_outside({name: value.abs() for name, value in dense.items()}, *self.groups())
        self._collect(gather_mask(chosen, self.mask.shape))
        own = [dense[n][index.to(dense[n].device)] for n, index in self.candidates.local_index().items()]
        self.total = torch.cat(own).to(collectives.device())

    def _collect(self, candidates: Mask) -> None:
        options = GradientOptions.of(self.context.recipe, self.context.costs, overlap=False)
        self.candidates = SparseGradient(candidates, collectives.device(), options, self.context.num_stacked)

    def grow(self, group: Groups, wanted: list[int]) -> Grown:
        local = self.candidates.local_index()
        pieces = self.total.abs().split([index.numel() for index in local.values()])
        there = {name: index.numel() for name, index in self.candidates.mask.index.items()}
        wanted = at_most(wanted, group, there)
        chosen = select_local(dict(zip(local, pieces, strict=True)), group, wanted)
        return {name: index[chosen[name].to(index.device)] for name, index in local.items()}, wanted

    def snapshot(self) -> Snapshot:
        snapshot = super().snapshot()
        if self.candidates is not None:
            index = shards_of(self.candidates.mask).to_global(self.candidates.local_index())
            snapshot.tables["candidates"] = EntryTable(index, {"total": self.total})
        return snapshot

    def restore(self, parts: Parts) -> None:
        super().restore(parts)
        if parts.has("candidates"):
            self._collect(parts.mask("candidates", self.mask.shape))
            found = parts.table("candidates", shards_of(self.mask).spans)
            self.total = found.columns["total"].to(collectives.device())


class RowColumnMomentum(DropGrow):
    """`sft_ma`: grows by SM3's row and column statistics r, c of the trained entries' squared gradients.

    SM3-II with decay b (Anil et al., 2019), that of the optimizer's second moments:
    v_ij = b min(r_i, c_j) + (1 - b) g_ij^2 for the entries of the mask; then r_i is the largest v of its row,
    c_j that of its column; a row or column without entries keeps its value. An entry outside the mask is
    estimated by sqrt(r_i c_j).
    """

    def __init__(self, context: TrainContext, mask: Mask, num_steps: int, choose: Callable[[int], Mask]):
        super().__init__(context, mask, num_steps, choose)
        self.span = shards_of(mask).spans
        self.lengths = [length for shape in mask.shape.values() for length in shape]
        self.statistics = torch.zeros(sum(self.lengths), device=collectives.device())

    def _views(self, flat: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Weight -> views of its rows and its columns."""
        pieces = iter(flat.split(self.lengths))
        return {name: (next(pieces), next(pieces)) for name in self.mask.shape}

    def on_gradient(self, gradient: Tensor) -> Tensor | None:
        decay, state = self.context.recipe.optimizer.betas[1], self.state
        largest = torch.full_like(self.statistics, -1.0)
        new, old = self._views(largest), self._views(self.statistics)
        for name, (_, width) in self.mask.shape.items():
            index = state.index[name].to(gradient.device, torch.int64) + self.span[name][0]
            row = index // width
            column = index - row * width
            least = torch.minimum(old[name][0][row], old[name][1][column])
            value = decay * least + (1 - decay) * gradient[state.slices[name]].square()
            new[name][0].scatter_reduce_(0, row, value, "amax")
            new[name][1].scatter_reduce_(0, column, value, "amax")
        largest = collectives.all_reduce_max(largest)
        self.statistics = torch.where(largest < 0, self.statistics, largest)
        return super().on_gradient(gradient)

    def grow(self, group: Groups, wanted: list[int]) -> Grown:
        roots = self._views(self.statistics.sqrt())
        scores = {name: _outer(*roots[name], *self.span[name]) for name in self.mask.shape}
        return self.best_outside(scores, group, wanted)

    def snapshot(self) -> Snapshot:
        snapshot = super().snapshot()
        snapshot.shared["statistics"] = self.statistics
        return snapshot

    def restore(self, parts: Parts) -> None:
        super().restore(parts)
        self.statistics = parts.shared("statistics").to(self.statistics.device)


def _outer(rows: Tensor, columns: Tensor, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of the flattened outer product."""
    width = columns.numel()
    first, last = start // width, -(-stop // width)
    return torch.outer(rows[first:last], columns).view(-1)[start - first * width : stop - first * width]
