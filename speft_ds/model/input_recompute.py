"""Inputs of linear layers for their backward: recomputed where that is cheap, else saved.

A frozen layer saves no input, and a sparse weight gradient needs it. In Llama-like models it is mostly the
product of tensors that the frozen model saves anyway: a norm's output, or an activation times a gate. Such
an input is multiplied again, by the same operations on the same values and so to the same bits. Layers with
one input (q, k, v; gate, up) compute it once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from speft_ds.zero.shards import HOOK_GRAD_FNS, full_shape

PASSTHROUGH_GRAD_FNS = HOOK_GRAD_FNS  # autograd nodes that return a tensor unchanged
MAX_RECOMPUTE_DEPTH = 6  # operations that are done again at most
MIN_SIZE_RATIO = 16  # a weight is kept beside an input that has so many times its elements

GATHERED = "speft_ds_gathered"  # attribute of a norm's weight

RecomputeFn = Callable[[], Tensor]  # makes a tensor again


def keep_norms(model: nn.Module) -> None:
    """Have the weights of norms at hand in every forward, also where ZeRO-3 frees them after their own.

    So the same inputs are made again in all forwards. That matters where the result depends on it: with
    activations in few bits, on which an input made again is not the input packed. Takes some vectors a layer.
    """

    def keep(norm: nn.Module, inputs: tuple) -> None:
        for weight in norm.parameters(recurse=False):
            setattr(weight, GATHERED, weight.detach())

    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and all(len(full_shape(weight)) == 1 for weight in own):
            module.register_forward_pre_hook(keep)  # after that of ZeRO-3, which gathers


class LayerInput:
    """An input between forward and backward, shared by the layers that have it.

    Args:
        x: [..., in] as a layer got it, in its forward.
        may_recompute: False saves it in any case: activation checkpointing allows one look at what was saved.
    Attributes:
        is_saved: whether the layer must save x.
    """

    def __init__(self, x: Tensor, may_recompute: bool):
        node, output = _source(x.grad_fn, x.output_nr)
        # Layers hold the function, never the node's own `metadata` does: that would be a cycle through C++.
        self.recompute = (
            _recompute_fn(node, x.numel() // MIN_SIZE_RATIO, MAX_RECOMPUTE_DEPTH) if may_recompute else None
        )
        self.is_saved = self.recompute is None
        key = f"speft_ds.input.{output}"
        self.shared = _Shared() if node is None else node.metadata.setdefault(key, _Shared())
        self.shared.num_users += 1
        self.is_cut = False

    def to_save(self, x: Tensor, columns: Tensor | None) -> list[Tensor]:
        """What of x the layer saves: nothing, x, or its columns where that is all that the layer needs."""
        if not self.is_saved:
            return []
        if columns is None:
            return [x]
        self.is_cut = True
        self.shared.num_users -= 1  # it has a tensor of its own
        return [x[..., columns]]

    def value(self, saved: tuple[Tensor, ...]) -> Tensor:
        """The input again, one and the same tensor for all layers that have it; each asks once.

        Args:
            saved: what `to_save` gave.
        """
        if self.is_cut:
            return saved[0]
        shared = self.shared
        if shared.x is None:
            with torch.no_grad():
                shared.x = saved[0] if saved else self.recompute()
        x = shared.x
        shared.num_users -= 1
        if shared.num_users <= 0:
            shared.x = None
        return x


class _Shared:
    """What the layers with one input have in common."""

    def __init__(self):
        self.num_users, self.x = 0, None


def _source(node, output: int = 0):
    """The operation that made a tensor, behind hooks, and the number of the tensor among its outputs."""
    while node is not None and node.name() in PASSTHROUGH_GRAD_FNS:
        node, output = node.next_functions[0]
    return node, output


def _recompute_fn(node, max_kept: int, depth: int) -> RecomputeFn | None:
    """How to make a tensor again by products and casts of what is saved for their own backward, if so."""
    node, _ = _source(node)
    if node is None or depth == 0:
        return None
    if node.name() == "ToCopyBackward0":
        recompute, dtype = (
            _recompute_fn(node.next_functions[0][0], max_kept, depth - 1),
            node._input_metadata[0].dtype,
        )
        return None if recompute is None else lambda: recompute().to(dtype)
    if node.name() != "MulBackward0":
        return None
    left = _recompute_factor(node, "_saved_self", 0, max_kept, depth)
    right = _recompute_factor(node, "_saved_other", 1, max_kept, depth)
    return None if left is None or right is None else lambda: left() * right()


def _recompute_factor(node, name: str, edge: int, max_kept: int, depth: int) -> RecomputeFn | None:
    """One factor of a product, by the name and the number that its node knows it by.

    It is saved if the other factor needs a gradient. That, and whether it needs one itself, is read off the
    edges: to look at what is saved may mean to unpack it (`stash`).
    """
    source, others_source = node.next_functions[edge][0], node.next_functions[1 - edge][0]
    if others_source is None:
        return _recompute_fn(source, max_kept, depth - 1)
    if source is not None and not isinstance(getattr(source, "variable", None), nn.Parameter):
        return lambda: getattr(node, name).detach()
    # A weight, as a norm's. A small one can be kept, if ZeRO-3 did not free it: it does in its first
    # pass, and in all where `stage3_param_persistence_threshold` is lower, but for `keep_norms`.
    saved = getattr(node, name)
    saved = getattr(saved, GATHERED, saved).detach()
    weight = saved.clone() if 0 < saved.numel() <= max_kept else None
    return None if weight is None else lambda: weight
