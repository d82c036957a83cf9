"""The layer gate: which weights train for a while. What is shut keeps its deltas and moments."""

from __future__ import annotations

from speft_ds.data.sampler import permutation
from speft_ds.model.targets import layer_number


class LayerSampler:
    """Drawn anew every `gate_every` steps, from the seed and the number of the period alone.

    `sampled`: `gate_layers` random decoder layers are open, and always what is in no layer (LISA, Pan et
    al., 2024).
    `half`: a random half of the weights is open (HFT, Hui et al., 2024).

    Attributes:
        open: names of the open weights; None where there is no gate.
    """

    def __init__(self, recipe, seed: int, names: list[str]):
        self.recipe, self.seed, self.names = recipe, seed, names
        self.open: frozenset[str] | None = None
        self.draw(0)

    def draw(self, step: int) -> None:
        """Open what is open at step `step` (from 0)."""
        period = step // self.recipe.gate_every
        if self.recipe.layer_gate == "half":
            order = permutation(len(self.names), self.seed, "layer_gate", period)
            self.open = frozenset(self.names[number] for number in order[: -(-len(order) // 2)])
        elif self.recipe.layer_gate == "sampled":
            layers = sorted({layer_number(name) for name in self.names} - {None})
            order = permutation(len(layers), self.seed, "layer_gate", period)
            chosen = {layers[number] for number in order[: self.recipe.gate_layers]} | {None}
            self.open = frozenset(name for name in self.names if layer_number(name) in chosen)

    def is_open(self, name: str) -> bool:
        """Whether a weight trains now; one that the gate was not told of always does."""
        return self.open is None or name in self.open or name not in self.names
