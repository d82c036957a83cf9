"""Each sparse gradient backend against the dense product in fp64."""

import pytest
import torch

from speft_ds.errors import UserError
from speft_ds.sparse.kernels.backends import make_backend
from speft_ds.sparse.kernels.torch_backends import (
    ColumnGradient,
    RowGradient,
    shared_transpose,
    split_for_cache,
    transpose_fp32,
)
from speft_ds.sparse.tiles import Tiles


@pytest.mark.parametrize("name", ["dense", "sampled", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (64, 1), (1, 33), (37, 53), (3000, 1031)])
@pytest.mark.parametrize("density", [0.0, 0.01, 1.0])
def test_backend_equals_the_dense_gradient(name, dtype, shape, density):
    generator = torch.Generator().manual_seed(0)
    out_features, in_features = shape
    numel = out_features * in_features
    count = round(density * numel)
    index = torch.randperm(numel, generator=generator)[:count].sort().values.to(torch.int32)
    x = torch.randn(19, in_features, generator=generator).to(dtype)
    grad_y = torch.randn(19, out_features, generator=generator).to(dtype)
    expected = (grad_y.double().t() @ x.double()).view(-1)[index.long()]
    _, backend = make_backend(name, index, shape)
    values = backend(x, grad_y)
    assert values.dtype == torch.float32 and values.shape == (count,)
    assert torch.allclose(values.double(), expected, atol=1e-4)
    if (columns := getattr(backend, "columns", None)) is not None:  # all that has to be saved of the input
        assert torch.equal(backend(x[:, columns], grad_y), values)
        assert set(columns.tolist()) == {position % in_features for position in index.tolist()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "columns", "num_parts"),
    [((2, 700), 53, 2), ((1, 1024), 53, 1), ((3, 1025), 53, 4), ((1, 0), 53, 1), ((5, 205), 3001, 2)],
)
def test_long_sequences_and_wide_inputs_are_multiplied_in_parts(dtype, shape, columns, num_parts):
    _, backend = make_backend("sampled", index := entries(0.1, (37, columns)), (37, columns))
    x, grad_y = torch.randn(*shape, columns).to(dtype), torch.randn(*shape, 37).to(dtype)
    assert len(split_for_cache(grad_y, columns)) == num_parts
    expected = (grad_y.double().flatten(0, 1).t() @ x.double().flatten(0, 1)).view(-1)[index.long()]
    assert torch.allclose(backend(x, grad_y).double(), expected, atol=1e-3)


def entries(density: float, shape: tuple[int, int] = (40, 50)) -> torch.Tensor:
    numel = shape[0] * shape[1]
    return torch.randperm(numel)[: round(density * numel)].sort().values.to(torch.int32)


def test_auto_is_by_density_and_granularity():
    assert make_backend("auto", entries(0.005), (40, 50))[0] == "sampled"
    assert make_backend("auto", entries(0.5), (40, 50))[0] == "dense"
    assert make_backend("dense", entries(0.005), (40, 50))[0] == "dense"
    in_two_columns = torch.arange(0, 2000, 50).repeat_interleave(2)[:60:2].int()
    assert make_backend("auto", in_two_columns, (40, 50), few_columns=True)[0] == "columns"
    rows = Tiles.of("row", 1, (40, 50))
    assert make_backend("auto", rows.entries(torch.tensor([3, 7])).int(), (40, 50), rows)[0] == "tiled"
    assert make_backend("auto", entries(0.005), (40, 50), rows)[0] == "sampled"  # a loaded mask, say


@pytest.mark.parametrize(
    ("granularity", "shape", "kind"),
    [
        ("row", (37, 53), RowGradient),
        ("row", (1, 9), RowGradient),
        ("column", (37, 53), ColumnGradient),
        ("column", (9, 1), RowGradient),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_columns_equal_the_dense_gradient(granularity, shape, kind, dtype):
    tiles = Tiles.of(granularity, 1, shape)
    index = tiles.entries(torch.tensor([0, 7, 36])[: tiles.num_tiles]).int()
    x, grad_y = torch.randn(2, 19, shape[1]).to(dtype), torch.randn(2, 19, shape[0]).to(dtype)
    name, backend = make_backend("tiled", index, shape, tiles)
    assert name == "tiled" and isinstance(backend, kind)
    expected = (grad_y.double().flatten(0, 1).t() @ x.double().flatten(0, 1)).view(-1)[index.long()]
    values = backend(x, grad_y)
    assert values.dtype == torch.float32 and torch.allclose(values.double(), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["element", "tiled"])
def test_a_backend_for_something_else_is_refused(name):
    with pytest.raises(UserError, match=f"train.sparse_backend={name} is for"):
        make_backend(name, entries(0.005), (40, 50))


def test_a_transposed_input_is_shared_and_goes_with_it():
    x, other = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    first = shared_transpose(x)
    assert first is shared_transpose(x) and torch.equal(first[0], x.view(10, 4).t())
    assert shared_transpose(other) is not first
    del other
    assert shared_transpose.copy is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_transposed_input_keeps_every_value_however_it_lies(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    # Every bfloat16: zeros of both signs, denormals, inf, nan.
    wide = every.view(torch.bfloat16).view(256, 256).to(dtype)
    for x in (wide, wide[:, :255], wide[3:, 1:], wide[:, ::2], wide.t(), wide[:1].expand(9, 256), wide[:0]):
        expected = x.float().t().contiguous()
        assert torch.equal(transpose_fp32(x).view(torch.int32), expected.view(torch.int32))
