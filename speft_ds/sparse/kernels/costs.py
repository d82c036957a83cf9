"""What the sparse backends cost on a device, as it was measured: a table, and estimates from it.

Everything is over the time of the `dense` backend for the same weight and tokens. A backend's cost is taken
to grow linearly with what bounds it, within a class of shapes and tokens.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter

FORMAT_VERSION = 1  # of the table; also what is measured and how

Size = Annotated[int, Field(gt=0)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Measurement:
    """One backend on one mask.

    Attributes:
        backend: `sampled`, `element`, `tiled` (blocks), `columns` with a dense product inside, or
            `sampled columns`.
        shape: (out_features, in_features).
        density: entries over elements.
        share: columns with entries over all of them.
        load: features moved per token over elements, of the Triton backends; 0 of the others.
        over_dense: time over that of `dense`.
    """

    backend: str
    shape: tuple[Size, Size]
    num_tokens: Size
    density: Amount
    share: Amount
    load: Amount
    over_dense: Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class KernelCosts:
    """The costs that were measured on one device.

    Attributes:
        device: its name, with all that its speed depends on.
        torch: version; `dtype`: of the activations, as in a recipe.
        seconds: that the measurement took.
    """

    device: str
    torch: str
    dtype: str
    seconds: Amount
    measurements: tuple[Measurement, ...]

    def estimate(self, backend: str, shape: tuple[int, int], num_tokens: int, **features: float) -> float:
        """The time of a backend over that of `dense`; infinity where it was not measured.

        Args:
            features: what bounds it: `density`, `share`, `load`.
        """
        own = self._class_of(backend, shape, num_tokens)
        if not own:
            return math.inf
        coefficients = _fit(own, tuple(sorted(features)))
        return sum(a * b for a, b in zip(coefficients, [1.0, *_values(features)], strict=True))

    def max_density(self, backend: str, shape: tuple[int, int], num_tokens: int) -> float:
        """The density up to which a backend is faster than `dense`, from 0 to 1."""
        at_0, at_1 = (self.estimate(backend, shape, num_tokens, density=d) for d in (0.0, 1.0))
        if at_0 >= 1 or at_1 <= 1:
            return float(at_1 <= 1)
        return (1 - at_0) / (at_1 - at_0)

    def _class_of(self, backend: str, shape: tuple[int, int], num_tokens: int) -> tuple[Measurement, ...]:
        """The measurements of a backend whose shape and tokens are nearest."""

        def distance(one: Measurement) -> float:
            size = math.log2(math.prod(shape) / math.prod(one.shape))
            return abs(size) + abs(math.log2(max(1, num_tokens) / one.num_tokens))

        rows = [one for one in self.measurements if one.backend == backend]
        best = min(rows, key=distance, default=None)
        return tuple(one for one in rows if (one.shape, one.num_tokens) == (best.shape, best.num_tokens))

    @property
    def classes(self) -> list[tuple[tuple[int, int], int]]:
        """(shape, tokens) that were measured, in their order."""
        return list(dict.fromkeys((one.shape, one.num_tokens) for one in self.measurements))

    @property
    def sha256(self) -> str:
        """Hash of the table."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, document: Any) -> KernelCosts:
        """The table in a JSON document. Raises ValueError: it is none of this version."""
        version = document.get("format_version") if isinstance(document, dict) else None
        if version != FORMAT_VERSION:
            raise ValueError(f"not a table of kernel costs of version {FORMAT_VERSION}")
        return _ADAPTER.validate_python(document)


_ADAPTER = TypeAdapter(KernelCosts)


def _values(features: dict[str, float]) -> list[float]:
    return [features[name] for name in sorted(features)]


@lru_cache(maxsize=512)
def _fit(rows: Sequence[Measurement], names: tuple[str, ...]) -> list[float]:
    """Coefficients of 1 and of each feature, none negative: no feature makes a product cheaper.

    Least squares of the relative errors. The few features allow to try every set of them.
    """
    costs = torch.tensor([one.over_dense for one in rows], dtype=torch.float64)
    values = [[1.0, *(getattr(one, name) for name in names)] for one in rows]
    matrix = torch.tensor(values, dtype=torch.float64) / costs[:, None]
    ones, best, best_error = torch.ones_like(costs), [0.0] * matrix.shape[1], math.inf
    for size in range(1, matrix.shape[1] + 1):
        for chosen in itertools.combinations(range(matrix.shape[1]), size):
            part = matrix[:, chosen]
            found = torch.linalg.pinv(part) @ ones
            error = float((part @ found - ones).square().sum())
            if bool((found >= 0).all()) and error < best_error - 1e-12:
                best, best_error = [0.0] * matrix.shape[1], error
                for place, value in zip(chosen, found.tolist(), strict=True):
                    best[place] = value
    return best
