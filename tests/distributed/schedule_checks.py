"""What the tests of the schedules run on every rank, called through the `ranks` fixture."""

from __future__ import annotations

import torch
from torch import Tensor

from distributed.checks import assert_adapter_is_the_run, counting_saved
from distributed.reference import Dense, plain_model, read_entries, start, whole_weights
from distributed.schedule_reference import count, entries, sha256
from speft_ds.comm import collectives
from speft_ds.config.recipe import Recipe
from speft_ds.sparse.mask import Mask, save_mask
from speft_ds.sparse.state import SparseState
from speft_ds.training.model_facts import base_facts
from speft_ds.training.run_dir import run_facts
from speft_ds.training.trainer import Trainer
from speft_ds.zero.shards import shard_numel, shard_range


def dense_mask(mask: Mask) -> Dense:
    """Bool tensors."""
    dense = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in mask.shape.items()}
    for name, where in dense.items():
        where.view(-1)[mask.index[name].to("cpu", torch.int64)] = True
    return dense


def whole(state: SparseState, key: Tensor, values: Tensor) -> Dense:
    """All ranks' values at keys of their shards (laid end to end); 0 elsewhere. On the CPU."""
    shapes = state.mask.shape.items()
    lengths = [shard_numel(rows * columns, collectives.world_size()) for _, (rows, columns) in shapes]
    own = torch.zeros(sum(lengths), dtype=values.dtype)
    own[key.cpu()] = values.cpu()
    by_rank = torch.stack(collectives.all_gather_objects(own))
    pieces = by_rank.split(lengths, dim=1)
    return {n: p.reshape(-1)[: s[0] * s[1]].view(s) for (n, s), p in zip(shapes, pieces, strict=True)}


def live_deltas(state: SparseState) -> Dense:
    return whole(state, state.keys(), state.delta.detach())


def kept_deltas(state: SparseState) -> Dense:
    """Of entries that left the mask."""
    return whole(state, state.dropped.key, state.dropped.delta)


def moment(trainer: Trainer) -> dict[str, Dense]:
    """The run as it stands: mask, deltas (with the kept ones of dropped entries), entry_steps, weights."""
    state, mask, weights = trainer.state, dense_mask(trainer.mask), whole_weights(trainer.engine.module)
    keys, kept = state.keys(), kept_deltas(state)
    trained = whole(state, keys, torch.ones(keys.numel(), dtype=torch.bool))
    assert all(torch.equal(trained[name], where) for name, where in mask.items()), "not the mask's entries"
    return {
        "mask": mask,
        "delta": {name: delta + kept[name] for name, delta in live_deltas(state).items()},
        "entry_step": whole(state, keys, trainer.schedule.optimizer.state[state.delta]["entry_step"]),
        "weight": {name: weights[name] for name in mask},
    }


def check_schedule(recipe: Recipe) -> dict:
    """A run; rank 0 leaves every fifth step's moment in moments.pt, and the adapter, in the run folder."""
    trainer = start(recipe)
    steps, moments = [], []
    for step in range(recipe.train.steps):
        steps.append(trainer.train_step(step))
        if (step + 1) % 5 == 0:
            moments.append(moment(trainer))
    trainer.save()
    collectives.run_on_rank0(lambda: torch.save(moments, trainer.folder / "moments.pt"))
    return {
        "losses": [step["loss"] for step in steps],
        "grad_norms": [step["grad_norm"] for step in steps],
        "changes": run_facts(trainer)["mask"]["changes"],
    }


def check_changing_mask(recipe: Recipe) -> dict:
    """DESIGN's invariants 1, 2 and 7 after every step of a run whose mask changes.

    Returns:
        Numbers that say whether the run was worth looking at: changes, entries moved, returned, reverted.
    """
    trainer = start(recipe)
    reverts = recipe.mask.schedule == "drop_grow"
    pretrained = {name: p.detach() for name, p in plain_model(recipe).named_parameters()}
    mask, size = dense_mask(trainer.mask), trainer.mask.num_trainable
    touched = dict(mask)
    delta = {name: torch.zeros(where.shape) for name, where in mask.items()}
    stepped: Dense = {}  # live deltas between a step and the change of the mask after it
    change = trainer.schedule.after_step

    def after_step(step: int, skipped: bool) -> None:
        stepped.update(live_deltas(trainer.state))
        for weight in (weight for target in trainer.targets.values() for weight in target.written):
            weight.all_gather()  # a whole copy, which a change of the shards must not leave behind
        change(step, skipped)

    trainer.schedule.after_step = after_step
    seen = {"moved": 0, "returned": 0, "reverted": 0}
    for step in range(recipe.train.steps):
        trainer.train_step(step)
        now, live, kept = dense_mask(trainer.mask), live_deltas(trainer.state), kept_deltas(trainer.state)
        expected = {name: value.clone() for name, value in pretrained.items()}
        for name, before in mask.items():
            left, grown = before & ~now[name], now[name] & ~before
            delta[name] = torch.where(before, stepped[name], delta[name])
            seen["returned"] += int((delta[name] != 0)[grown].sum())
            if reverts:
                seen["reverted"] += int((delta[name] != 0)[left].sum())
                delta[name] = delta[name].masked_fill(left, 0.0)
            touched[name] = now[name] if reverts else touched[name] | now[name]
            assert torch.equal(live[name], delta[name].masked_fill(~now[name], 0.0)), (name, step)
            assert torch.equal(kept[name], delta[name].masked_fill(now[name], 0.0)), (name, step)
            trained = (pretrained[name].float() + delta[name]).to(pretrained[name].dtype)
            expected[name] = torch.where(touched[name], trained, pretrained[name])
            seen["moved"] += int((expected[name] != pretrained[name]).sum())
        for name, weight in whole_weights(trainer.engine.module).items():
            assert torch.equal(weight, expected[name]), (name, step)
        mask = now
        num_live = sum(collectives.all_gather_objects(trainer.state.delta.numel()))
        # Blocks of unequal size, at the edges of a weight, do not always add up to the same number.
        assert count(now) == num_live == size or recipe.mask.granularity == "block", (step, num_live)
        hashes = collectives.all_gather_objects(trainer.mask.sha256)
        assert set(hashes) == {sha256(now)}, (hashes, step)
    assert_adapter_is_the_run(trainer)
    saved = read_entries(trainer.folder)
    for name, where in touched.items():
        index, _ = saved.get(name, (torch.empty(0), None))
        assert index.tolist() == where.view(-1).nonzero()[:, 0].tolist(), f"{name}: not what was touched"
    return {"changes": len(trainer.schedule.changes), **seen}


def check_ties(recipe: Recipe) -> tuple[dict[str, list[int]], list]:
    """What `grad_topk` does with tied gradients: the indices that may step, and the sorted ones that do."""
    trainer = start(recipe)
    state = trainer.state
    gradient = torch.empty(state.num_local, device=collectives.device())
    for number, (name, own) in enumerate(state.slices.items()):
        first, _ = shard_range(state.mask.numel(name), state.rank_shards.rank, state.rank_shards.world_size)
        gradient[own] = tied_gradient(number, state.index[name] + first)
    active = trainer.schedule.on_gradient(gradient)
    is_open = trainer.schedule.layers.is_active
    index = {name: index.tolist() if is_open(name) else [] for name, index in trainer.mask.index.items()}
    return index, sorted(entries(whole(state, state.keys(), active)))


def tied_gradient(number: int, index: Tensor) -> Tensor:
    """-2, -1, 0, 1 or 2, by a weight's number and its entries' global indices."""
    return ((index * 7 + number) % 5 - 2).float()


def check_shut_weights(recipe: Recipe) -> list[int]:
    """What is shut has no sink and saves no activation. Returns how many weights were open in each step."""
    trainer = start(recipe)
    saved: dict[str, int] = {}
    for name, target in trainer.targets.items():
        target.module.forward = counting_saved(target.module, name, saved)
    num_open = []
    for step in range(recipe.train.steps):
        before = live_deltas(trainer.state)
        saved.clear()
        trainer.train_step(step)
        after = live_deltas(trainer.state)
        shut = [name for name, linear in trainer.targets.items() if linear.weight_grad_hook is None]
        for name in trainer.targets:
            # The weight; the input, where it is not made again (first pass of ZeRO-3, attention's output).
            assert 1 <= saved[name] <= (1 if name in shut else 2), (name, step)
            assert torch.equal(before[name], after[name]) == (name in shut), (name, step)
        num_open.append(len(trainer.targets) - len(shut))
    return num_open


def check_growth_window(recipe: Recipe) -> list[int]:
    """The steps (from 1) in which anything but the mask's own entries looks at a backward."""
    trainer = start(recipe)
    steps = []
    for step in range(recipe.train.steps):
        own = trainer.gradient.hooks
        trainer.train_step(step)
        if any(linear.weight_grad_hook is not own[name] for name, linear in trainer.targets.items()):
            steps.append(step + 1)
    return steps


def check_nothing_open(recipe: Recipe) -> None:
    """Where no open weight has an entry, a step moves nothing."""
    trainer = start(recipe)
    paused = 0
    for step in range(recipe.train.steps):
        before = moment(trainer)
        trainer.train_step(step)
        after = moment(trainer)
        if not any(trainer.schedule.layers.is_active(n) and i.numel() for n, i in trainer.mask.index.items()):
            paused += 1
            for what in ("delta", "entry_step", "weight"):
                for name, value in after[what].items():
                    assert torch.equal(value, before[what][name]), (what, name, step)
    assert 0 < paused < recipe.train.steps, paused


def write_mask(recipe: Recipe, path) -> str:
    """Score and select as `speft score` does, and write the mask. Returns its sha256."""
    trainer = start(recipe)
    collectives.run_on_rank0(lambda: save_mask(path, trainer.mask, base_facts(trainer.context)))
    return trainer.mask.sha256


def run_steps(recipe: Recipe) -> dict:
    """Losses and masks of a run: the first one's hash, all sizes, the targets."""
    trainer = start(recipe)
    first, sizes, losses = trainer.mask.sha256, [trainer.mask.num_trainable], []
    for step in range(recipe.train.steps):
        losses.append(trainer.train_step(step)["loss"])
        sizes.append(trainer.mask.num_trainable)
    return {
        "losses": losses,
        "first": first,
        "sizes": sizes,
        "shape": trainer.mask.shape,
        "changes": trainer.schedule.changes,
    }
