"""Tables of kernel costs that a test makes up."""

import itertools
import json

import torch

from speft_ds.sparse.kernels import measure
from speft_ds.sparse.kernels.costs import KernelCosts, Measurement

CLASSES = [((64, 64), 32), ((2048, 2048), 1024)]
MASKS = {  # backend -> (density, share, load)
    "sampled": [(0.001, 1.0, 0.0), (0.1, 1.0, 0.0), (0.4, 1.0, 0.0)],
    "columns": [(0.01, 0.1, 0.0), (0.05, 0.5, 0.0), (0.3, 0.5, 0.0)],
    "sampled columns": [(0.001, 0.1, 0.0), (0.01, 0.5, 0.0), (0.05, 0.5, 0.0)],
    "element": [(0.001, 1.0, 0.002), (0.01, 1.0, 0.015)],
    "tiled": [(0.01, 1.0, 0.002), (0.1, 1.0, 0.015)],
}


def table(device="a device", dtype="float32", **laws):
    """A table in which each backend costs what its law says.

    Args:
        laws: backend (`_` for a space) -> (density, share, load) -> time over `dense`, in every class.
    """
    rows = [
        Measurement(name.replace("_", " "), shape, num_tokens, *mask, law(*mask))
        for (name, law), (shape, num_tokens) in itertools.product(laws.items(), CLASSES)
        for mask in MASKS[name.replace("_", " ")]
    ]
    return KernelCosts(device, torch.__version__, dtype, 1.5, tuple(rows))


def sampling(is_cheap, **facts):
    """A table in which sampling pays nearly always, or never."""
    return table(sampled=lambda d, *_: 0.01 + d if is_cheap else 1.5 + d, **facts)


def keep(costs):
    """Put a table into the cache as its device's."""
    path = measure.cache_path(costs.device, costs.dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(costs.to_json()))
    return path
