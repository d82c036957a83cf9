"""The ZeRO-3 parameters that the weights of a model are stored in: one each, or three for one in few bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from speft_ds.model.codecs import Codec
from speft_ds.model.codecs.base import CHUNK, DEVICE_CHUNK
from speft_ds.tools.plan.geometry import Geometry

WEIGHTS, CODES, SCALES, VALUES = "weights", "code bytes", "scales", "values"  # kinds of elements
DECODING = 6  # bytes for each weight of a chunk that is being decoded: pairs of codes, and their levels


@dataclass(frozen=True)
class Parameter:
    """A ZeRO-3 parameter: what its elements are, how many bytes each takes, whether it may stay gathered."""

    kind: str
    numel: int
    itemsize: int
    may_persist: bool

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize

    def shard_bytes(self, world_size: int) -> int:
        """Of each rank's shard, padding included."""
        return -(-self.numel // world_size) * self.itemsize


@dataclass(frozen=True, eq=False)
class Storage:
    """How the weights are stored in a phase of a run.

    Attributes:
        itemsize: bytes of the model's dtype.
        codec: of the weights in few bits; None: there are none.
        has_values: whether values of trained entries lie beside these.
        is_dense: whether they are complete besides, for a metric that changes every weight.
    """

    geometry: Geometry
    itemsize: int
    world_size: int
    codec: Codec | None = None
    has_values: bool = True
    is_dense: bool = False

    @property
    def in_few_bits(self) -> dict[str, tuple[int, int]]:
        """Name -> (out, in)."""
        return {} if self.codec is None else self.geometry.plain_linears

    @cached_property
    def by_weight(self) -> dict[str, dict[str, Parameter]]:
        """Weight -> its parameters by name, in the order in which they are made."""
        return {
            name: self._coded(name) if name in self.in_few_bits else self._plain(name)
            for name in self.geometry.numel
        }

    def _plain(self, name: str) -> dict[str, Parameter]:
        is_written = name in self.geometry.trained
        return {name: Parameter(WEIGHTS, self.geometry.numel[name], self.itemsize, not is_written)}

    def _coded(self, name: str) -> dict[str, Parameter]:
        num_codes, num_scales = self.codec.sizes(self.in_few_bits[name])
        prefix, world_size = name.removesuffix("weight"), self.world_size
        found = {
            f"{prefix}packed": Parameter(CODES, num_codes, 1, True),
            f"{prefix}scales": Parameter(SCALES, num_scales, self.codec.scale_dtype.itemsize, True),
        }
        num_entries = self.geometry.entries.get(name, 0)
        if self.has_values and num_entries:
            # Room for as many entries per rank as the one with most has: here, as if all had equally many.
            numel = -(-num_entries // world_size) * world_size
            found[f"{prefix}values"] = Parameter(VALUES, numel, self.itemsize, False)
        if self.is_dense:
            found[f"{prefix}dense"] = Parameter(WEIGHTS, self.geometry.numel[name], self.itemsize, False)
        return found

    def parameters(self, weights: Iterable[str] | None = None) -> dict[str, Parameter]:
        """The parameters of these weights by name, in the order in which they are made; None: of all."""
        weights = self.by_weight if weights is None else weights
        in_order = sorted(weights, key=lambda name: name in self.in_few_bits)
        return {name: one for weight in in_order for name, one in self.by_weight[weight].items()}

    def decoded_bytes(self, weight: str, device: str) -> int:
        """What a weight takes while its module computes, besides what it is stored in."""
        if weight not in self.in_few_bits or self.is_dense:
            return 0
        numel = self.geometry.numel[weight]
        chunk = min(numel, CHUNK if device == "cpu" else DEVICE_CHUNK)
        return numel * self.itemsize + DECODING * chunk


def count_elements(parameters: Iterable[Parameter]) -> Counter[tuple[str, int]]:
    """(kind, bytes of each) -> how many elements."""
    found: Counter[tuple[str, int]] = Counter()
    for parameter in parameters:
        found[parameter.kind, parameter.itemsize] += parameter.numel
    return found


def num_bytes(counts: Counter[tuple[str, int]]) -> int:
    """Bytes of the elements that `count_elements` counts."""
    return sum(count * size for (_, size), count in counts.items())


def added_up(counts: Counter[tuple[str, int]]) -> str:
    """How these bytes add up: `3,200 code bytes x 1 B + 100 scales x 4 B`."""
    return " + ".join(f"{count:,} {kind} x {size} B" for (kind, size), count in counts.items() if count)
