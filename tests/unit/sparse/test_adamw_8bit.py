"""8-bit AdamW and its storage against fp32 and bitsandbytes; how it rests, changes masks and resumes."""

import logging

import pytest
import torch
from torch import nn

from speft_ds.config.train_config import OptimizerConfig
from speft_ds.sparse.optim import optimizers
from speft_ds.sparse.optim.blockwise import BLOCK, Blockwise
from speft_ds.sparse.optim.optimizers import AdamW, AdamW8bit, OptimizerState, make_optimizer
from speft_ds.tools.plan.activations import LiveBytes

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
import bitsandbytes  # noqa: E402
from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise  # noqa: E402

LENGTH = 8192  # bitsandbytes keeps fp32 moments below 4096
ALL = slice(0, LENGTH // BLOCK)
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def numbers(seed=0, decades=7, length=LENGTH):
    """Both signs, log-uniform over so many decades; every seventh is 0."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(length, generator=generator)
    values *= 10 ** (torch.rand(length, generator=generator) * -decades)
    values[::7] = 0
    return values


# The storage


def stored(values, is_signed):
    storage = Blockwise(is_signed, values.numel() // BLOCK, torch.device("cpu"))
    storage.write(slice(0, values.numel() // BLOCK), values if is_signed else values.abs())
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
        assert torch.equal(storage.read(ALL) == 0, values == 0)
    assert not storage.read(ALL)[::7].any()


@pytest.mark.parametrize("is_signed", [True, False])
def test_bitsandbytes_reads_what_is_stored_and_rounds_no_better(is_signed):
    storage = stored(numbers(), is_signed)
    theirs = dequantize_blockwise(storage.code, absmax=storage.absmax, code=storage.map, blocksize=BLOCK)
    assert torch.equal(storage.read(ALL), theirs) and theirs.abs().max() > 1
    values = numbers(decades=4) if is_signed else numbers(decades=4).abs()
    code, state = quantize_blockwise(values, storage.map, blocksize=BLOCK)
    theirs = (dequantize_blockwise(code, state) - values).abs()
    ours = (stored(values, is_signed).read(ALL) - values).abs()
    assert (ours <= theirs * (1 + 1e-6)).all()


@pytest.mark.parametrize("is_signed", [True, False])
def test_blocks_of_zeros_and_more_of_them(is_signed):
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
    values = storage.read(both)
    values[0] = 3 * absmax[0]
    storage.write(both, values, resting)
    assert torch.equal(storage.absmax, torch.tensor([3 * absmax[0], absmax[1]]))
    assert torch.equal(storage.code[BLOCK:], code[BLOCK:].where(resting[BLOCK:], storage.code[BLOCK:]))
    now = storage.read(both)
    assert torch.allclose(now[:BLOCK], values[:BLOCK], rtol=0.05, atol=float(absmax[0]) * 1e-2)
    storage.write(both, now)  # nothing rests: the largest of the moment counts
    assert storage.absmax[0] == 3 * absmax[0]


# A run


def run(make, steps, decades=1.0):
    """Where an optimizer takes LENGTH values, with gradients that are noise around a mean of their own."""
    generator = torch.Generator().manual_seed(0)
    delta = nn.Parameter(torch.randn(LENGTH, generator=generator) * 0.1)
    size = 10 ** (torch.rand(LENGTH, generator=generator) * -decades)
    size[::7] = 0
    mean = torch.randn(LENGTH, generator=generator) * 0.5
    optimizer = make(delta)
    for _ in range(steps):
        delta.grad = (torch.randn(LENGTH, generator=generator) + mean) * size
        optimizer.step()
    return delta.detach()


def ours(delta, entry_steps=False, **changes):
    return AdamW8bit(delta, entry_steps, **{**SETTINGS, **changes})


def bitsandbytes_own(delta):
    return bitsandbytes.optim.AdamW8bit([delta], **SETTINGS)


def difference(one, other, start):
    """Mean distance, in units of the mean distance moved."""
    return ((one - other).abs().mean() / (other - start).abs().mean()).item()


@pytest.mark.parametrize("decades", [0, 1, 2])
def test_a_run_is_close_to_fp32_and_closer_than_bitsandbytes_own(decades):
    start = run(ours, 0, decades)
    exact = run(lambda delta: AdamW(delta, **SETTINGS), 200, decades)
    by_us, by_them = run(ours, 200, decades), run(bitsandbytes_own, 200, decades)
    from_fp32 = difference(by_us, exact, start)
    assert 0 < from_fp32 < (0.013, 0.025, 0.05)[decades]
    assert from_fp32 <= difference(by_them, exact, start)


def test_an_entry_without_gradient_stays_bit_for_bit():
    start, end = (run(lambda delta: ours(delta, weight_decay=0.0), steps) for steps in (0, 200))
    assert torch.equal(end[::7].view(torch.int32), start[::7].view(torch.int32))
    assert (end != start).sum() == LENGTH - len(range(0, LENGTH, 7))


def test_small_gradients_beside_a_large_one_do_not_run_away():
    """Their second moments are below what 8 bits can tell from 0; AdamW's step is at most about lr."""
    delta = nn.Parameter(torch.zeros(BLOCK))
    optimizer = ours(delta, weight_decay=0.0)
    gradient = torch.full((BLOCK,), 3e-4)  # squared 9e-8 of the largest: below half the smallest code
    gradient[0] = 1.0
    largest = 0.0
    for _ in range(100):
        before, delta.grad = delta.detach().clone(), gradient.clone()
        optimizer.step()
        largest = max(largest, (delta.detach() - before).abs().max().item())
    assert 0.009 < largest < 0.0105


@pytest.mark.parametrize("entry_steps", [False, True])
def test_the_size_of_chunks_changes_nothing(monkeypatch, entry_steps):
    whole = run(lambda delta: ours(delta, entry_steps), 20)
    monkeypatch.setattr(optimizers, "CHUNK", 3)
    assert torch.equal(run(lambda delta: ours(delta, entry_steps), 20), whole)


def test_no_moment_is_ever_whole_in_fp32(monkeypatch):
    monkeypatch.setattr(optimizers, "CHUNK", 2)
    delta = nn.Parameter(torch.zeros(100 * BLOCK))
    optimizer = ours(delta)
    delta.grad = torch.ones_like(delta)
    optimizer.step()
    with LiveBytes() as live:
        optimizer.step()
    kept = sum(m.code.numel() + 4 * m.absmax.numel() for m in optimizer.moments.values())
    assert kept == 2 * (delta.numel() + 4 * 100)
    seen = 4 * delta.numel() + kept  # what was there before, and is written to
    assert seen < live.peak < seen + 4 * delta.numel() / 2


@pytest.mark.parametrize("length", [0, 1, 255, 257])
def test_odd_lengths_and_none_at_all(length):
    values = torch.linspace(0.1, 1.0, length)
    settings = OptimizerConfig(name="adamw_8bit", lr=0.02, betas=[0.7, 0.8], eps=1e-3, weight_decay=0.5)
    one, other = nn.Parameter(torch.zeros(length)), nn.Parameter(torch.zeros(length))
    optimizer = make_optimizer(one, settings, entry_steps=False)
    exact = AdamW(other, lr=0.02, betas=[0.7, 0.8], eps=1e-3, weight_decay=0.5)
    for _ in range(3):
        one.grad, other.grad = values.clone(), values.clone()
        optimizer.step()
        exact.step()
    assert isinstance(optimizer, AdamW8bit)
    assert torch.allclose(one, other, rtol=0.05) and bool(one.all())


# Entries that rest


def test_all_active_is_a_plain_step():
    one, two = (ours(nn.Parameter(torch.zeros(LENGTH)), entry_steps=True) for _ in range(2))
    for step in range(10):
        one.delta.grad, two.delta.grad = numbers(seed=step), numbers(seed=step)
        one.step()
        two.step(active=torch.ones(LENGTH, dtype=torch.bool))
    assert torch.equal(one.delta, two.delta) and one.delta.any()
    for name, moment in one.moments.items():
        assert torch.equal(moment.code, two.moments[name].code)


def test_resting_entries_keep_delta_and_age_and_blocks_at_rest_keep_their_codes():
    delta = nn.Parameter(torch.zeros(LENGTH))
    optimizer = ours(delta, entry_steps=True)
    generator = torch.Generator().manual_seed(3)
    active = torch.rand(LENGTH, generator=generator) < 0.3
    active[: 2 * BLOCK] = False
    for step in range(20):
        delta.grad = torch.randn(LENGTH, generator=generator)
        optimizer.step(active=None if step < 5 else active)
        if step == 4:
            frozen = delta.detach().clone()
            codes = {name: moment.code.clone() for name, moment in optimizer.moments.items()}
    entry_step = optimizer.state[delta]["entry_step"]
    assert torch.equal(delta[~active], frozen[~active]) and (delta[active] != frozen[active]).all()
    assert torch.equal(entry_step, torch.where(active, 20, 5).to(torch.int32))
    for name, moment in optimizer.moments.items():
        assert torch.equal(moment.code[: 2 * BLOCK], codes[name][: 2 * BLOCK])
        assert not torch.equal(moment.code, codes[name])


def test_a_run_with_rests_is_close_to_fp32():
    generator = torch.Generator().manual_seed(5)
    one, other = nn.Parameter(torch.zeros(LENGTH)), nn.Parameter(torch.zeros(LENGTH))
    optimizer, exact = ours(one, entry_steps=True), AdamW(other, entry_steps=True, **SETTINGS)
    mean = torch.randn(LENGTH, generator=generator)
    for _ in range(150):
        gradient = torch.randn(LENGTH, generator=generator) + mean
        active = torch.rand(LENGTH, generator=generator) < 0.4
        one.grad, other.grad = gradient.clone(), gradient.clone()
        optimizer.step(active=active)
        exact.step(active=active)
    assert difference(one.detach(), other.detach(), torch.zeros(LENGTH)) < 0.02


# Another mask


def change(optimizer, num_new, keep=0.7, seed=11):
    """Go to a mask that keeps a part of the entries in order, with new ones among them.

    Returns:
        Where the kept ones were, and which of the new mask's entries they are.
    """
    generator = torch.Generator().manual_seed(seed)
    old = optimizer.delta
    kept = (torch.rand(old.numel(), generator=generator) < keep).nonzero()[:, 0]
    found = torch.zeros(kept.numel() + num_new, dtype=torch.bool)
    found[torch.randperm(found.numel(), generator=generator)[: kept.numel()]] = True
    position = torch.full(found.shape, 5)  # 5: to be ignored
    position[found] = kept
    delta = nn.Parameter(torch.zeros(found.numel()))
    delta.data[found] = old.detach()[kept]
    optimizer.remap_state(delta, position, found)
    return kept, found


def trained(steps=8, length=1000):
    delta = nn.Parameter(torch.zeros(length))
    optimizer = ours(delta, entry_steps=True)
    for step in range(steps):
        delta.grad = numbers(step, decades=2, length=length)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("num_new", [0, 250, 2000])
def test_kept_entries_keep_their_moments_bit_for_bit(num_new):
    optimizer = trained()
    for change_number in range(3):
        before = optimizer.snapshot()
        kept, found = change(optimizer, num_new, seed=change_number)
        after = optimizer.snapshot()
        for name in ("exp_avg", "exp_avg_sq", "entry_step"):
            assert torch.equal(after.columns[name][found], before.columns[name][kept]) and kept.numel() > 100
            assert not after.columns[name][~found].any() and after.columns[name].numel() == found.numel()
        entry = optimizer.entry_at[optimizer.entry_at >= 0]
        assert torch.equal(entry.sort().values, torch.arange(found.numel(), dtype=torch.int32))
        free = optimizer.entry_at < 0
        assert all((moment.code[free] == moment.zero).all() for moment in optimizer.moments.values())
        optimizer.delta.grad = numbers(change_number, decades=2, length=found.numel())
        optimizer.step()


def test_slots_are_used_again():
    optimizer = trained()
    for change_number in range(6):
        _, found = change(optimizer, 300, seed=change_number)
        change(optimizer, 0, keep=1000 / found.numel(), seed=change_number)
    assert optimizer.moments["exp_avg"].code.numel() <= 1536  # 1000 and at most 300 more, in whole blocks


def test_new_entries_without_gradient_change_nothing_for_the_others():
    """The same entries alone, in their old slots: what left is at zero moments, and has no gradient."""
    optimizer, alone = trained(), trained()
    kept, found = change(optimizer, 500)
    left = torch.ones(1000, dtype=torch.bool).index_fill(0, kept, False)
    for moment in alone.moments.values():
        moment.code[:1000][left] = moment.zero
    for step in range(20):
        gradient = numbers(100 + step, decades=2, length=1000).masked_fill_(left, 0)
        optimizer.delta.grad = torch.zeros(found.numel()).masked_scatter_(found, gradient[kept])
        alone.delta.grad = gradient
        optimizer.step()
        alone.step()
    assert not optimizer.delta[~found].any()
    assert torch.equal(optimizer.delta[found], alone.delta[kept])


def test_young_entries_take_the_steps_of_a_fresh_optimizer():
    optimizer = trained()
    _, found = change(optimizer, 500)
    num_new = int((~found).sum())
    young = nn.Parameter(torch.zeros(num_new))
    fresh = AdamW(young, **SETTINGS)
    for step in range(10):
        gradient = torch.randn(found.numel(), generator=torch.Generator().manual_seed(step)) + 2
        optimizer.delta.grad, young.grad = gradient.clone(), gradient[~found].clone()
        optimizer.step()
        fresh.step()
    assert difference(optimizer.delta[~found].detach(), young.detach(), torch.zeros(num_new)) < 0.01


# Checkpoints


def copies(saved):
    columns, own = ({n: value.clone() for n, value in of.items()} for of in (saved.columns, saved.own))
    return OptimizerState(columns, own, saved.entry_step)


@pytest.mark.parametrize("changes", [0, 1])
def test_resumed_from_its_own_storage_is_uninterrupted(changes):
    optimizer = trained()
    for number in range(changes):
        change(optimizer, 300, seed=number)
        optimizer.delta.grad = numbers(99, length=optimizer.delta.numel())
        optimizer.step()
    other = nn.Parameter(optimizer.delta.detach().clone())
    resumed = ours(nn.Parameter(torch.ones(3)), entry_steps=True)
    resumed.restore(other, copies(optimizer.snapshot()))
    for step in range(10):
        for one in (optimizer, resumed):
            one.delta.grad = numbers(200 + step, decades=2, length=other.numel())
            one.step()
        if changes and step == 5:
            change(optimizer, 200, seed=7)
            change(resumed, 200, seed=7)
            other = resumed.delta
    assert torch.equal(optimizer.delta, resumed.delta)
    for name, value in optimizer.snapshot().own.items():
        assert torch.equal(value, resumed.snapshot().own[name])


def test_columns_alone_are_rounded_once():
    optimizer = trained()
    saved = copies(optimizer.snapshot())
    resumed = ours(nn.Parameter(torch.ones(3)), entry_steps=True)
    resumed.restore(nn.Parameter(optimizer.delta.detach().clone()), OptimizerState(saved.columns))
    for name, value in resumed.snapshot().columns.items():
        assert torch.allclose(value, saved.columns[name], rtol=0.01), name  # of the same blocks here
    assert torch.equal(resumed.snapshot().columns["entry_step"], saved.columns["entry_step"])


def test_a_count_of_all_is_restored():
    delta = nn.Parameter(torch.zeros(300))
    optimizer = ours(delta)
    for _ in range(4):
        delta.grad = torch.ones(300)
        optimizer.step()
    saved = copies(optimizer.snapshot())
    assert saved.entry_step == 4 and saved.columns.keys() == {"exp_avg", "exp_avg_sq"}
    resumed = ours(nn.Parameter(torch.zeros(1)))
    resumed.restore(nn.Parameter(delta.detach().clone()), saved)
    assert resumed.snapshot().entry_step == 4
