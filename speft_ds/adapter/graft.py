"""An adapter out of a model that was fine-tuned densely: the largest differences from its base."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from speft_ds.adapter.compress import CHUNK, Largest
from speft_ds.adapter.format import Entries
from speft_ds.adapter.pretrained import Fingerprint, PretrainedCheckpoint
from speft_ds.adapter.save import check_output, write_derived
from speft_ds.errors import UserError
from speft_ds.model.targets import find_targets, tied_targets


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


class TunedPair:
    """A base and the model that was tuned from it, compared a weight at a time.

    Attributes:
        dtype: of the base that the adapter is for: bfloat16 where its configuration says so, else float32.
        targets: names of the weights that an adapter may change, in model order, as in training.
        base_weight: weight name -> its values, as a run would load them.
    """

    def __init__(self, base: str, tuned: str, patterns: list[str] | None):
        self.base, self.tuned = PretrainedCheckpoint(base), PretrainedCheckpoint(tuned)
        config = self.base.config
        is_short = "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))
        self.dtype = torch.bfloat16 if is_short else torch.float32
        targets = find_targets(self.base.model, patterns)
        if tied := tied_targets(self.base.model, targets):
            what = f"{', '.join(tied)} shares its weight with another module (tied embeddings)"
            raise UserError(what, "--target", "target layers of the decoder only")
        self.targets = list(targets)
        missing = [name for name in self.base.shape if name not in self.tuned.shape]
        if odd := missing or [n for n in self.targets if self.tuned.shape[n] != self.base.shape[n]]:
            what = f"the models are of different architectures: {odd[0]}"
            raise UserError(what, f"{base} and {tuned}", "give a model and the one it was tuned from")
        for model in (self.base, self.tuned):
            if model.problem:
                print(f"note: {model.name} is loaded completely: {model.problem}")
        self.base_weight = self.base.reader(self.dtype)
        self._tuned_weight = self.tuned.reader(torch.float32)

    def difference(self, name: str) -> Tensor:
        """[elements] fp32: tuned - base. Raises UserError where it is not finite."""
        difference = (self._tuned_weight(name) - self.base_weight(name).float()).view(-1)
        if not torch.isfinite(difference).all():
            where = f"{self.base.name} and {self.tuned.name}"
            raise UserError(f"{name} is not finite", where, "give models whose weights are numbers")
        return difference


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
        patterns: which linears are targets, see `targets.find_targets`; None: all of the layers.
    Raises:
        UserError: a model that cannot be read, two architectures, no difference, or not just one of
            `density` and `num_entries`.
    """
    if (density is None) == (num_entries is None):
        raise UserError("give either --density or --num-entries", "graft", "--density 0.005")
    if density is not None and not 0.0 < density <= 1.0:
        raise UserError(f"--density is {density}", "--density", "a fraction > 0 and <= 1")
    if num_entries is not None and num_entries < 1:
        raise UserError(f"--num-entries is {num_entries}", "--num-entries", "1 or more")
    check_output(output)
    pair = TunedPair(base, tuned, patterns)
    facts, report = _survey(pair)
    if report.num_differing == 0:
        what, fix = "no targeted weight differs: there is nothing to graft", "give a model that was tuned"
        raise UserError(what, f"{base} and {tuned}", fix)
    wanted = num_entries or max(1, round(density * report.num_target_elements))
    largest = Largest(lambda: map(pair.difference, pair.targets), min(wanted, report.num_differing))

    def entries(name: str) -> Entries:
        difference = pair.difference(name)
        index = largest.take(difference)
        report.squares_taken += _squares(difference[index])
        return index, difference[index]

    facts["history"] = [{"command": "graft", "tuned": Path(tuned).name, "num_entries": wanted}]
    report.num_entries = write_derived(output, facts, entries).num_entries
    return report


def _survey(pair: TunedPair) -> tuple[dict, Grafted]:
    """The facts of the adapter to be, with the fingerprints of the base, and what differs."""
    shape, report = pair.base.shape, Grafted()
    exact, rounded = Fingerprint(shape, pair.dtype), Fingerprint(shape, torch.bfloat16)
    for name in shape:
        weight = pair.base_weight(name)
        exact.add(name, weight)
        rounded.add(name, weight)
        if pair.tuned.shape[name] != shape[name]:
            report.lost[name] = None
            continue
        difference = pair.difference(name)
        num_differing, squares = int(difference.count_nonzero()), _squares(difference)
        if name in pair.targets:
            report.num_differing += num_differing
            report.num_target_elements += weight.numel()
            report.squares += squares
        elif num_differing:
            report.lost[name] = num_differing, math.sqrt(squares)
    facts = {
        "task": "causal_lm",
        "base": pair.base.name,
        "dtype": str(pair.dtype).removeprefix("torch."),
        "fingerprint": exact.hexdigest(),
        "fingerprint_bfloat16": rounded.hexdigest(),
        "shapes": {name: [math.prod(shape[name][:-1]), shape[name][-1]] for name in pair.targets},
    }
    return facts, report


def _squares(values: Tensor) -> float:
    """Sum of the squares of [n] fp32 values, in fp64, which only a chunk at a time is cast to."""
    return sum(float(chunk.double().square().sum()) for chunk in values.split(CHUNK))
