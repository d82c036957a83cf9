"""The CUDA backends on a GPU: against fp64, and against the dense product's time at sizes of Llama models."""

import pytest
import torch

from speft_ds.sparse.kernels.backends import make_backend
from speft_ds.sparse.kernels.measure import measure
from speft_ds.sparse.kernels.torch_backends import ColumnGradient, RowGradient, matmul_fp32
from speft_ds.sparse.kernels.triton_backends import BlockGradient, ElementGradient, is_available
from speft_ds.sparse.tiles import Tiles

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not is_available(), reason="needs Triton and an NVIDIA GPU, 8.0 or later"),
]
SHAPES = [(5120, 5120), (13824, 5120), (4096, 14336), (1024, 4096)]


def uniform(shape, density):
    """[k] int32 sorted flat indices of entries anywhere."""
    numel = shape[0] * shape[1]
    generator = torch.Generator("cuda").manual_seed(0)
    count = round(density * numel)
    return torch.randint(numel, (count,), generator=generator, device="cuda").unique().to(torch.int32)


def crowded(shape, density):
    """Nearly as many entries, in few columns that are half full."""
    columns = uniform((1, shape[1]), 2 * density).long()
    entry = uniform((shape[0], columns.numel()), 0.5).long()
    row, column = entry // columns.numel(), entry % columns.numel()
    return (row * shape[1] + columns[column]).to(torch.int32)


def activations(shape, tokens, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(1)
    made = (torch.randn(tokens, size, generator=generator, device="cuda") for size in reversed(shape))
    return [tensor.to(dtype) for tensor in made]


def check(backend, index, shape, tokens, dtype=torch.bfloat16):
    """Assert that the values are the dense product's, twice the same bits, and that each was written."""
    x, grad_y = activations(shape, tokens, dtype)
    values = backend(x, grad_y)
    expected = torch.empty(index.numel(), dtype=torch.float64, device="cuda")
    row, column = index.long() // shape[1], index.long() % shape[1]
    for part in torch.arange(index.numel(), device="cuda").split(2**12):
        pairs = grad_y[:, row[part]].double() * x[:, column[part]].double()
        expected[part] = pairs.sum(0)
    assert values.dtype == torch.float32 and values.shape == expected.shape
    assert (values.double() - expected).norm() <= 1e-4 * expected.norm()  # tf32 would be 3e-4
    for splits in range(1, 17):  # memory that the next call will get
        torch.full((splits, index.numel()), torch.nan, device="cuda")
    assert torch.equal(values, backend(x, grad_y))


@pytest.mark.parametrize("make_index", [uniform, crowded])
@pytest.mark.parametrize("shape", SHAPES)
def test_entries_of_large_weights(shape, make_index):
    index = make_index(shape, 0.0005)
    check(ElementGradient(index, shape), index, shape, 8192)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (37, 53), (300, 1031), (256, 512)])
@pytest.mark.parametrize("tokens", [1, 100, 1111])
def test_entries_of_any_shape(shape, dtype, tokens):
    for density in [0.02, 1.0]:
        last = torch.tensor([shape[0] * shape[1] - 1], dtype=torch.int32, device="cuda")
        index = torch.cat([uniform(shape, density), last]).unique()
        check(ElementGradient(index, shape), index, shape, tokens, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [2, 16, 24, 64, 200])
@pytest.mark.parametrize("shape", [(512, 768), (301, 1001)])
def test_blocks_of_any_shape(size, shape, dtype):
    tiles = Tiles.of("block", size, shape)
    chosen = uniform((1, tiles.num_tiles), 0.2).long()
    last = torch.tensor([tiles.num_tiles - 1], device="cuda")
    index = tiles.entries(torch.cat([chosen, last]).unique())
    check(BlockGradient(index, shape, tiles), index, shape, 1111, dtype)


@pytest.mark.parametrize("granularity, kind", [("row", RowGradient), ("column", ColumnGradient)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_and_columns(granularity, kind, dtype):
    shape = (301, 1024)
    tiles = Tiles.of(granularity, 0, shape)
    index = tiles.entries(torch.arange(0, tiles.num_tiles, 37, device="cuda"))
    _, backend = make_backend("tiled", index, shape, tiles)
    assert isinstance(backend, kind)
    check(backend, index, shape, 1111, dtype)


def milliseconds(call):
    """Median of 20 calls, after five."""
    times = []
    for _ in range(25):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times[5:])[10]


@pytest.mark.parametrize("shape", SHAPES)
def test_faster_than_the_dense_product_where_it_says_it_pays(shape):
    """With an x of its own each time, so that the transposed copy is made each time."""
    x, grad_y = activations(shape, 8192)
    dense = milliseconds(lambda: matmul_fp32(grad_y.t(), x))
    print(f"\n{shape}: dense {dense:.3f} ms")
    tiles = Tiles.of("block", 16, shape)
    slower = []
    for density in [0.001, 0.0035, 0.01, 0.03]:
        every = round(1 / density)
        blocks = tiles.entries(torch.arange(0, tiles.num_tiles, every, device="cuda"))
        backends = {
            "uniform": ElementGradient(uniform(shape, density), shape),
            "crowded": ElementGradient(crowded(shape, density), shape),
            "blocks of 16": BlockGradient(blocks, shape, tiles),
        }
        for name, backend in backends.items():
            time = milliseconds(lambda backend=backend: backend(x.view_as(x), grad_y))
            print(f"  {density:.2%} {name}: {time:.3f} ms, {dense / time:.1f}x, pays: {backend.pays}")
            if backend.pays and time > dense:
                slower.append((density, name))
    assert not slower


def test_a_measurement_is_short_and_its_choice_is_never_far_from_the_best():
    measure(torch.device("cuda"), "bfloat16")  # Triton compiles its programs
    costs = measure(torch.device("cuda"), "bfloat16")
    print(f"\nmeasured in {costs.seconds:.1f} s")
    kinds = {one.backend for one in costs.measurements}
    assert kinds == {"element", "tiled", "columns"} and costs.seconds < 5
    shape = (8192, 4096)  # of none of its classes
    x, grad_y = activations(shape, 8192)
    for density, make_index in [(d, make) for d in (0.001, 0.01, 0.05) for make in (uniform, crowded)]:
        index = make_index(shape, density)
        backends = {name: make_backend(name, index, shape)[1] for name in ("dense", "element", "columns")}
        chosen, _ = make_backend("auto", index, shape, costs=costs, num_tokens=8192)
        times = {name: milliseconds(lambda b=b: b(x.view_as(x), grad_y)) for name, b in backends.items()}
        print(f"  {density:.2%} {make_index.__name__}: {chosen} of {times}")
        assert times[chosen] < 1.5 * min(times.values())
