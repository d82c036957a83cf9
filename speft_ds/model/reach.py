"""What a text forward reaches: which weights it uses, and which of them hand over their gradient's factors.

A vision tower, cross-attention or a head for later tokens is never used; a fused kernel may take a module's
weight and bypass the module. Neither can be trained, so neither may get a part of the budget.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from speft_ds.model.attention import reads_packing
from speft_ds.model.fake_tensors import fake_tensors
from speft_ds.model.kinds.target import Target
from speft_ds.model.probe import embedding_gradient
from speft_ds.model.targets import (
    all_weights,
    fused_parts,
    layer_number,
    place,
    shorten,
    weight_elements,
    without_wrapper,
)
from speft_ds.model.weight_grad_hooks import gradients_past_hooks, weight_grad_hooks

WARN_BELOW = 0.9  # share of the decoder's elements
PROBE = [[0, 1, 0, 1], [0, 1, 0, 1]]  # tokens that every vocabulary has
ASKED = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]  # whose logits: does the first depend on later tokens?
MIN_NAMED, MAX_NAMED = 1e-2, 6  # share of a place that is worth a word, and how many are named


@dataclass(frozen=True)
class Reach:
    """How far training can reach.

    Attributes:
        fed: targets whose module hands over its gradient's factors, all there are.
        mixed: targets whose factors do not say which token is of which row, as those of experts.
        used: weights that the forward uses, of any kind.
        elements: weight -> its elements, of all weights.
        looks_ahead: whether a token's logits depend on the tokens after it, as those of BERT do.
    """

    fed: frozenset[str]
    mixed: frozenset[str]
    used: frozenset[str]
    elements: dict[str, int]
    looks_ahead: bool

    @property
    def decoder(self) -> list[str]:
        """The weights of the decoder: those that the forward uses, in its layers."""
        return [name for name in self.elements if name in self.used and layer_number(name) is not None]

    def coverage(self, targets: dict[str, Target]) -> float:
        """Share of the decoder's elements that are in targets."""
        decoder = self.decoder
        total = sum(self.elements[name] for name in decoder)
        return sum(self.elements[name] for name in decoder if name in targets) / max(1, total)

    def lines(self, targets: dict[str, Target], starved: list[str], are_chosen: bool) -> list[str]:
        """What a run says of it: how many weights, what share, what is left out, and a warning if it is much.

        Args:
            starved: what would be a target, but that no backward feeds.
            are_chosen: whether the recipe names the targets.
        """
        decoder, share = self.decoder, self.coverage(targets)
        inside = [name for name in decoder if name in targets]
        lines = [f"targets: {len(inside)} of {len(decoder)} weights, {share:.1%} of the decoder's elements"]
        if left := self._left_out(targets):
            lines[0] += f"; not trained: {', '.join(left)}"
        modules = dict.fromkeys(place(name)[1] for name in inside)
        if fused := [parts for module in modules if (parts := fused_parts(module)) != module]:
            lines.append(f"note: trained as one matrix each: {', '.join(fused)}")
        if unused := [name for name in starved if name not in self.used]:
            lines.append(f"note: {len(unused)} weights have no part in a text forward: {shorten(unused)}")
        if bypassed := [name for name in starved if name in self.used]:
            lines.append(f"note: not used as linear layers alone, so not trained: {shorten(bypassed)}")
        if share < WARN_BELOW:
            more = "mask.targets=null mask.layers=null trains more" if are_chosen else "see docs/models.md"
            lines.append(f"warning: {1 - share:.0%} of the decoder is never trained: {more}")
        return lines

    def _left_out(self, targets: dict[str, Target]) -> list[str]:
        """Places in the decoder without a target, the largest first: `mamba.dt_proj (24 weights, 3.1%)`."""
        total, places = sum(self.elements[name] for name in self.decoder), {}
        for name in self.decoder:
            if name not in targets:
                places.setdefault(place(name)[1], []).append(self.elements[name] / total)
        named = [(where, shares) for where, shares in places.items() if sum(shares) >= MIN_NAMED]
        named.sort(key=lambda item: -sum(item[1]))
        return [f"{where} ({len(shares)} weights, {sum(shares):.1%})" for where, shares in named[:MAX_NAMED]]


class _Uses(TorchFunctionMode):
    """Records which of some weights are arguments of anything but a view."""

    def __init__(self, weights: dict[str, nn.Parameter]):
        super().__init__()
        self.names = {id(weight): name for name, weight in weights.items()}
        self.used: set[str] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in (*args, *(kwargs or {}).values()):
            if isinstance(value, Tensor) and isinstance(out, Tensor):
                for tensor in (value, value._base):
                    if id(tensor) in self.names and out._base is not tensor:
                        self.used.add(self.names[id(tensor)])
        return out


def find_reach(
    model: nn.Module, targets: dict[str, Target], after_backward: Callable[[], None] = lambda: None
) -> Reach:
    """Ask the model itself: the logits of two rows, and their gradient, in evaluation mode.

    Args:
        model: adapted (see `Target.adapt`), of real or of fake tensors; sharded, it is in its engine, and
            all ranks call this.
        after_backward: called after the backward.
    Raises:
        RuntimeError: of fake tensors, a forward that depends on values.
    """
    weights = {without_wrapper(name): weight for name, weight in model.named_parameters()}
    fed, mixed = set(), set()

    def see(name: str, x: Tensor, rows: Tensor | None = None, ends: Tensor | None = None) -> None:
        fed.add(name)
        if rows is None:
            return
        if ends is not None or x.dim() != 3 or len(x) != len(PROBE):
            mixed.add(name)

    embedding = model.get_input_embeddings().weight  # whose output the probe cuts off
    fed |= {name for name, target in targets.items() if target.weight is embedding}
    hooks = {name: partial(see, name) for name in targets}
    uses = _Uses(weights)
    device = next(model.parameters()).device
    ids = torch.tensor(PROBE, device=device)
    asked = torch.tensor(ASKED, device=device)
    with weight_grad_hooks(targets, hooks), gradients_past_hooks(targets) as past:
        gradient = embedding_gradient(model, uses, asked, input_ids=ids)
        after_backward()
    has_values = not (gradient.is_meta or isinstance(gradient, FakeTensor))
    looks_ahead = has_values and bool(gradient[0, 1:].any())
    used = frozenset(uses.used | fed)
    return Reach(frozenset(fed - past), frozenset(mixed), used, weight_elements(model), looks_ahead)


def reach_without_values(make_model: Callable[[], nn.Module], names: list[str]) -> Reach | None:
    """The reach of a model that is made for the purpose, of fake tensors or else on the meta device.

    Args:
        names: of the weights that may be targets.
    Returns:
        None where its code computes with values, which neither has.
    """
    for device in (fake_tensors(), torch.device("meta")):
        try:
            with device, reads_packing(False):
                model = make_model().requires_grad_(False)
                weights = all_weights(model)
                for target in weights.values():
                    target.adapt()
                return find_reach(model, {name: weights[name] for name in names})
        except Exception:  # any type: the code of hundreds of families runs
            continue
    return None
