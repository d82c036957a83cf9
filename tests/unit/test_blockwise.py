"""Block-wise 8-bit storage against bitsandbytes' own; what it keeps bit for bit."""

import logging

import pytest
import torch

from speft_ds.sparse.optim.blockwise import BLOCK, Blockwise, plain_memory
from unit.spread import LENGTH, numbers

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise  # noqa: E402

CPU = torch.device("cpu")
ALL = slice(0, LENGTH // BLOCK)


def stored(values, is_signed):
    storage = Blockwise(is_signed, values.numel() // BLOCK, CPU, plain_memory)
    storage.write(slice(0, values.numel() // BLOCK), values)
    return storage


@pytest.mark.parametrize("is_signed", [True, False])
def test_rounding_is_to_the_nearest(is_signed):
    values = numbers() if is_signed else numbers().abs()
    storage = stored(values, is_signed)
    expected = values.view(-1, BLOCK).abs().amax(1)
    assert torch.equal(storage.absmax, expected)
    scaled = (values.view(-1, BLOCK) / expected[:, None]).view(-1, 1)
    distance = (scaled.double() - storage.map.double()).abs()
    got = distance.gather(1, storage.code[:, None].to(torch.int64))[:, 0]
    nearest = distance.amin(1)
    if is_signed:
        assert torch.equal(got, nearest)
    else:  # but nothing becomes 0
        tiny = (scaled[:, 0] > 0) & (scaled[:, 0] < storage.map[1])
        assert torch.equal(got[~tiny], nearest[~tiny]) and tiny.any()
        assert torch.equal(storage.code[tiny], torch.ones(int(tiny.sum()), dtype=torch.uint8))
    assert torch.equal(storage.read(ALL) == 0, values == 0) or is_signed


@pytest.mark.parametrize("is_signed", [True, False])
def test_bitsandbytes_reads_what_is_stored(is_signed):
    storage = stored(numbers() if is_signed else numbers().abs(), is_signed)
    theirs = dequantize_blockwise(storage.code, absmax=storage.absmax, code=storage.map, blocksize=BLOCK)
    assert torch.equal(storage.read(ALL), theirs) and theirs.abs().max() > 1


@pytest.mark.parametrize("is_signed", [True, False])
def test_rounding_is_never_worse_than_that_of_bitsandbytes(is_signed):
    values = numbers(decades=4) if is_signed else numbers(decades=4).abs()
    code, state = quantize_blockwise(values, stored(values, is_signed).map, blocksize=BLOCK)
    theirs = (dequantize_blockwise(code, state) - values).abs()
    ours = (stored(values, is_signed).read(ALL) - values).abs()
    assert (ours <= theirs * (1 + 1e-6)).all()


def test_zeros_are_stored_as_zeros():
    for is_signed in (True, False):
        storage = stored(numbers() if is_signed else numbers().abs(), is_signed)
        assert not storage.read(ALL)[::7].any()
        nothing = stored(torch.zeros(512), is_signed)
        assert not nothing.read(slice(0, 2)).any() and not nothing.absmax.any()
        nothing.grow(1)
        assert torch.equal(nothing.read(slice(0, 3)), torch.zeros(768))


def test_what_rests_is_not_rounded_again():
    """512 numbers, of which the second half of each block rests while the others shrink, then grow."""
    storage = stored(numbers(length=512), is_signed=True)
    both, resting = slice(0, 2), (torch.arange(512) % BLOCK) >= 128
    code, absmax = storage.code.clone(), storage.absmax.clone()
    for factor in (0.9, 0.5, 0.01):
        values = storage.read(both)
        values[~resting] *= factor
        storage.write(both, values, resting)
        assert torch.equal(storage.code[resting], code[resting]) and torch.equal(storage.absmax, absmax)
    before = storage.read(both)
    values = before.clone()
    values[0] = 3 * absmax[0]
    storage.write(both, values, resting)
    assert torch.equal(storage.absmax, torch.tensor([3 * absmax[0], absmax[1]]))
    assert torch.equal(storage.code[BLOCK:], code[BLOCK:].where(resting[BLOCK:], storage.code[BLOCK:]))
    now = storage.read(both)
    assert torch.allclose(now[:BLOCK], values[:BLOCK], rtol=0.05, atol=float(absmax[0]) * 1e-2)
    storage.write(both, now)  # nothing rests: the largest of the moment counts
    assert storage.absmax[0] == 3 * absmax[0]
