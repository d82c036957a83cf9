"""The schedules on one process: whole dense tensors, ordinary autograd, sorted Python lists.

Nothing of the product decides anything here; of it come the tokenised rows and seeded shuffles alone.
"""

from __future__ import annotations

import hashlib
import math
import random
from pathlib import Path

import numpy as np
import tiny
import torch
from torch import Tensor

from distributed.reference import Dense, plain_model, reference_loss
from distributed.selection_checks import shares
from speft_ds.config.recipe import Recipe
from speft_ds.data.collate import collate
from speft_ds.data.sampler import Sampler, hash_seed, permutation


def best(scores: Dense, allowed: Dense, groups: list[list[str]], counts: list[int]) -> Dense:
    """True at the `count` highest allowed scores of each group of weights, or at all that there are.

    Equal scores go by weight, then by position.
    """
    chosen = {name: torch.zeros_like(where) for name, where in allowed.items()}
    for names, count in zip(groups, counts, strict=True):
        ranked = []
        for number, name in enumerate(names):
            values = scores[name].reshape(-1).tolist()
            there = allowed[name].reshape(-1).nonzero()[:, 0].tolist()
            ranked += [(-values[position], number, position) for position in there]
        for _, number, position in sorted(ranked)[:count]:
            chosen[names[number]].view(-1)[position] = True
    return chosen


def entries(mask: Dense) -> set[tuple[str, int]]:
    return {(name, i) for name, where in mask.items() for i in where.reshape(-1).nonzero()[:, 0].tolist()}


def count(mask: Dense) -> int:
    return sum(int(where.sum()) for where in mask.values())


def sha256(mask: Dense) -> str:
    """The documented hash of a mask, from its whole bool tensors."""
    digest = hashlib.sha256()
    for name, where in sorted(mask.items()):
        digest.update(f"{name} {where.shape[0]} {where.shape[1]}\n".encode())
        digest.update(np.flatnonzero(where.numpy()).astype("<i8").tobytes())
    return digest.hexdigest()


class Reference:
    """A run of a recipe with `gradient` or `magnitude` salience.

    Attributes:
        mask, delta, entry_step: of the moment, whole; `touched`: ever trained and not reverted.
        losses, grad_norms: by step; moments: after every fifth, as `schedule_checks.moment` has them.
        changes: as run.json has them. `returned`: entries that came back to the mask with a delta.
    """

    def __init__(self, recipe: Recipe):
        self.recipe, self.settings = recipe, recipe.mask
        self.rows = tiny.read_rows(Path(recipe.data.path))
        self.order = Sampler((len(self.rows),), None, recipe.seed)
        self.model = plain_model(recipe).eval()
        parameters = self.model.named_parameters()
        self.weights = {n: p for n, p in parameters if ".layers." in n and p.dim() == 2}
        self.names = list(self.weights)
        self.pretrained = {n: p.detach().clone() for n, p in self.weights.items()}
        self.delta, self.first_moment, self.second_moment, self.entry_step = (self._zeros() for _ in range(4))
        self.groups = [[n] for n in self.names] if self.settings.budget == "per_layer" else [self.names]
        self.everything = {n: torch.ones_like(p, dtype=torch.bool) for n, p in self.pretrained.items()}
        self.mask = self.first_mask = self._select(0)
        self.touched = dict(self.mask)
        self.rows_seen = {n: torch.zeros(p.shape[0]) for n, p in self.pretrained.items()}  # SM3's statistics
        self.columns_seen = {n: torch.zeros(p.shape[1]) for n, p in self.pretrained.items()}
        self.candidates, self.accumulated = None, None
        self.losses, self.grad_norms, self.moments, self.changes = [], [], [], []
        self.returned: set = set()
        self.importance: dict[int, float] = {}
        for done in range(1, recipe.train.steps + 1):
            self._step(done)

    def _zeros(self) -> Dense:
        return {name: torch.zeros_like(p, dtype=torch.float64) for name, p in self.pretrained.items()}

    def _gradient(self, rows: list) -> tuple[float, Dense]:
        """Mean token loss of the rows and its gradient; right padding with any token changes nothing."""
        self.model.zero_grad()
        loss = reference_loss(self.model, collate(rows, 0, torch.device("cpu")))
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in self.weights.items()}

    def _select(self, number: int) -> Dense:
        """The mask by fresh scores of the weights of the moment."""
        if self.settings.salience == "magnitude":
            scores = {name: p.detach().abs() for name, p in self.weights.items()}
        else:
            order = permutation(len(self.rows), self.recipe.seed, "calibration", number)
            rows = [self.rows[i] for i in order[: self.settings.calibration_samples]]
            scores = {name: g.abs() for name, g in self._gradient(rows)[1].items()}
        sizes = [sum(self.pretrained[n].numel() for n in names) for names in self.groups]
        wanted = self.settings.num_trainable or round(self.settings.density * sum(sizes))
        allowed = self.everything if self.settings.compute is None else self._in_columns(scores)
        if self.settings.only_nonzero:
            allowed = {name: p != 0 for name, p in self.pretrained.items()}
        return best(scores, allowed, self.groups, shares(sizes, wanted))

    def _in_columns(self, scores: Dense) -> Dense:
        """True in the columns of the largest mean squares, until a share of all entries is spent."""
        allowed = {name: torch.zeros_like(where) for name, where in self.everything.items()}
        for names in self.groups:
            left = int(self.settings.compute * sum(scores[name].numel() for name in names))
            left = max(left, scores[names[0]].shape[0]) if len(names) == 1 else left
            worth = [
                (-value, number, column)
                for number, name in enumerate(names)
                for column, value in enumerate(scores[name].double().square().mean(0).tolist())
            ]
            for _, number, column in sorted(worth):
                left -= scores[names[number]].shape[0]
                if left < 0:
                    break
                allowed[names[number]][:, column] = True
        return allowed

    def _outside(self) -> Dense:
        """Where an entry may grow: outside the mask, in columns that have entries if there are to be few,
        at no zero if there are to be none.
        """
        anywhere, zeros_too = self.settings.compute is None, not self.settings.only_nonzero
        return {
            name: ~mask & (mask.any(0) | anywhere) & ((self.pretrained[name] != 0) | zeros_too)
            for name, mask in self.mask.items()
        }

    def _is_open(self, name: str, done: int) -> bool:
        """Whether the layer gate lets this weight train in step `done` (from 1)."""
        period = (done - 1) // self.settings.gate_every
        if self.settings.layer_gate == "half":
            order = permutation(len(self.names), self.recipe.seed, "layer_gate", period)
            return self.names.index(name) in order[: math.ceil(len(order) / 2)]
        if self.settings.layer_gate == "sampled":
            layers = self.model.config.num_hidden_layers
            order = permutation(layers, self.recipe.seed, "layer_gate", period)
            return int(name.split(".")[2]) in order[: self.settings.gate_layers]
        if self.settings.layer_gate == "importance":
            return int(name.split(".")[2]) == self._important_layer(period)
        return True

    def _important_layer(self, period: int) -> int:
        """The one layer that is drawn: the first of exponential waiting times at the rate of its weight."""
        chance, most = random.Random(hash_seed(self.recipe.seed, "layer_gate", period)), 1.0
        if self.importance:
            most = max(self.importance.values())
        waits = []
        for layer in range(self.model.config.num_hidden_layers):
            rate = max(self.importance.get(layer, most), most / 20)
            waits.append(-math.log1p(-chance.random()) / 2 ** (round(math.log2(rate) * 4) / 4))
        return min(range(len(waits)), key=waits.__getitem__)

    def _observe(self, done: int, gradient: Dense) -> None:
        """The norm of the gradient of the open layer's entries, once a period."""
        if self.settings.layer_gate != "importance" or done % self.settings.gate_every:
            return
        layer = self._important_layer((done - 1) // self.settings.gate_every)
        own = [g[self.mask[n]] for n, g in gradient.items() if f".layers.{layer}." in n]
        norm = float(torch.cat(own).double().norm())
        self.importance[layer] = (self.importance.get(layer, norm) + norm) / 2

    def _step(self, done: int) -> None:
        recipe = self.recipe
        ids = self.order.ids((done - 1) * recipe.train.global_batch, recipe.train.global_batch)
        loss, gradient = self._gradient([self.rows[i] for i in ids])
        self.losses.append(loss)
        active = {n: mask if self._is_open(n, done) else mask & False for n, mask in self.mask.items()}
        sizes = {n: g.abs() for n, g in gradient.items()}
        if self.settings.schedule == "grad_topk" and (num_open := count(active)):
            number = max(1, round(self.settings.topk_fraction * num_open))
            active = best(sizes, active, [self.names], [number])
        if self.settings.schedule == "drop_grow":
            self._watch(done, gradient)
        self._observe(done, gradient)
        norm = math.sqrt(sum(float(g[active[n]].double().square().sum()) for n, g in gradient.items()))
        self.grad_norms.append(norm)
        clip = recipe.optimizer.clip_norm
        factor = clip / norm if clip is not None and norm > clip else 1.0
        for name in self.names:
            self._adamw(name, gradient[name].double() * factor, active[name], self._lr(done))
        self._write()
        changes = self.settings.schedule in ("periodic", "drop_grow")
        if changes and done % self.settings.update_every == 0 and done < recipe.train.steps:
            self._change(done)
        if done % 5 == 0:
            self.moments.append(self._moment())

    def _moment(self) -> dict[str, Dense]:
        return {
            "mask": dict(self.mask),
            "delta": {n: d.float() for n, d in self.delta.items()},
            "entry_step": {n: a.to(torch.int32) for n, a in self.entry_step.items()},
            "weight": {n: p.detach().clone() for n, p in self.weights.items()},
        }

    def _lr(self, done: int) -> float:
        """Linear warm-up, then linear decay to 0 after the last step."""
        settings, steps = self.recipe.optimizer, self.recipe.train.steps
        rising = done / (settings.warmup_steps + 1)
        falling = (steps - (done - 1)) / (steps - settings.warmup_steps)
        return settings.lr * min(rising, falling)

    def _adamw(self, name: str, gradient: Tensor, active: Tensor, lr: float) -> None:
        """Loshchilov & Hutter's algorithm 2, each active entry by its own number of steps."""
        settings = self.recipe.optimizer
        beta1, beta2 = settings.betas
        entry_step = self.entry_step[name] + 1
        first = beta1 * self.first_moment[name] + (1 - beta1) * gradient
        second = beta2 * self.second_moment[name] + (1 - beta2) * gradient**2
        direction = (
            first / (1 - beta1**entry_step) / ((second / (1 - beta2**entry_step)).sqrt() + settings.eps)
        )
        delta = self.delta[name] - lr * (direction + settings.weight_decay * self.delta[name])
        self.entry_step[name] = torch.where(active, entry_step, self.entry_step[name])
        self.first_moment[name] = torch.where(active, first, self.first_moment[name])
        self.second_moment[name] = torch.where(active, second, self.second_moment[name])
        self.delta[name] = torch.where(active, delta, self.delta[name])

    @torch.no_grad()
    def _write(self) -> None:
        for name, weight in self.weights.items():
            weight.copy_(self.pretrained[name] + self.delta[name].float())

    def _watch(self, done: int, gradient: Dense) -> None:
        """What the two ways to grow learn from a step's summed, unclipped gradient."""
        if self.settings.growth == "sft_ma":
            self._row_column_statistics(gradient)
            return
        every, window = self.settings.update_every, self.settings.growth_steps
        next_change = math.ceil(done / every) * every
        if next_change - done >= window or next_change >= self.recipe.train.steps:
            return
        if next_change - done == window - 1:
            sizes = {name: g.abs() for name, g in gradient.items()}
            self.candidates = best(sizes, self._outside(), self.groups, self._group_sizes())
            self.accumulated = self._zeros()
        for name, g in gradient.items():
            self.accumulated[name] += g

    def _group_sizes(self) -> list[int]:
        return [sum(int(self.mask[name].sum()) for name in names) for names in self.groups]

    def _row_column_statistics(self, gradient: Dense) -> None:
        """SM3-II with decay, of the trained entries."""
        decay = self.recipe.optimizer.betas[1]
        for name, mask in self.mask.items():
            rows, columns = self.rows_seen[name], self.columns_seen[name]
            value = decay * torch.minimum(rows[:, None], columns[None, :]) + (1 - decay) * gradient[name] ** 2
            value = value.masked_fill(~mask, -1)
            self.rows_seen[name] = torch.where(mask.any(1), value.amax(1), rows)
            self.columns_seen[name] = torch.where(mask.any(0), value.amax(0), columns)

    def _change(self, done: int) -> None:
        if self.settings.schedule == "periodic":
            mask = self._select(len(self.changes) + 1)
        else:
            mask = self._drop_and_grow(done)
        dropped, grown = entries(self.mask) - entries(mask), entries(mask) - entries(self.mask)
        self.returned |= grown & entries({name: delta != 0 for name, delta in self.delta.items()})
        for name in self.names:
            left = self.mask[name] & ~mask[name]
            for state in (self.first_moment, self.second_moment, self.entry_step):
                state[name][left] = 0
            if self.settings.schedule == "drop_grow":
                self.delta[name][left] = 0
            is_kept = self.settings.schedule == "periodic"
            self.touched[name] = mask[name] | (self.touched[name] & is_kept)
        self.mask = mask
        self._write()
        now, first = entries(mask), entries(self.first_mask)
        self.changes.append(
            {
                "step": done,
                "dropped": len(dropped),
                "grown": len(grown),
                "overlap_with_first": len(now & first) / len(now | first),
                "sha256": sha256(mask),
            }
        )

    def _drop_and_grow(self, done: int) -> Dense:
        progress = done / self.recipe.train.steps
        if self.settings.drop_anneal == "cosine":
            rate = self.settings.drop_rate * (1 + math.cos(math.pi * progress)) / 2
        else:
            rate = self.settings.drop_rate * (1 - progress)
        if self.settings.growth == "sft_ag":
            scores, allowed = {n: a.abs() for n, a in self.accumulated.items()}, self.candidates
        else:
            rows, columns = self.rows_seen, self.columns_seen
            scores = {n: (rows[n][:, None] * columns[n][None, :]).double().sqrt() for n in self.names}
            allowed = self._outside()
        room = [sum(int(allowed[name].sum()) for name in names) for names in self.groups]
        wanted = [math.floor(rate * size) for size in self._group_sizes()]
        wanted = [min(both) for both in zip(wanted, room, strict=True)]
        grown = best(scores, allowed, self.groups, wanted)
        smallest = {name: -delta.abs() for name, delta in self.delta.items()}
        dropped = best(smallest, self.mask, self.groups, wanted)
        return {name: self.mask[name] & ~dropped[name] | grown[name] for name in self.names}
