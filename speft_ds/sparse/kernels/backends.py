"""Sparse weight gradients: grad[i, j] = sum_t grad_y[t, i] * x[t, j] for (i, j) in the mask of one weight.

A backend is prepared once a mask and weight and then called once a backward:

    values = backend(x, grad_y)   # x [..., in], grad_y [..., out] -> values [k] fp32, in index order

`dense` is the reference and runs anywhere. `auto` takes what is cheapest for this mask by the costs that were
measured on this device (`measure.py`); without them, what is made for the device and the mask's granularity
where it pays by the rules of thumb below.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from speft_ds.errors import UserError
from speft_ds.sparse.kernels import triton_backends
from speft_ds.sparse.kernels.costs import KernelCosts
from speft_ds.sparse.kernels.torch_backends import (
    MAX_SAMPLED_DENSITY,
    ColumnGradient,
    ColumnsGradient,
    DenseGradient,
    RowGradient,
    SampledGradient,
)
from speft_ds.sparse.kernels.triton_backends import BlockGradient, ElementGradient
from speft_ds.sparse.mask import used_columns
from speft_ds.sparse.tiles import Tiles

Backend = Callable[[Tensor, Tensor], Tensor]

# To this one `element` is on a GPU, by what `triton_backends.BREAK_EVEN` comes to.
BREAK_EVEN_DENSITY = 0.0065
DEFAULT_TOKENS = 1024  # of a backward, where nobody says how many
# Measured costs so much apart are taken for equal: they were measured once, on a machine that may be busy.
TOLERANCE = 1.1
LINES = ("row", "column", "head", "channel")  # whose entries are rows or columns of each weight
MAX_SHARE = 0.5  # of the columns, to which `columns` was measured


def make_backend(
    name: str,
    index: Tensor,
    shape: tuple[int, int],
    tiles: Tiles | None = None,
    few_columns: bool = False,
    costs: KernelCosts | None = None,
    num_tokens: int = DEFAULT_TOKENS,
) -> tuple[str, Backend]:
    """Prepare the gradient of one weight's entries.

    Args:
        name: `dense`, `sampled`, `element`, `tiled`, `columns`, or `auto` for the one that should be fastest.
        index: [k] sorted flat indices, on the device of the activations.
        shape: (out_features, in_features) of the weight.
        tiles: what the mask was chosen by; None: single entries.
        few_columns: whether the mask was chosen to lie in few columns, for the rules of thumb.
        costs: of this device; None: `auto` goes by the rules of thumb.
        num_tokens: of a backward, about.
    Returns:
        (name of the backend, the backend).
    Raises:
        UserError: the named backend does not run on this device, or not with this mask.
    """
    if name == "auto" and costs is not None:
        _, backend_name, make = _cheapest(index, shape, tiles, costs, num_tokens)
        return backend_name, make()
    if name == "auto":
        return _by_rules(index, shape, tiles, few_columns)
    if backend := _make(name, index, shape, tiles):
        return name, backend
    where = {"sampled": "a CPU", "element": "an NVIDIA GPU with Triton"}.get(name, "masks of full tiles")
    raise UserError(
        f"train.sparse_backend={name} is for {where}", "train.sparse_backend", "train.sparse_backend=auto"
    )


def _make(name: str, index: Tensor, shape: tuple[int, int], tiles: Tiles | None):
    """The named backend; None where it does not run on this device, or not with this mask."""
    if name == "dense":
        return DenseGradient(index, shape)
    if name == "columns":
        return ColumnsGradient(index, shape)
    if name == "sampled" and index.device.type == "cpu":
        return SampledGradient(index, shape)
    if name == "element" and triton_backends.is_available():
        return ElementGradient(index, shape)
    if name == "tiled" and tiles is not None and tiles.largest > 1 and tiles.are_full(index):
        if tiles.width == shape[1]:
            return RowGradient(index, shape)
        if tiles.height == shape[0]:
            return ColumnGradient(index, shape)
        if triton_backends.is_available():
            return BlockGradient(index, shape, tiles)
    return None


def measured_cost(
    index: Tensor,
    shape: tuple[int, int],
    tiles: Tiles | None,
    costs: KernelCosts,
    num_tokens: int = DEFAULT_TOKENS,
) -> tuple[str, float]:
    """The backend that `auto` takes by measured costs, and its time over that of `dense`.

    Arguments as of `make_backend`.
    """
    cost, name, _ = _cheapest(index, shape, tiles, costs, num_tokens)
    return name, cost


def _cheapest(
    index: Tensor, shape: tuple[int, int], tiles: Tiles | None, costs: KernelCosts, num_tokens: int
) -> tuple[float, str, Callable[[], Backend]]:
    """(cost, name, what makes it) of what should be fastest; of about equal ones the first here."""

    def estimate(name: str, **features: float) -> float:
        return costs.estimate(name, shape, num_tokens, **features)

    numel, width = shape[0] * shape[1], shape[1]
    density, share = index.numel() / numel, used_columns(index, width).numel() / width
    found: list[tuple[float, str, Callable[[], Backend]]] = []
    tiled, element = (_make(name, index, shape, tiles) for name in ("tiled", "element"))
    if isinstance(tiled, BlockGradient):
        found.append((estimate("tiled", load=tiled.load), "tiled", lambda: tiled))
    elif tiled is not None:  # full rows or columns: a dense product of this share
        found.append((estimate("columns", share=tiled.share, density=0.0), "tiled", lambda: tiled))
    if element is not None:
        found.append((estimate("element", load=element.load), "element", lambda: element))
    if index.device.type == "cpu":
        cost = estimate("sampled", density=density)
        found.append((cost, "sampled", lambda: SampledGradient(index, shape)))
    found.append((1.0, "dense", lambda: DenseGradient(index, shape)))
    for kind, samples in (("columns", False), ("sampled columns", True)) if share <= MAX_SHARE else ():
        cost = estimate(kind, share=share, density=density)
        found.append((cost, "columns", lambda samples=samples: ColumnsGradient(index, shape, samples)))
    lowest = min(cost for cost, _, _ in found)
    return next(one for one in found if one[0] <= TOLERANCE * lowest)


def _by_rules(
    index: Tensor, shape: tuple[int, int], tiles: Tiles | None, few_columns: bool
) -> tuple[str, Backend]:
    on_cpu, density = index.device.type == "cpu", index.numel() / (shape[0] * shape[1])
    backend = _make("tiled", index, shape, tiles)
    if backend is not None and backend.pays:
        return "tiled", backend
    if few_columns and columns_pay(used_columns(index, shape[1]).numel() / shape[1], density, on_cpu):
        return "columns", ColumnsGradient(index, shape)
    if not on_cpu and (backend := _make("element", index, shape, tiles)) is not None and backend.pays:
        return "element", backend
    name = "sampled" if on_cpu and density <= MAX_SAMPLED_DENSITY else "dense"
    return name, _make(name, index, shape, tiles)


def columns_pay(share: float, density: float, on_cpu: bool) -> bool:
    """Whether entries in this share of the columns are faster by `columns` than one by one: a rule of thumb.

    Over the dense product: a sampled one on two CPU cores costs what benchmarks/kernels.py measured, of the
    columns as well; one on a GPU is reckoned to meet the dense one at BREAK_EVEN_DENSITY.
    """
    if not share:
        return False
    if on_cpu:
        return 1.2 * share * _sampled_cost(density / share) < _sampled_cost(density)
    return 1.2 * share < min(1.0, density / BREAK_EVEN_DENSITY)


def _sampled_cost(density: float) -> float:
    """Of a sampled product, or of the dense one where that is less."""
    return min(1.0, 0.06 + 4 * density)


def expected_backend(
    name: str,
    density: float,
    device: torch.device,
    granularity: str,
    block_size: int,
    compute: float | None = None,
    costs: KernelCosts | None = None,
    shape: tuple[int, int] = (1, 1),
    num_tokens: int = DEFAULT_TOKENS,
) -> str:
    """What `make_backend` should come to for an even mask of this density, to plan with.

    Args:
        compute: `mask.compute`, the share of the columns that have entries.
        costs, shape, num_tokens: as for `make_backend`; the shape matters for measured costs alone.
    """
    if name != "auto":
        return name
    on_cpu = device.type == "cpu"
    if costs is not None:
        return _expected_cheapest(density, granularity, compute or 1.0, costs, shape, num_tokens)
    if granularity in LINES and density <= 0.5:
        return "tiled"
    if granularity == "block" and not on_cpu:
        return "tiled" if density <= 0.007 * block_size else "dense"
    if compute is not None and columns_pay(compute, density, on_cpu):
        return "columns"
    if on_cpu:
        return "sampled" if density <= MAX_SAMPLED_DENSITY else "dense"
    return "element" if density <= BREAK_EVEN_DENSITY else "dense"


def _expected_cheapest(
    density: float,
    granularity: str,
    share: float,
    costs: KernelCosts,
    shape: tuple[int, int],
    num_tokens: int,
) -> str:
    def estimate(name: str, **features: float) -> float:
        return costs.estimate(name, shape, num_tokens, **features)

    found = {}
    if granularity in LINES:
        found["tiled"] = estimate("columns", share=density, density=0.0)
    elif granularity == "block":
        found["tiled"] = estimate("tiled", density=density)
    found |= {kind: estimate(kind, density=density) for kind in ("element", "sampled")}
    found["dense"] = 1.0
    if share <= MAX_SHARE:
        kinds = (estimate(kind, share=share, density=density) for kind in ("columns", "sampled columns"))
        found["columns"] = min(kinds)
    return next(name for name, cost in found.items() if cost <= TOLERANCE * min(found.values()))
