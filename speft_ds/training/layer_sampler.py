"""Layer sampling: which weights train for a while. The others keep their deltas and moments."""

from __future__ import annotations

from speft_ds.config.mask_config import MaskConfig
from speft_ds.data.sampler import permutation
from speft_ds.model.targets import layer_number


class LayerSampler:
    """Samples anew every `gate_every` steps, from the seed and the number of the period alone.

    `sampled`: `gate_layers` random decoder layers are active, and always what is in no layer (LISA, Pan et
    al., 2024).
    `half`: a random half of the weights is active (HFT, Hui et al., 2024).

    Attributes:
        active: names of the active weights; None where nothing is sampled.
    """

    def __init__(self, mask: MaskConfig, seed: int, names: list[str]):
        self.mask, self.seed, self.names = mask, seed, names
        self.active: frozenset[str] | None = None
        self.resample(0)

    def resample(self, step: int) -> None:
        """Choose what is active at step `step` (from 0)."""
        period = step // self.mask.gate_every
        if self.mask.layer_gate == "half":
            order = permutation(len(self.names), self.seed, "layer_gate", period)
            self.active = frozenset(self.names[number] for number in order[: -(-len(order) // 2)])
        elif self.mask.layer_gate == "sampled":
            layers = sorted({layer_number(name) for name in self.names} - {None})
            order = permutation(len(layers), self.seed, "layer_gate", period)
            chosen = {layers[number] for number in order[: self.mask.gate_layers]} | {None}
            self.active = frozenset(name for name in self.names if layer_number(name) in chosen)

    def is_active(self, name: str) -> bool:
        """Whether a weight trains now; one that is not sampled always does."""
        return self.active is None or name in self.active or name not in self.names
