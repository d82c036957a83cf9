"""Whether and how the mask, or what steps inside it, changes during training.

A schedule owns what is trained: the mask, the sparse state and the optimizer. The training loop calls it
before and after every step. Every decision is taken from all ranks' entries by `selection`, and so is the
same on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from speft_ds.comm import collectives
from speft_ds.env import log_rank0
from speft_ds.model.kinds.target import Target
from speft_ds.model.targets import target_shapes
from speft_ds.model.weight_grad_hooks import WeightGradHook, chain_hooks
from speft_ds.selection.topk import is_top
from speft_ds.sparse.gradient import GradientOptions, SparseGradient
from speft_ds.sparse.layout import EntryTable, RankShards
from speft_ds.sparse.mask import Mask, jaccard, overlap
from speft_ds.sparse.optim.clipping import Clip
from speft_ds.sparse.optim.lr_schedule import make_lr_schedule
from speft_ds.sparse.optim.optimizers import OptimizerState, make_optimizer
from speft_ds.sparse.state import SparseState, spans_of
from speft_ds.training.checkpoint.parts import Parts, Snapshot
from speft_ds.training.layer_sampler import LayerSampler
from speft_ds.training.setup import TrainContext
from speft_ds.zero.engine import Trainable
from speft_ds.zero.shards import changing_shards

OWN = "optimizer."  # of the optimizer, among a rank's own tensors in a checkpoint


class Schedule:
    """`static`: the mask of the start, to the end. The others override the hooks.

    Attributes:
        mask: of the moment, without the rows of new tokens, which are always trained.
        state, gradient, optimizer: of its entries and these rows; the engine trains them.
        changes: one dict per change of the mask, for run.json.

    Args:
        context: the frozen base on its engine.
        num_steps: of the run.
        choose: number of the (re)selection, from 0 -> a mask by fresh scores of the weights of the moment.
    """

    num_selections = 1  # masks chosen by `choose` so far

    def __init__(self, context: TrainContext, mask: Mask, num_steps: int, choose: Callable[[int], Mask]):
        self.context, self.num_steps, self.choose = context, num_steps, choose
        recipe, self.recipe = context.recipe, context.recipe.mask
        self.mask = mask
        self.first_mask = _on_cpu(mask)
        self.changes: list[dict] = []
        gate = (self.recipe.layer_gate, self.recipe.gate_every, self.recipe.gate_layers)
        self.layers = LayerSampler(*gate, recipe.seed, list(mask.shape))
        self.storages = {name: context.storage(name, target) for name, target in context.trained.items()}
        with self._changing_shards():
            self.state = self._make_state(mask)
        if self.recipe.schedule != "periodic":  # which scores what was lost again
            for storage in self.storages.values():
                storage.forget_original()
        self.optimizer = make_optimizer(self.state.delta, recipe.optimizer, recipe.has_entry_steps)
        self.lr_schedule = make_lr_schedule(self.optimizer, recipe.optimizer, num_steps)
        self._attach()

    def _make_state(
        self, mask: Mask, previous: SparseState | None = None, revert: bool = False
    ) -> SparseState:
        exact = previous is None and self.recipe.start == "exact"
        mask = self.context.with_new_rows(mask)
        return SparseState(mask, self.storages, previous, revert, target_shapes(self.whole), exact)

    @property
    def whole(self) -> dict[str, Target]:
        """The weights that are trained whole at the moment."""
        return self.context.whole

    def _changing_shards(self) -> AbstractContextManager[None]:
        return changing_shards([p for target in self.context.trained.values() for p in target.written])

    def _attach(self) -> None:
        recipe = self.context.recipe
        options = GradientOptions.of(recipe, self.context.costs)
        stacks, state, new = self.context.num_stacked, self.state, self.context.new_tokens
        order = [name for name in self.context.order if name in state.slices]
        how = (options, stacks, state.whole, order, dict.fromkeys(new.targets, new.rows))
        self.gradient = SparseGradient(state.mask, state.device, *how)
        clip = Clip(recipe.optimizer.clip, recipe.optimizer.clip_norm)
        self.context.engine.attach(
            Trainable(self.state, self.gradient, self.optimizer, self.lr_schedule, clip, self.on_gradient)
        )

    def before_step(self, step: int) -> None:
        """Called before step `step` (from 0) computes its gradients: connect what they are collected by."""
        self.layers.resample(step)
        for name, target in self.context.trained.items():
            own = self.gradient.hooks.get(name) if self.layers.is_active(name) else None
            is_target = name in self.context.targets
            target.weight_grad_hook = chain_hooks(own, self.extra_hook(name, step) if is_target else None)

    def extra_hook(self, name: str, step: int) -> WeightGradHook | None:
        """What else looks at this weight's backward in this step."""
        return None

    def on_gradient(self, gradient: Tensor) -> Tensor | None:
        """Sees the summed gradient [num_local], before clipping; returns which entries step (None: all)."""
        if self.layers.observes:
            self.layers.observe({name: gradient[own] for name, own in self.state.slices.items()})
        if self.layers.active is None:
            return None
        active = torch.zeros_like(gradient, dtype=torch.bool)
        for name, own in self.state.slices.items():
            active[own] = self.layers.is_active(name)
        return active

    def after_step(self, step: int, skipped: bool = False) -> None:
        """Called after the weights moved, or the step was skipped: change the mask, if it is time."""

    def is_time(self, step: int) -> bool:
        """Whether the mask changes after this step; never after the last one, which nothing would train."""
        done = step + 1
        return done % self.recipe.update_every == 0 and done < self.num_steps

    def change_mask(self, mask: Mask, step: int, revert: bool) -> None:
        """Train another mask from here on; `revert` as for SparseState. Kept entries keep their moments."""
        kept, num_before = overlap(self.mask, mask), self.mask.num_trainable
        self._change(mask, revert)
        change = {
            "step": step + 1,
            "dropped": num_before - kept,
            "grown": mask.num_trainable - kept,
            "overlap_with_first": jaccard(self.first_mask, mask),
            "sha256": mask.sha256,
        }
        self.changes.append(change)
        log_rank0(
            f"mask changed after step {step + 1}: {change['dropped']:,} dropped, {change['grown']:,} grown, "
            f"overlap with the first {change['overlap_with_first']:.3f}, sha256 {mask.sha256[:12]}"
        )

    def _change(self, mask: Mask, revert: bool) -> None:
        """Train this mask and the whole weights of the moment from here on."""
        before, self.mask = self.state, mask
        with self._changing_shards():
            self.state = self._make_state(mask, before, revert)
        self.optimizer.remap_state(self.state.delta, *self.state.places_in(before))
        self._attach()

    def snapshot(self) -> Snapshot:
        """All that the next step depends on, of this rank, between two steps. Nothing is copied."""
        saved = self.optimizer.snapshot()
        columns = {"delta": self.state.delta.detach(), **saved.columns}
        tables = {"trained": self.state.own_table(**columns), "dropped": self.state.dropped_table()}
        if self.changes:
            tables["first"] = EntryTable(shards_of(self.mask).select(self.first_mask.index))
        lr_schedule = {n: v for n, v in self.lr_schedule.state_dict().items() if n != "lr_lambdas"}
        facts = {
            "entry_step": saved.entry_step,
            "lr_schedule": lr_schedule,
            "importance": list(self.layers.importance),
            "num_selections": self.num_selections,
            "changes": list(self.changes),
            "sha256": self.mask.sha256,
            "first_sha256": self.first_mask.sha256,
        }
        own = {OWN + name: value for name, value in saved.own.items()}
        return Snapshot(tables, {}, own, facts, self.state.whole_tables(**columns))

    def restore(self, parts: Parts) -> None:
        """Go on where `snapshot` was taken: same recipe, any world size, over the pretrained weights.

        The schedule was made with the checkpoint's mask; only its contents are taken up here.
        """
        facts = parts.facts
        if facts["changes"]:
            self.first_mask = _on_cpu(parts.mask("first", self.mask.shape))
        spans = self.state.rank_shards.spans
        columns = parts.table("trained", spans).columns
        whole = parts.shards("whole", spans_of(self.state.whole))
        for name, values in whole.items():
            columns[name] = torch.cat([columns[name], values])
        with self._changing_shards():
            dropped = parts.table("dropped", spans)
            self.state.restore(columns.pop("delta"), dropped, parts.index("dropped"))
        as_many_ranks = len(parts.paths) == collectives.world_size()
        own = parts.own(collectives.rank()) if as_many_ranks else {}
        own = {name.removeprefix(OWN): value for name, value in own.items() if name.startswith(OWN)}
        self.optimizer.restore(self.state.delta, OptimizerState(columns, own, facts["entry_step"]))
        self.lr_schedule.load_state_dict({**facts["lr_schedule"], "lr_lambdas": [None]})
        self.optimizer.param_groups[0]["lr"] = self.lr_schedule.get_last_lr()[0]
        self.layers.importance = list(facts.get("importance", self.layers.importance))
        self.num_selections, self.changes = facts["num_selections"], list(facts["changes"])

    def by_weight(self, values: Tensor) -> dict[str, Tensor]:
        """Views of a flat [num_local] tensor, weight by weight of the mask."""
        return {name: values[self.state.slices[name]] for name in self.mask.shape}


def shards_of(mask: Mask) -> RankShards:
    """This rank's shards of a mask's weights."""
    return RankShards({name: mask.numel(name) for name in mask.shape})


def _on_cpu(mask: Mask) -> Mask:
    return Mask({name: index.cpu() for name, index in mask.index.items()}, mask.shape)


class SampledWeights(Schedule):
    """Whole weights, some at a time: layers (`lisa`) or a half of all (`half`), others in every period.

    One that closes keeps what it learnt, in the dtype of the model, and gives up its fp32 values and its
    moments.
    """

    def __init__(self, context: TrainContext, mask: Mask, num_steps: int, choose: Callable[[int], Mask]):
        method = context.recipe.method
        kind = {"lisa": "sampled", "half": "half"}[method.name]
        names = list(context.whole)
        self.sampler = LayerSampler(kind, method.every, method.layers, context.recipe.seed, names)
        super().__init__(context, mask, num_steps, choose)

    @property
    def whole(self) -> dict[str, Target]:
        return {n: target for n, target in self.context.whole.items() if self.sampler.is_active(n)}

    def before_step(self, step: int) -> None:
        self.sampler.resample(step)
        if self.whole.keys() != self.state.whole.keys():
            self._change(self.mask, revert=False)
        super().before_step(step)

    def restore(self, parts: Parts) -> None:
        self.sampler.active = frozenset(parts.weights("whole"))
        closed = {name: self.context.whole[name] for name in parts.weights("closed")}
        self.state = self._make_state(self.mask)
        self.state.closed = target_shapes(closed)
        self.state.storages |= {name: self.storages[name] for name in closed}
        self._attach()
        if closed:
            with self._changing_shards():
                self.state.restore_closed(parts.shards("closed", spans_of(self.state.closed))["value"])
        super().restore(parts)


class Periodic(Schedule):
    """Every `update_every` steps the weights of the moment are scored on fresh batches and selected anew.

    Entries that leave the mask keep what they learnt (and take it up again if they come back, with zero
    moments); the adapter holds every entry ever touched. The number of entries stays, but for units of
    unequal sizes, which are taken while they fit.
    """

    def after_step(self, step: int, skipped: bool = False) -> None:
        if self.is_time(step):
            mask = self.choose(self.num_selections)
            self.num_selections += 1
            self.change_mask(mask, step, revert=False)


class GradTopk(Schedule):
    """Only the `topk_fraction` of the entries with the largest gradients steps, anew at every step.

    Gradient-mask tuning (Li et al., 2025). The others keep delta, moments and entry_step.
    """

    def on_gradient(self, gradient: Tensor) -> Tensor | None:
        active_layers = super().on_gradient(gradient)
        size = gradient.abs()
        if active_layers is not None:
            size.masked_fill_(~active_layers, -1.0)
        num_active = sum(
            self.mask.index[name].numel() for name in self.mask.shape if self.layers.is_active(name)
        )
        count = max(1, round(self.recipe.topk_fraction * num_active)) if num_active else 0
        lengths = [self.state.index[name].numel() for name in self.mask.shape]
        active = torch.ones_like(gradient, dtype=torch.bool)  # new rows and whole weights always step
        active[: sum(lengths)] = is_top(size[: sum(lengths)], lengths, count)
        return active
