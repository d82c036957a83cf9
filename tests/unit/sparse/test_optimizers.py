"""SGD against `torch.optim.SGD`, Lion against its paper's lines in fp64; what every optimizer shares."""

import pytest
import torch
from torch import nn

from speft_ds.config.train_config import OptimizerConfig
from speft_ds.sparse.optim.adamw import AdamW
from speft_ds.sparse.optim.lion import Lion
from speft_ds.sparse.optim.make import make_optimizer
from speft_ds.sparse.optim.sgd import SGD

LENGTH = 60
LR = 1e-2


def gradients(steps, seed=0):
    """[LENGTH] each, of sizes from 1e-6 to 10; the first three entries have none."""
    generator = torch.Generator().manual_seed(seed)
    size = 10.0 ** torch.linspace(-6, 1, LENGTH)
    size[:3] = 0
    return [torch.randn(LENGTH, generator=generator) * size for _ in range(steps)]


def start(seed=1):
    return torch.randn(LENGTH, generator=torch.Generator().manual_seed(seed))


def take(optimizer, steps):
    for gradient in steps:
        optimizer.delta.grad = gradient.clone()
        optimizer.step()
    return optimizer.delta.detach()


def torchs_sgd(values, steps, **settings):
    parameter = nn.Parameter(values.clone())
    optimizer = torch.optim.SGD([parameter], lr=LR, **settings)
    for gradient in steps:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


# SGD


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torchs_bit_for_bit(momentum):
    got = take(SGD(nn.Parameter(start()), LR, momentum, weight_decay=0.0), gradients(50))
    assert torch.equal(got, torchs_sgd(start(), gradients(50), momentum=momentum))
    assert torch.equal(got[:3], start()[:3]) and (got != start())[3:].any()


def test_weight_decay_of_sgd_without_momentum_is_torchs():
    got = take(SGD(nn.Parameter(start()), LR, 0.0, weight_decay=0.3), gradients(50))
    assert torch.allclose(got, torchs_sgd(start(), gradients(50), weight_decay=0.3), rtol=1e-5, atol=1e-7)


def test_weight_decay_does_not_go_through_the_momentum():
    """Each step shrinks delta by lr x weight decay, then is torch's without weight decay."""
    parameter = nn.Parameter(start())
    theirs = torch.optim.SGD([parameter], lr=LR, momentum=0.9)
    for gradient in gradients(50):
        parameter.data *= 1 - LR * 0.3
        parameter.grad = gradient.clone()
        theirs.step()
    got = take(SGD(nn.Parameter(start()), LR, 0.9, weight_decay=0.3), gradients(50))
    assert torch.allclose(got, parameter.detach(), rtol=1e-5, atol=1e-7)


def test_sgd_without_momentum_keeps_nothing():
    assert SGD(nn.Parameter(start()), LR, 0.0, 0.0).snapshot().columns == {}


# Lion


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_lion_by_its_papers_lines(weight_decay):
    """Algorithm 2, with decoupled weight decay; entries whose sign hangs on rounding are left out."""
    got = take(Lion(nn.Parameter(start()), LR, (0.9, 0.99), weight_decay), gradients(50))
    theta, m = start().double(), torch.zeros(LENGTH, dtype=torch.float64)
    closest = torch.full((LENGTH,), torch.inf, dtype=torch.float64)
    for gradient in gradients(50):
        g = gradient.double()
        c = 0.9 * m + 0.1 * g
        theta = theta - LR * (torch.sign(c) + weight_decay * theta)
        m = 0.99 * m + 0.01 * g
        size = (0.9 * m.abs() + 0.1 * g.abs()).clamp(min=1e-30)
        closest = torch.minimum(closest, c.abs() / size)
    sure = closest > 1e-5
    sure[:3] = True  # without any gradient: the sign of 0 is 0
    assert sure.sum() > 0.9 * LENGTH
    assert torch.allclose(got[sure].double(), theta[sure], rtol=1e-5, atol=1e-6)
    if not weight_decay:
        assert torch.equal(got[:3], start()[:3])


# What they share

MAKE = {
    "adamw": lambda delta: AdamW(delta, LR, (0.9, 0.99), 1e-8, 0.1, entry_steps=True),
    "sgd": lambda delta: SGD(delta, LR, 0.0, 0.1),
    "sgd with momentum": lambda delta: SGD(delta, LR, 0.9, 0.1),
    "lion": lambda delta: Lion(delta, LR, (0.9, 0.99), 0.1),
}
STATE = {"adamw": 3, "sgd": 0, "sgd with momentum": 1, "lion": 1}  # tensors


@pytest.fixture(params=MAKE)
def name(request):
    return request.param


def test_all_active_is_a_plain_step(name):
    one, two = MAKE[name](nn.Parameter(start())), MAKE[name](nn.Parameter(start()))
    for gradient in gradients(10):
        one.delta.grad, two.delta.grad = gradient.clone(), gradient.clone()
        one.step()
        two.step(active=torch.ones(LENGTH, dtype=torch.bool))
    assert torch.equal(one.delta, two.delta) and not torch.equal(one.delta, start())


def test_resting_entries_keep_everything_and_go_on_where_they_stood(name):
    """Every entry is that of an optimizer of its own, which takes only the steps of its pattern."""
    generator = torch.Generator().manual_seed(7)
    pattern = torch.rand(30, LENGTH, generator=generator) < 0.4
    pattern[:, 0], pattern[:, 1] = False, True
    optimizer, steps = MAKE[name](nn.Parameter(start())), gradients(30)
    for gradient, active in zip(steps, pattern, strict=True):
        before = {n: value.clone() for n, value in optimizer.snapshot().columns.items()}
        delta = optimizer.delta.detach().clone()
        optimizer.delta.grad = gradient.clone()
        optimizer.step(active=active)
        assert torch.equal(optimizer.delta[~active], delta[~active])
        for n, value in optimizer.snapshot().columns.items():
            assert torch.equal(value[~active], before[n][~active]), n
    for entry in range(LENGTH):
        one = slice(entry, entry + 1)
        own = [gradient[one] for gradient, active in zip(steps, pattern, strict=True) if active[entry]]
        alone = take(MAKE[name](nn.Parameter(start()[one].clone())), own)
        assert torch.allclose(optimizer.delta[one], alone, rtol=1e-6, atol=1e-8), entry


KEPT = [3, None, 0, 17, None, None, 39, 21]  # new entry i stood at KEPT[i]; None: it is new


def carried(name):
    """An optimizer that took 20 steps, carried to a new mask; its state before; which entries were there."""
    optimizer = MAKE[name](nn.Parameter(start()))
    take(optimizer, gradients(20))
    before = {n: value.clone() for n, value in optimizer.snapshot().columns.items()}
    found = torch.tensor([place is not None for place in KEPT])
    position = torch.tensor([place if place is not None else 11 for place in KEPT])  # 11: to be ignored
    delta = nn.Parameter(torch.where(found, optimizer.delta.detach()[position], 0.0))
    optimizer.remap_state(delta, position, found)
    return optimizer, before, position, found


def test_carry_keeps_the_state_of_kept_entries_and_zeros_that_of_new_ones(name):
    optimizer, before, position, found = carried(name)
    columns = optimizer.snapshot().columns
    assert len(optimizer.state) == 1 and columns.keys() == before.keys() and len(columns) == STATE[name]
    for n, value in columns.items():
        assert torch.equal(value, torch.where(found, before[n][position], 0))
        assert value.any() and value.dtype == before[n].dtype


def test_young_entries_take_the_steps_of_a_fresh_optimizer(name):
    optimizer, *_, found = carried(name)
    later = [gradient[-len(KEPT) :] for gradient in gradients(30, seed=9)]
    young = int((~found).sum())
    fresh = take(MAKE[name](nn.Parameter(torch.zeros(young))), [gradient[~found] for gradient in later])
    take(optimizer, later)
    assert torch.allclose(optimizer.delta[~found], fresh, rtol=1e-6, atol=1e-8)


def test_restored_is_uninterrupted_bit_for_bit(name):
    optimizer, *_ = carried(name)
    resumed = MAKE[name](nn.Parameter(torch.ones(2)))
    resumed.restore(nn.Parameter(optimizer.delta.detach().clone()), optimizer.snapshot())
    later = [gradient[-len(KEPT) :] for gradient in gradients(10, seed=9)]
    take(optimizer, later)
    take(resumed, later)
    assert torch.equal(resumed.delta, optimizer.delta)
    for n, value in optimizer.snapshot().columns.items():
        assert torch.equal(value, resumed.snapshot().columns[n])


def test_a_rank_without_entries_steps(name):
    optimizer = MAKE[name](nn.Parameter(torch.empty(0)))
    optimizer.delta.grad = torch.empty(0)
    optimizer.step()
    optimizer.step(active=torch.ones(0, dtype=torch.bool))
    assert optimizer.delta.numel() == 0


KEYS = {  # a recipe's keys -> what they make
    "sgd": (
        {"lr": 0.02, "momentum": 0.7, "weight_decay": 0.5},
        lambda delta: SGD(delta, 0.02, 0.7, 0.5),
    ),
    "lion": (
        {"lr": 0.02, "betas": [0.7, 0.8], "weight_decay": 0.5},
        lambda delta: Lion(delta, 0.02, (0.7, 0.8), 0.5),
    ),
    "adamw": (
        {"lr": 0.02, "betas": [0.7, 0.8], "eps": 1e-3, "weight_decay": 0.5},
        lambda delta: AdamW(delta, 0.02, (0.7, 0.8), 1e-3, 0.5, entry_steps=False),
    ),
}


@pytest.mark.parametrize("kind", KEYS)
def test_make_optimizer_takes_every_key_of_the_recipe(kind):
    keys, make = KEYS[kind]
    got = take(
        make_optimizer(nn.Parameter(start()), OptimizerConfig(name=kind, **keys), entry_steps=False),
        gradients(5),
    )
    assert torch.equal(got, take(make(nn.Parameter(start())), gradients(5)))


def test_make_optimizer_makes_eight_bits():
    settings = OptimizerConfig(name="adamw_8bit", lr=0.02, betas=[0.7, 0.8], eps=1e-3, weight_decay=0.5)
    optimizer = make_optimizer(nn.Parameter(start()), settings, entry_steps=False)
    assert all(moment.code.dtype == torch.uint8 for moment in optimizer.moments.values())
    close = take(AdamW(nn.Parameter(start()), 0.02, (0.7, 0.8), 1e-3, 0.5, entry_steps=False), gradients(5))
    got = take(optimizer, gradients(5))
    assert (got - close)[-20:].abs().mean() < 0.02 * (close - start())[-20:].abs().mean()
