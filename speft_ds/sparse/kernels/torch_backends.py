"""Backends in plain torch: dense products on any device, sampled ones (SDDMM) on a CPU."""

from __future__ import annotations

import sys
import warnings
import weakref
from itertools import pairwise

import torch
from torch import Tensor

from speft_ds.sparse.mask import used_columns

# Elements of the dense gradient alive at once: a full-size weight gradient never is.
BLOCK_ELEMENTS = {"cpu": 2**21, "cuda": 2**25}  # on a GPU few launches count more
# To this density `sampled` is faster than `dense` at every shape of benchmarks/kernels.py.
MAX_SAMPLED_DENSITY = 0.1
# Of one sampled product, at most: what is longer falls out of the cache before it is used again.
MAX_TOKENS, MAX_INPUT_BYTES = 1024, 6 * 2**20


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with fp32 accumulation and an fp32 result, whatever the inputs' dtype."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def whole_gradient(*factors: Tensor) -> Tensor:
    """[numel] fp32 the complete gradient of a weight.

    Args:
        factors: as a `WeightGradHook` is called: with the gradient itself, or with its factors.
    """
    if len(factors) == 1:
        return factors[0].to(torch.float32).flatten()
    columns, rows, *ends = factors
    if not ends:
        return matmul_fp32(rows.flatten(0, -2).t(), columns.flatten(0, -2)).flatten()
    bounds = [0, *ends[0].tolist()]
    parts = [matmul_fp32(rows[a:b].t(), columns[a:b]) for a, b in pairwise(bounds)]
    return torch.stack(parts).flatten()


class DenseGradient:
    """The reference: the dense weight gradient, a block of rows at a time, and a gather.

    Args:
        index: [k] sorted flat indices.
        shape: (out_features, in_features) of the weight.
    """

    def __init__(self, index: Tensor, shape: tuple[int, int]):
        self.out_features, self.in_features = shape
        self.index = index
        self.block = max(1, BLOCK_ELEMENTS[index.device.type] // max(1, self.in_features))
        edges = torch.arange(0, self.out_features, self.block, dtype=torch.int64) * self.in_features
        positions = torch.searchsorted(index.to("cpu", torch.int64), edges)
        self.bounds = [*positions.tolist(), index.numel()]

    def __call__(self, x: Tensor, grad_y: Tensor) -> Tensor:
        x, grad_y = x.flatten(0, -2), grad_y.flatten(0, -2)
        values = torch.empty(self.index.numel(), dtype=torch.float32, device=x.device)
        for number, row in enumerate(range(0, self.out_features, self.block)):
            start, stop = self.bounds[number], self.bounds[number + 1]
            if start == stop:
                continue
            gradient = matmul_fp32(grad_y[:, row : row + self.block].t(), x)  # [block, in]
            local = self.index[start:stop].to(torch.int64) - row * self.in_features
            torch.take(gradient, local, out=values[start:stop])
        return values


class RowGradient:
    """Gradient of full rows.

    Attributes:
        share: of all rows; `pays`: whether it should be faster than the dense product.
    """

    def __init__(self, index: Tensor, shape: tuple[int, int]):
        self.rows = torch.div(index[:: shape[1]], shape[1], rounding_mode="floor")
        self.share = self.rows.numel() / shape[0]
        self.pays = 2 * self.share <= 1

    def __call__(self, x: Tensor, grad_y: Tensor) -> Tensor:
        chosen = grad_y.reshape(-1, grad_y.shape[-1])[:, self.rows]
        return matmul_fp32(chosen.t(), x.reshape(-1, x.shape[-1])).view(-1)


class ColumnGradient:
    """Gradient of full columns.

    Attributes:
        share: of all columns; `pays`: whether it should be faster than the dense product.
    """

    def __init__(self, index: Tensor, shape: tuple[int, int]):
        self.columns = index[: index.numel() // shape[0]].clone()  # of the first row, not a view of them all
        self.in_features = shape[1]
        self.share = self.columns.numel() / shape[1]
        self.pays = 2 * self.share <= 1

    def __call__(self, x: Tensor, grad_y: Tensor) -> Tensor:
        """As of the others; `x` may also be its columns alone."""
        x = x.reshape(-1, x.shape[-1])
        chosen = x if x.shape[1] != self.in_features else x[:, self.columns]
        return matmul_fp32(grad_y.reshape(-1, grad_y.shape[-1]).t(), chosen).view(-1)


class RowsOfGradient:
    """Rows of a gradient that autograd, or the loss at the head, makes itself.

    Args:
        rows: [n] int64, sorted.
    """

    def __init__(self, rows: Tensor):
        self.rows = rows

    def __call__(self, gradient: Tensor) -> Tensor:
        """[rows, in] of all rows, also as a sparse tensor, or of these alone -> [n * in] fp32."""
        if gradient.is_sparse:  # [tokens] rows, [tokens, in] values; a product adds them in a fixed order
            row, values = gradient._indices()[0], gradient._values()
            is_ours = torch.isin(row, self.rows)
            chosen = (self.rows[:, None] == row[is_ours]).float() @ values[is_ours].float()
        else:
            chosen = gradient if len(gradient) == len(self.rows) else gradient[self.rows]
        return chosen.float().flatten()


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


def transpose_fp32(x: Tensor) -> Tensor:
    """[..., features] -> [features, tokens] fp32: transposed first, while it is narrow."""
    flat = x.reshape(-1, x.shape[-1])
    if flat.dtype != torch.bfloat16 or not _has_pairs(flat):
        return flat.t().contiguous().float()
    # Two features move as one int32, a fifth faster. A bfloat16 is the upper half of its float32, and the
    # first of a pair is the pair's lower half.
    pairs = flat.view(torch.int32).t().contiguous()
    halves = pairs.new_empty(pairs.shape[0], 2, pairs.shape[1])
    torch.bitwise_left_shift(pairs, 16, out=halves[:, 0])
    torch.bitwise_and(pairs, -(1 << 16), out=halves[:, 1])
    return halves.view(torch.float32).flatten(0, 1)


def _has_pairs(flat: Tensor) -> bool:
    """Whether a [tokens, features] tensor of two bytes an element can be seen as one of four, as it lies."""
    evens = (flat.shape[1], flat.stride(0), flat.storage_offset())
    return sys.byteorder == "little" and flat.stride(1) == 1 and all(number % 2 == 0 for number in evens)


def split_for_cache(x: Tensor, in_features: int) -> tuple[Tensor, ...]:
    """[..., features], input or gradient of a layer -> views [tokens of one product, features]."""
    flat = x.reshape(-1, x.shape[-1])
    num_tokens = flat.shape[0]
    num_parts = max(1, -(-num_tokens // MAX_TOKENS), -(-4 * num_tokens * in_features // MAX_INPUT_BYTES))
    return flat.chunk(num_parts)


shared_transpose = SharedTranspose(
    lambda x: [transpose_fp32(part) for part in split_for_cache(x, x.shape[-1])]
)


class SampledGradient:
    """`torch.sparse.sampled_addmm` on a CSR pattern that is laid out once a mask, for a CPU.

    The product takes the dot product of two rows of [features, tokens] for each entry. torch has it in fp32
    only; the casts also give fp32 accumulation to bf16 activations. Arguments as for `DenseGradient`.

    Args:
        columns: [in_features] of a wider input, those that the weight's columns stand for; None: all.
    """

    def __init__(self, index: Tensor, shape: tuple[int, int], columns: Tensor | None = None):
        out_features, in_features = shape
        self.in_features, self.columns = in_features, columns
        rows = torch.div(index, in_features, rounding_mode="floor")
        columns = index - rows * in_features
        row_starts = torch.zeros(out_features + 1, dtype=index.dtype, device=index.device)
        row_starts[1:] = torch.cumsum(torch.bincount(rows, minlength=out_features), 0)
        zeros = torch.zeros(index.numel(), dtype=torch.float32, device=index.device)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            self.pattern = torch.sparse_csr_tensor(
                row_starts, columns, zeros, size=shape, check_invariants=True
            )

    def __call__(self, x: Tensor, grad_y: Tensor) -> Tensor:
        total, width = None, self.in_features
        if x.shape[-1] == width:
            inputs = shared_transpose(x)
        else:  # chosen from the transposed view: a column is read once, and written where it belongs
            inputs = [part.t()[self.columns].float() for part in split_for_cache(x, width)]
        for x_t, part in zip(inputs, split_for_cache(grad_y, width), strict=True):
            product = torch.sparse.sampled_addmm(self.pattern, transpose_fp32(part), x_t.t(), beta=0.0)
            total = product.values() if total is None else total.add_(product.values())
        return total


def samples_columns(num_entries: int, num_elements: int, device: str) -> bool:
    """Whether entries among so many elements of their columns are sampled: on a `cpu`, where they are few."""
    return device == "cpu" and 0 < num_entries <= MAX_SAMPLED_DENSITY * num_elements


class ColumnsGradient:
    """Gradient of entries in few columns: the product with these columns alone.

    On a CPU a sampled one, where the entries are sparse in their columns, too; else a dense one and a gather.

    Args:
        samples: whether it is a sampled one; None: by a rule of thumb.

    Attributes:
        columns: [n] int64, those with entries: all of its input that it needs.
    """

    def __init__(self, index: Tensor, shape: tuple[int, int], samples: bool | None = None):
        rows = torch.div(index, shape[1], rounding_mode="floor")
        column = (index - rows * shape[1]).to(torch.int64)
        self.in_features = shape[1]
        self.columns = used_columns(index, shape[1])
        width = self.columns.numel()
        place = torch.zeros(shape[1], dtype=index.dtype, device=index.device)
        place[self.columns] = torch.arange(width, dtype=index.dtype, device=index.device)
        cut, narrow = rows * width + place[column], (shape[0], width)
        if samples is None:
            samples = samples_columns(index.numel(), shape[0] * width, index.device.type)
        if samples:
            self.product = SampledGradient(cut, narrow, self.columns)
        else:
            self.product = DenseGradient(cut, narrow)

    def __call__(self, x: Tensor, grad_y: Tensor) -> Tensor:
        """As of the others; `x` may also be its columns alone."""
        is_cut = x.shape[-1] != self.in_features
        if is_cut or isinstance(self.product, SampledGradient):
            return self.product(x, grad_y)
        return self.product(x[..., self.columns], grad_y)
