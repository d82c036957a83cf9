"""AdamW and SGD against torch's, Lion against its paper's lines in fp64; what all share; the schedule."""

import pytest
import torch
from torch import nn

from speft_ds.config.train_config import OptimizerConfig
from speft_ds.sparse.optim.clipping import clip_factor
from speft_ds.sparse.optim.lr_schedule import make_lr_schedule
from speft_ds.sparse.optim.optimizers import SGD, AdamW, Lion, make_optimizer

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


def torchs(kind, values, steps, **settings):
    """Where torch's own optimizer takes these values, as a parameter of their own."""
    parameter = nn.Parameter(values.clone())
    optimizer = kind([parameter], lr=LR, **settings)
    for gradient in steps:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


# Against references


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("entry_steps", [False, True])
def test_adamw_is_torchs(entry_steps, weight_decay):
    settings = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    optimizer = AdamW(nn.Parameter(start()), entry_steps, lr=LR, **settings)
    for number, gradient in enumerate(gradients(50), start=1):
        take(optimizer, [gradient])
        expected = torchs(torch.optim.AdamW, start(), gradients(number), **settings)
        assert torch.allclose(optimizer.delta, expected, rtol=1e-5, atol=1e-7), number
        assert torch.equal(optimizer.delta.grad, gradient)
    assert (optimizer.delta - start())[3:].abs().min() > 1e-4


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torchs_bit_for_bit(momentum):
    optimizer = SGD(nn.Parameter(start()), lr=LR, momentum=momentum, weight_decay=0.0)
    got = take(optimizer, gradients(50))
    assert torch.equal(got, torchs(torch.optim.SGD, start(), gradients(50), momentum=momentum))
    assert torch.equal(got[:3], start()[:3]) and (got != start())[3:].any()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_weight_decay_does_not_go_through_the_momentum(momentum):
    """Each step shrinks delta by lr x weight decay, then is torch's without weight decay."""
    parameter = nn.Parameter(start())
    theirs = torch.optim.SGD([parameter], lr=LR, momentum=momentum)
    for gradient in gradients(50):
        parameter.data *= 1 - LR * 0.3
        parameter.grad = gradient.clone()
        theirs.step()
    ours = SGD(nn.Parameter(start()), lr=LR, momentum=momentum, weight_decay=0.3)
    assert torch.allclose(take(ours, gradients(50)), parameter.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_lion_by_its_papers_lines(weight_decay):
    """Algorithm 2, with decoupled weight decay; entries whose sign hangs on rounding are left out."""
    optimizer = Lion(nn.Parameter(start()), lr=LR, betas=(0.9, 0.99), weight_decay=weight_decay)
    got = take(optimizer, gradients(50))
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

ADAMW = {"lr": LR, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
MAKE = {
    "adamw": lambda delta: AdamW(delta, entry_steps=True, **ADAMW),
    "sgd": lambda delta: SGD(delta, lr=LR, momentum=0.0, weight_decay=0.1),
    "sgd with momentum": lambda delta: SGD(delta, lr=LR, momentum=0.9, weight_decay=0.1),
    "lion": lambda delta: Lion(delta, lr=LR, betas=(0.9, 0.99), weight_decay=0.1),
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
    pattern[:, 0], pattern[:, 1], pattern[7] = False, True, False
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
    if name == "adamw":
        assert torch.equal(optimizer.snapshot().columns["entry_step"], pattern.sum(0).to(torch.int32))


KEPT = [3, None, 0, 17, None, None, 39, 21]  # new entry i stood at KEPT[i]; None: it is new


def remapped(name):
    """An optimizer that went to a new mask after 20 steps; its state before; which entries were there."""
    optimizer = MAKE[name](nn.Parameter(start()))
    take(optimizer, gradients(20))
    before = {n: value.clone() for n, value in optimizer.snapshot().columns.items()}
    found = torch.tensor([place is not None for place in KEPT])
    position = torch.tensor([place if place is not None else 11 for place in KEPT])  # 11: to be ignored
    delta = nn.Parameter(torch.where(found, optimizer.delta.detach()[position], 0.0))
    optimizer.remap_state(delta, position, found)
    return optimizer, before, position, found


def test_kept_entries_keep_their_state_and_new_ones_start_at_zero(name):
    optimizer, before, position, found = remapped(name)
    columns = optimizer.snapshot().columns
    assert len(optimizer.state) == 1 and columns.keys() == before.keys() and len(columns) == STATE[name]
    for n, value in columns.items():
        assert torch.equal(value, torch.where(found, before[n][position], 0))
        assert value.any() and value.dtype == before[n].dtype


def test_young_entries_take_the_steps_of_a_fresh_optimizer(name):
    optimizer, *_, found = remapped(name)
    later = [gradient[-len(KEPT) :] for gradient in gradients(30, seed=9)]
    young = int((~found).sum())
    fresh = take(MAKE[name](nn.Parameter(torch.zeros(young))), [gradient[~found] for gradient in later])
    take(optimizer, later)
    assert torch.allclose(optimizer.delta[~found], fresh, rtol=1e-6, atol=1e-8)


def test_restored_is_uninterrupted_bit_for_bit(name):
    optimizer, *_ = remapped(name)
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


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_pausing_and_another_mask_need_a_count_per_entry(kind):
    optimizer = make_optimizer(nn.Parameter(start()), OptimizerConfig(name=kind), entry_steps=False)
    optimizer.delta.grad = gradients(1)[0]
    with pytest.raises(ValueError):
        optimizer.step(active=torch.ones(LENGTH, dtype=torch.bool))
    with pytest.raises(ValueError):
        optimizer.remap_state(nn.Parameter(torch.zeros(1)), torch.zeros(1).long(), torch.ones(1).bool())
    assert torch.equal(optimizer.delta, start()) and optimizer.state[optimizer.delta]["entry_step"] == 0


KEYS = {  # a recipe's keys -> what they make
    "sgd": (SGD, {"lr": 0.02, "momentum": 0.7, "weight_decay": 0.5}),
    "lion": (Lion, {"lr": 0.02, "betas": [0.7, 0.8], "weight_decay": 0.5}),
    "adamw": (AdamW, {"lr": 0.02, "betas": [0.7, 0.8], "eps": 1e-3, "weight_decay": 0.5}),
}


@pytest.mark.parametrize("kind", KEYS)
def test_make_optimizer_takes_every_key_of_the_recipe(kind):
    make, keys = KEYS[kind]
    optimizer = make_optimizer(nn.Parameter(start()), OptimizerConfig(name=kind, **keys), entry_steps=False)
    expected = take(make(nn.Parameter(start()), **keys), gradients(5))
    assert torch.equal(take(optimizer, gradients(5)), expected)


# Learning rate and clipping


def test_the_learning_rate_schedule_goes_on_after_another_mask():
    settings = OptimizerConfig(lr=0.1, schedule="linear", warmup_steps=2)
    delta = nn.Parameter(torch.zeros(3))
    optimizer = make_optimizer(delta, settings, entry_steps=True)
    schedule = make_lr_schedule(optimizer, settings, num_steps=12)
    rates = []
    for step in range(12):
        if step == 5:
            delta = nn.Parameter(torch.zeros(4))
            optimizer.remap_state(delta, torch.tensor([0, 1, 2, 0]), torch.tensor([True, True, True, False]))
        delta.grad = torch.ones_like(delta)
        before = delta.detach().clone()
        optimizer.step()
        schedule.step()
        # Adam's step on a gradient that stays the same is the learning rate.
        rates.append((before - delta.detach()).tolist())
    expected = [0.1 * min((step + 1) / 3, (12 - step) / 10) for step in range(12)]
    assert [row[0] for row in rates] == pytest.approx(expected, rel=1e-4)
    assert [row[-1] for row in rates] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warmup_rises_to_one_and_every_step_moves(schedule):
    settings = OptimizerConfig(schedule=schedule, warmup_steps=4)
    optimizer = make_optimizer(nn.Parameter(start()), settings, entry_steps=False)
    (factor,) = make_lr_schedule(optimizer, settings, num_steps=20).lr_lambdas
    values = [factor(step) for step in range(20)]
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(value > 0 for value in values)
    assert values[4:] == sorted(values[4:], reverse=True)
    assert factor(12) == pytest.approx(1.0 if schedule == "constant" else 0.5)
    assert factor(20) == pytest.approx(1.0 if schedule == "constant" else 0.0)


def test_clip_factor():
    assert clip_factor(4.0, 1.0) == 0.25
    assert clip_factor(0.5, 1.0) == 1.0
    assert clip_factor(4.0, None) == 1.0
