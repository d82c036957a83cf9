"""8-bit AdamW against AdamW in fp32 and bitsandbytes' own; how it rests, changes masks and resumes."""

import logging

import pytest
import torch
from torch import nn

from speft_ds.sparse.optim import adamw_8bit
from speft_ds.sparse.optim.adamw import AdamW
from speft_ds.sparse.optim.adamw_8bit import AdamW8bit
from speft_ds.sparse.optim.blockwise import BLOCK
from speft_ds.sparse.optim.flat import OptimizerState
from speft_ds.tools.plan.activations import LiveBytes
from unit.spread import LENGTH, numbers

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
import bitsandbytes  # noqa: E402

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def bits(tensor):
    return tensor.contiguous().view(torch.uint8).tolist()


# A run


def run(make, steps, decades=1.0, seed=0, zeros=True):
    """Where an optimizer takes LENGTH values, with gradients that are noise around a mean of their own."""
    generator = torch.Generator().manual_seed(seed)
    delta = nn.Parameter(torch.randn(LENGTH, generator=generator) * 0.1)
    size = 10 ** (torch.rand(LENGTH, generator=generator) * -decades)
    size[::7] *= not zeros
    mean = torch.randn(LENGTH, generator=generator) * 0.5
    optimizer = make(delta)
    for _ in range(steps):
        delta.grad = (torch.randn(LENGTH, generator=generator) + mean) * size
        optimizer.step()
    return delta.detach()


def ours(delta, entry_steps=False, **changes):
    return AdamW8bit(delta, **{**SETTINGS, **changes}, entry_steps=entry_steps)


def bitsandbytes_own(delta):
    return bitsandbytes.optim.AdamW8bit([delta], **SETTINGS)


def difference(one, other, start):
    """Mean distance, in units of the mean distance moved."""
    return ((one - other).abs().mean() / (other - start).abs().mean()).item()


@pytest.mark.parametrize("decades", [0, 1, 2])
def test_a_run_is_close_to_fp32_and_closer_than_bitsandbytes_own(decades):
    start = run(ours, 0, decades)
    exact = run(lambda delta: AdamW(delta, **SETTINGS, entry_steps=False), 200, decades)
    by_us, by_them = run(ours, 200, decades), run(bitsandbytes_own, 200, decades)
    from_fp32 = difference(by_us, exact, start)
    print(f"{decades} decades: ours {from_fp32:.4f}, bitsandbytes {difference(by_them, exact, start):.4f}")
    assert 0 < from_fp32 < (0.013, 0.025, 0.05)[decades]
    assert from_fp32 <= difference(by_them, exact, start)


@pytest.mark.parametrize(("decades", "limit"), [(0, 0.005), (1, 0.01)])
def test_a_run_is_close_to_bitsandbytes_own(decades, limit):
    """Theirs moves what has no gradient; so everything has one here."""
    start = run(ours, 0, decades)
    by_us, by_them = (run(make, 200, decades, zeros=False) for make in (ours, bitsandbytes_own))
    assert difference(by_us, by_them, start) < limit


def test_an_entry_without_gradient_stays_bit_for_bit():
    start, end = (run(lambda delta: ours(delta, weight_decay=0.0), steps) for steps in (0, 200))
    assert bits(end[::7]) == bits(start[::7])
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
    monkeypatch.setattr(adamw_8bit, "CHUNK", 3)
    assert torch.equal(run(lambda delta: ours(delta, entry_steps), 20), whole)


def test_no_moment_is_ever_whole_in_fp32(monkeypatch):
    monkeypatch.setattr(adamw_8bit, "CHUNK", 2)
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


def test_odd_lengths_and_none_at_all():
    for length in (0, 1, 255, 257):
        values = torch.linspace(0.1, 1.0, length)
        one, other = nn.Parameter(torch.zeros(length)), nn.Parameter(torch.zeros(length))
        optimizer, exact = ours(one), AdamW(other, **SETTINGS, entry_steps=False)
        for _ in range(3):
            one.grad, other.grad = values.clone(), values.clone()
            optimizer.step()
            exact.step()
        assert torch.allclose(one, other, rtol=0.05) and bool(one.all())


# Entries that rest


def test_all_active_is_a_plain_step():
    gradient = [numbers(seed=step) for step in range(10)]
    plain, masked = nn.Parameter(torch.zeros(LENGTH)), nn.Parameter(torch.zeros(LENGTH))
    one, two = ours(plain, entry_steps=True), ours(masked, entry_steps=True)
    for values in gradient:
        plain.grad, masked.grad = values.clone(), values.clone()
        one.step()
        two.step(active=torch.ones(LENGTH, dtype=torch.bool))
    assert torch.equal(plain, masked) and plain.any()
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
    optimizer, exact = ours(one, entry_steps=True), AdamW(other, **SETTINGS, entry_steps=True)
    mean = torch.randn(LENGTH, generator=generator)
    for _ in range(150):
        gradient = torch.randn(LENGTH, generator=generator) + mean
        active = torch.rand(LENGTH, generator=generator) < 0.4
        one.grad, other.grad = gradient.clone(), gradient.clone()
        optimizer.step(active=active)
        exact.step(active=active)
    assert difference(one.detach(), other.detach(), torch.zeros(LENGTH)) < 0.02


def test_resting_needs_ages():
    delta = nn.Parameter(torch.zeros(LENGTH))
    optimizer = ours(delta)
    delta.grad = torch.ones(LENGTH)
    with pytest.raises(ValueError, match="entries that pause need entry_steps"):
        optimizer.step(active=torch.ones(LENGTH, dtype=torch.bool))
    with pytest.raises(ValueError, match="a mask that changes needs entry_steps"):
        optimizer.remap_state(
            nn.Parameter(torch.zeros(1)), torch.zeros(1, dtype=torch.int64), torch.ones(1).bool()
        )
    assert not delta.any() and optimizer.state[delta]["entry_step"] == 0


# Another mask


def change(optimizer, num_new, keep=0.7, seed=11):
    """Carry to a mask that keeps a part of the entries in order, with new ones among them.

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
    optimizer, alone = trained(), trained()
    kept, found = change(optimizer, 500)
    for step in range(20):
        gradient = numbers(100 + step, decades=2, length=1000)
        gradient[torch.ones(1000).bool().index_fill(0, kept, False)] = 0
        values = torch.zeros(found.numel())
        values[found] = gradient[kept]
        optimizer.delta.grad = values
        optimizer.step()
    assert not optimizer.delta[~found].any()
    # The same entries alone, in their old slots: what left is at zero moments, and rests.
    for moment in alone.moments.values():
        left = torch.ones(1024, dtype=torch.bool).index_fill(0, kept, False)
        moment.code[left] = moment.zero
    for step in range(20):
        gradient = numbers(100 + step, decades=2, length=1000)
        gradient[torch.ones(1000).bool().index_fill(0, kept, False)] = 0
        alone.delta.grad = gradient
        alone.step()
    assert torch.equal(optimizer.delta[found], alone.delta[kept])


def test_young_entries_take_the_steps_of_a_fresh_optimizer():
    optimizer = trained()
    _, found = change(optimizer, 500)
    num_new = int((~found).sum())
    young = nn.Parameter(torch.zeros(num_new))
    fresh = AdamW(young, **SETTINGS, entry_steps=False)
    for step in range(10):
        gradient = torch.randn(found.numel(), generator=torch.Generator().manual_seed(step)) + 2
        optimizer.delta.grad, young.grad = gradient.clone(), gradient[~found].clone()
        optimizer.step()
        fresh.step()
    assert difference(optimizer.delta[~found].detach(), young.detach(), torch.zeros(num_new)) < 0.01


# Checkpoints


def copies(saved):
    own = {name: value.clone() for name, value in saved.own.items()}
    return OptimizerState(
        {name: value.clone() for name, value in saved.columns.items()}, own, saved.entry_step
    )


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
    assert torch.equal(
        resumed.state[resumed.delta]["entry_step"], optimizer.state[optimizer.delta]["entry_step"]
    )


def test_an_age_of_all_is_restored():
    delta = nn.Parameter(torch.zeros(300))
    optimizer = ours(delta)
    for _ in range(4):
        delta.grad = torch.ones(300)
        optimizer.step()
    saved = copies(optimizer.snapshot())
    assert saved.entry_step == 4 and saved.columns.keys() == {"exp_avg", "exp_avg_sq"}
    resumed = ours(nn.Parameter(torch.zeros(1)))
    resumed.restore(nn.Parameter(delta.detach().clone()), saved)
    assert int(resumed.state[resumed.delta]["entry_step"]) == 4
