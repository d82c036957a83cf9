"""Kinds of weights that may be trained: how each is seen as a matrix, and how its gradient is seen.

A weight is a matrix as it is stored: its last dimension is the columns, all others are the rows. A stack of
experts [experts, out, in] is the matrix [experts x out, in]. So masks, owners and adapters know flat indices
only. `find_weights` asks the kinds in order; a new kind is a new module here and a line in `KINDS`.
"""

from __future__ import annotations

from torch import nn

from speft_ds.model.kinds import conv1d, experts, linear, linear_subclass, quantised
from speft_ds.model.kinds.target import Target

KINDS = (linear, linear_subclass, conv1d, experts)


def find_weights(module: nn.Module) -> dict[str, Target]:
    """The weights of a module itself, not of its children, that may be trained, by attribute."""
    if isinstance(module, quantised.QuantisedLinear):
        return {"weight": quantised.QuantisedTarget(module, "weight", quantised)}
    for kind in KINDS:
        if found := kind.find(module):
            # A computed one, as of a weight norm, is no parameter.
            return {name: Target(module, name, kind) for name in found if name in module._parameters}
    return {}
