"""An adapter out of a model that was fine-tuned densely: the largest differences from its base."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from speft_ds.adapter.checkpoint import Checkpoint, Fingerprint
from speft_ds.adapter.derive import Entries, check_output, write_derived
from speft_ds.adapter.format import Adapter
from speft_ds.adapter.largest import Largest
from speft_ds.errors import UserError

CHUNK = 2**20
Read = Callable[[str], Tensor]  # weight name -> its values, one weight in memory at a time


@dataclass
class Grafted:
    """What a graft took and what it left.

    Attributes:
        num_entries: taken; `num_differing`: of the targets' `num_target_elements`, those that differ at all.
        squares, squares_taken: sums of the squared differences, of all targets and of what was taken.
        lost: other weights that differ: name -> (elements that differ, norm of the difference); None: of
            another shape.
    """

    num_entries: int = 0
    num_differing: int = 0
    num_target_elements: int = 0
    squares: float = 0.0
    squares_taken: float = 0.0
    lost: dict[str, tuple[int, float] | None] = field(default_factory=dict)


class Pair:
    """A base and the model that was tuned from it, compared a weight at a time.

    Attributes:
        dtype: the one that the base is loaded in, and the adapter is for: bfloat16 where the base says so,
            else float32.
        targets: names of the weights that an adapter may change, in model order, as in training.
    """

    def __init__(self, base: str, tuned: str, patterns: list[str] | None):
        from speft_ds.model.targets import find_targets, tied_targets  # late, because it imports DeepSpeed

        self.base, self.tuned = Checkpoint(base), Checkpoint(tuned)
        config = self.base.config
        is_short = "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))
        self.dtype = torch.bfloat16 if is_short else torch.float32
        targets = find_targets(self.base.model, patterns)
        if tied := tied_targets(self.base.model, targets):
            what = f"{', '.join(tied)} shares its weight with another module (tied embeddings)"
            raise UserError(what, "--target", "target layers of the decoder only")
        self.targets = list(targets)
        missing = [name for name in self.base.shape if name not in self.tuned.shape]
        odd = missing or [n for n in self.targets if self.tuned.shape[n] != self.base.shape[n]]
        if odd:
            what = f"the models are of different architectures: {odd[0]}"
            raise UserError(what, f"{base} and {tuned}", "give a model and the one it was tuned from")
        self.base_weight = reader(self.base, self.dtype)  # as a run would load it
        self.tuned_weight = reader(self.tuned, torch.float32)

    def difference(self, name: str) -> Tensor:
        """[elements] fp32: tuned - base. Raises UserError where it is not finite."""
        apart = (self.tuned_weight(name) - self.base_weight(name).float()).view(-1)
        if not torch.isfinite(apart).all():
            raise UserError(f"{name} is not finite", f"{self.base.name} and {self.tuned.name}")
        return apart

    def differences(self) -> Iterator[Tensor]:
        """Of every target, in model order."""
        return map(self.difference, self.targets)


def reader(checkpoint: Checkpoint, dtype: torch.dtype) -> Read:
    """Reads weights by name; where a checkpoint's files do not allow that, the whole model is loaded."""
    if checkpoint.problem is not None:
        print(f"note: {checkpoint.name} is loaded whole: {checkpoint.problem}")
        weights = dict(checkpoint.load(dtype).named_parameters())
        return lambda name: weights[name].detach()
    place: dict[str, tuple[str, str]] = {}
    for file in checkpoint.files:
        for key in checkpoint.keys(file):
            place.setdefault(checkpoint.weight.get(key, ""), (file, key))
    return lambda name: checkpoint.read(*place[name]).to(dtype)


def graft(
    base: str,
    tuned: str,
    output: str | Path,
    density: float | None = None,
    num_entries: int | None = None,
    patterns: list[str] | None = None,
) -> Grafted:
    """Write an adapter of the largest differences between a fine-tuned causal language model and its base.

    The k largest abs(tuned - base) of all targets together, exactly; equal ones by global index. The files
    are read four times, a weight at a time: a survey, two passes that find the k-th largest, and the choice.

    Args:
        base, tuned: local folders, or names on the hub that the cache has.
        output: the new adapter's folder.
        density: fraction of the targeted weights to take, in (0, 1]; or `num_entries`: how many.
        patterns: which linears are targets, see `speft_ds.model.load_model.targets.find_targets`; None: all of the layers.
    Raises:
        UserError: a model that cannot be read, two architectures, no difference, or not just one of
            `density` and `num_entries`.
    """
    _check(density, num_entries)
    check_output(output)
    pair = Pair(base, tuned, patterns)
    facts, report = survey(pair)
    if report.num_differing == 0:
        raise UserError("no targeted weight differs: there is nothing to graft", f"{base} and {tuned}")
    wanted = num_entries or max(1, round(density * report.num_target_elements))
    largest = Largest.find(pair.differences, min(wanted, report.num_differing))

    def entries(name: str) -> Entries:
        apart = pair.difference(name)
        index = largest.take(apart)
        report.squares_taken += _squares(apart[index])
        return index, apart[index]

    facts["history"] = [{"command": "graft", "tuned": Path(tuned).name, "num_entries": wanted}]
    write_derived(output, facts, entries)
    report.num_entries = Adapter.open(output).num_entries
    return report


def survey(pair: Pair) -> tuple[dict, Grafted]:
    """The facts of the adapter to be, with the fingerprints of the base, and what differs."""
    shape, report = pair.base.shape, Grafted()
    exact, rounded = Fingerprint(shape, pair.dtype), Fingerprint(shape, torch.bfloat16)
    for name in shape:
        weight = pair.base_weight(name)
        exact.add(name, weight)
        rounded.add(name, weight.bfloat16())
        apart = pair.difference(name) if pair.tuned.shape[name] == shape[name] else None
        num_differing = 0 if apart is None else int(apart.count_nonzero())
        if name in pair.targets:
            report.num_differing += num_differing
            report.num_target_elements += weight.numel()
            report.squares += _squares(apart)
        elif apart is None or num_differing:
            report.lost[name] = None if apart is None else (num_differing, math.sqrt(_squares(apart)))
    facts = {
        "task": "causal_lm",
        "base": pair.base.name,
        "dtype": str(pair.dtype).removeprefix("torch."),
        "fingerprint": exact.hexdigest(),
        "fingerprint_bfloat16": rounded.hexdigest(),
        "shapes": {name: list(shape[name]) for name in pair.targets},
    }
    return facts, report


def _check(density: float | None, num_entries: int | None) -> None:
    if (density is None) == (num_entries is None):
        raise UserError("give either --density or --num-entries", "graft", "--density 0.005")
    if density is not None and not 0.0 < density <= 1.0:
        raise UserError(f"--density is {density}", "--density", "a fraction > 0 and <= 1")


def _squares(values: Tensor) -> float:
    """Sum of the squares of [n] fp32 values, in fp64, which only a chunk at a time is cast to."""
    return sum(float(chunk.double().square().sum()) for chunk in values.split(CHUNK))
