"""The CUDA backends against the dense product, in Triton's interpreter; and compiled, for absent GPUs."""

import importlib.util
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch

from speft_ds.sparse.kernels.torch_backends import ColumnGradient, RowGradient
from speft_ds.sparse.kernels.triton_backends import BlockGradient, ElementGradient
from speft_ds.sparse.tiles import Tiles
from unit.sparse import triton_checks

DTYPES = ["float32", "bfloat16", "float16"]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: Linux on x86-64 has it"
)


def start(interpreted: bool) -> ProcessPoolExecutor:
    """A process whose Triton interprets programs or compiles them; this process's stays as it is."""
    context = multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", str(int(interpreted)))
        process = ProcessPoolExecutor(1, context)
        assert process.submit(triton_checks.is_interpreted).result() == interpreted
    return process


@pytest.fixture(scope="module")
def interpreter():
    """`interpreter(check, ...)`: what it returns in a process where Triton interprets."""
    with start(interpreted=True) as process:
        yield lambda check, *args, **kwargs: process.submit(check, *args, **kwargs).result()


def choose(shape, density, dtype=torch.int32, seed=0):
    """[k] sorted flat indices of so many entries anywhere."""
    numel = shape[0] * shape[1]
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(numel, generator=generator)[: round(density * numel)].sort().values.to(dtype)


def activations(shape, tokens, dtype, seed=1):
    """x [tokens, in] and grad_y [tokens, out]: fp32 arrays that dtype holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(tokens, features, generator=generator) for features in reversed(shape)]
    return [tensor.to(getattr(torch, dtype)).float().numpy() for tensor in made]


def compare(interpreter, index, shape, tokens, dtype="bfloat16", **options):
    """Assert that a backend's values are those of the dense product; returns them, and facts of the call."""
    x, grad_y = activations(shape, tokens, dtype)
    expected = (grad_y.astype(np.float64).T @ x.astype(np.float64)).reshape(-1)[index.numpy()]
    values, facts = interpreter(triton_checks.gradient, index.numpy(), shape, x, grad_y, dtype, **options)
    assert values.shape == expected.shape
    # fp32 sums of products that are exact, or nearly so.
    assert np.allclose(values, expected, rtol=1e-5, atol=2e-6 * max(tokens, 16) ** 0.5)
    return values, facts


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (64, 1), (1, 33), (37, 53), (70, 301)])
@pytest.mark.parametrize("density", [0.0, 0.01, 1.0])
def test_entries_equal_the_dense_gradient(interpreter, shape, dtype, density):
    compare(interpreter, choose(shape, density), shape, 19, dtype)


@needs_triton
@pytest.mark.parametrize(
    ("tokens", "rows"), [(0, 32), (1, 16), (63, 64), (64, 32), (65, 16), (65, 64), (200, 16), (200, 32)]
)
def test_any_number_of_tokens_and_every_group_size(interpreter, tokens, rows):
    _, facts = compare(interpreter, choose((90, 75), 0.07, torch.int64), (90, 75), tokens, rows=rows)
    assert facts["rows"] == rows and facts["segments"] > 1


def compare_split(interpreter, index, shape, dtype, **options):
    """Assert that long sequences are split, and that the splits are added from first to last."""
    values, facts = compare(interpreter, index, shape, 1100, dtype, slab_bytes=1, **options)
    assert facts["splits"] == 3
    x, grad_y = activations(shape, 1100, dtype)
    total = np.zeros_like(values)
    for tokens in [slice(0, 384), slice(384, 768), slice(768, 1100)]:
        part = (index.numpy(), shape, x[tokens], grad_y[tokens], dtype)
        total += interpreter(triton_checks.gradient, *part, **options)[0]
    assert np.array_equal(values, total)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sequences_are_split_and_added_in_order(interpreter, dtype):
    compare_split(interpreter, choose((40, 150), 0.03), (40, 150), dtype)


@needs_triton
@pytest.mark.parametrize("shape", [(40, 64), (33, 50)])
def test_empty_rows_a_full_column_and_the_last_entry(interpreter, shape):
    rows, columns = shape
    chosen = torch.zeros(shape, dtype=torch.bool)
    chosen[:, 3] = chosen[-1, -1] = chosen[17, 5:9] = True
    compare(interpreter, chosen.view(-1).nonzero().view(-1), shape, 21)
    compare(interpreter, torch.tensor([rows * columns - 1]), shape, 21)


def crowded(shape, step):
    """Every step-th column, whole."""
    return (torch.arange(shape[0])[:, None] * shape[1] + torch.arange(0, shape[1], step)).view(-1)


@needs_triton
def test_entries_in_the_same_columns_are_grouped_wider(interpreter):
    shape = (128, 2000)
    _, facts = compare(interpreter, crowded(shape, 100), shape, 20)
    assert facts["rows"] == 64
    _, facts = compare(interpreter, choose(shape, 0.005), shape, 20)
    assert facts["rows"] == 16


def test_pays_by_how_much_is_moved():
    shape = (4096, 2048)
    sparse, dense = choose(shape, 0.001), choose(shape, 0.01)
    assert ElementGradient(sparse, shape).pays and not ElementGradient(dense, shape).pays
    assert ElementGradient(crowded(shape, 100), shape).pays  # as many entries as the dense one
    tiles = Tiles.of("block", 16, shape)
    for every, pays in [(100, True), (2, False)]:
        assert (
            BlockGradient(tiles.entries(torch.arange(0, tiles.num_tiles, every)), shape, tiles).pays == pays
        )
    for step, pays in [(100, True), (1, False)]:
        assert ColumnGradient(crowded(shape, step), shape).pays == pays
        assert RowGradient(torch.arange(2048 * (4096 // step)), shape).pays == pays


@needs_triton
def test_an_overflow_stays_where_it_is(interpreter):
    """Neighbours in a tile are computed with others' rows and columns; nothing of them gets into an entry."""
    shape, index = (20, 30), torch.tensor([0, 31, 62, 95])
    x, grad_y = activations(shape, 10, "float32")
    expected = (grad_y.T @ x).reshape(-1)[index.numpy()]
    x[:, 7], x[4, 5], grad_y[:, 5], grad_y[2, 2] = np.nan, np.inf, np.nan, np.nan
    values, _ = interpreter(triton_checks.gradient, index.numpy(), shape, x, grad_y, "float32")
    assert np.allclose(values[:2], expected[:2], atol=1e-5)
    assert np.isnan(values[2]) and not np.isfinite(values[3])


@needs_triton
def test_activations_of_more_than_2_31_elements(interpreter):
    values, expected = interpreter(triton_checks.far_apart)
    assert values == expected


@needs_triton
@pytest.mark.parametrize("shape", [(1, 1), (2, 33, 70), (130, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_transposed_copy_is_padded_with_zeros(interpreter, shape, dtype):
    x, _ = activations((1, shape[-1]), int(np.prod(shape[:-1])), dtype)
    transposed = interpreter(triton_checks.transposed, x.reshape(shape), dtype)
    tokens = x.shape[0]
    assert transposed.shape[1] % 64 == 0 and np.array_equal(transposed[:, :tokens], x.T)
    assert not transposed[:, tokens:].any()


def tiles_of(granularity, size, shape, count, seed=0):
    """Units of a weight, and the sorted flat indices of `count` of them, the last one included."""
    tiles = Tiles.of(granularity, size, shape)
    others = torch.randperm(tiles.num_tiles - 1, generator=torch.Generator().manual_seed(seed))[: count - 1]
    return tiles, tiles.entries(torch.cat([others, torch.tensor([tiles.num_tiles - 1])]))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 3, 16, 24, 100])
def test_blocks_equal_the_dense_gradient(interpreter, size, dtype):
    """Blocks at the edges are smaller; tall ones are cut into strips, many columns into segments."""
    for shape in [(size * 2, size * 3), (size * 2 + 1, size * 4 - 1)]:
        tiles, index = tiles_of("block", size, shape, 5)
        assert tiles.are_full(index)
        compare(interpreter, index.to(torch.int32), shape, 70, dtype, block=size)


@needs_triton
def test_every_block_one_block_and_none(interpreter):
    shape = (50, 200)
    for index in [torch.arange(10000), tiles_of("block", 16, shape, 1)[1], torch.zeros(0, dtype=torch.int64)]:
        compare(interpreter, index, shape, 33, block=16)


@needs_triton
def test_blocks_of_long_sequences_are_split_and_added_in_order(interpreter):
    compare_split(interpreter, tiles_of("block", 16, (64, 160), 7)[1], (64, 160), "bfloat16", block=16)


def test_triton_is_imported_only_for_a_gradient():
    code = """if True:
        import sys
        import speft_ds.sparse.kernels.backends, speft_ds.sparse.state
        speft_ds.sparse.kernels.triton_backends.is_available()
        assert "triton" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "TRITON_INTERPRET" not in os.environ


@needs_triton
@pytest.mark.parametrize("capability, instruction", [(80, "mma.sync"), (90, "wgmma.mma_async")])
def test_programs_compile_for_tensor_cores(capability, instruction, tmp_path, monkeypatch):
    """No GPU is needed to compile for one. Copies to shared memory run ahead, 16 bytes at a time."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with start(interpreted=False) as process:
        for dtype in ["bfloat16", "float32"]:
            compiled = process.submit(triton_checks.compile_for, capability, dtype).result()
            products = {name: ptx for name, ptx in compiled.items() if "products" in name}
            assert len(products) == 5 and all("cp.async.cg" in ptx for ptx in products.values())
            if dtype != "float32":  # which must not be rounded to tf32
                assert all(instruction in ptx for ptx in products.values())
            assert not any("tf32" in ptx or "atom" in ptx for ptx in compiled.values())
