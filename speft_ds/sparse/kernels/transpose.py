"""Copies with the tokens innermost, which products of single entries read."""

from __future__ import annotations

import weakref

from torch import Tensor


def transpose(x: Tensor) -> Tensor:
    """[..., features] -> [features, tokens], contiguous, in x's dtype."""
    return x.reshape(-1, x.shape[-1]).t().contiguous()


class SharedTranspose:
    """The transposed copy of one tensor for all that ask for it in a row; it goes when the tensor goes.

    Args:
        make: tensor -> its copy.
    """

    def __init__(self, make):
        self.make, self.of, self.copy = make, None, None

    def __call__(self, x: Tensor) -> Tensor:
        if self.of is None or self.of() is not x:
            self.copy = None  # before the next one is made
            self.copy, self.of = self.make(x), weakref.ref(x, self._forget)
        return self.copy

    def _forget(self, of: weakref.ref) -> None:
        if of is self.of:
            self.of = self.copy = None
