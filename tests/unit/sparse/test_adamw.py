"""The optimizer on a flat delta against `torch.optim.AdamW`; learning-rate schedules and clipping."""

import pytest
import torch
from torch import nn

from speft_ds.config.train_config import OptimizerConfig
from speft_ds.sparse.optim.adamw import AdamW
from speft_ds.sparse.optim.clipping import clip_factor
from speft_ds.sparse.optim.lr_schedule import lr_factor, make_lr_schedule
from speft_ds.sparse.optim.make import make_optimizer

SETTINGS = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}
LENGTH = 40


def gradients(steps: int, seed: int = 0) -> list[torch.Tensor]:
    """[LENGTH] each, of sizes from 1e-6 to 10."""
    generator = torch.Generator().manual_seed(seed)
    size = 10.0 ** torch.linspace(-6, 1, LENGTH)
    return [torch.randn(LENGTH, generator=generator) * size for _ in range(steps)]


def start(seed: int = 1) -> torch.Tensor:
    return torch.randn(LENGTH, generator=torch.Generator().manual_seed(seed))


def torchs(values: torch.Tensor, steps: list[torch.Tensor], **changes) -> torch.Tensor:
    """Where torch's own AdamW takes these values, as a parameter of their own."""
    parameter = nn.Parameter(values.clone())
    optimizer = torch.optim.AdamW([parameter], **{**SETTINGS, **changes})
    for gradient in steps:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def ours(delta: nn.Parameter, entry_steps: bool = True) -> AdamW:
    return AdamW(delta, **SETTINGS, entry_steps=entry_steps)


def close(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.allclose(got, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("entry_steps", [False, True])
def test_equals_torchs_adamw_where_nothing_changes(entry_steps, weight_decay):
    delta, steps = nn.Parameter(start()), gradients(50)
    optimizer = AdamW(delta, **{**SETTINGS, "weight_decay": weight_decay}, entry_steps=entry_steps)
    for number, gradient in enumerate(steps, start=1):
        delta.grad = gradient.clone()
        optimizer.step()
        expected = torchs(start(), steps[:number], weight_decay=weight_decay)
        assert close(delta, expected), number
        assert torch.equal(delta.grad, gradient)
    assert (delta - start()).abs().min() > 1e-4


def test_all_active_is_a_plain_step():
    plain, masked = nn.Parameter(start()), nn.Parameter(start())
    one, two = ours(plain), ours(masked)
    for gradient in gradients(10):
        plain.grad, masked.grad = gradient.clone(), gradient.clone()
        one.step()
        two.step(active=torch.ones(LENGTH, dtype=torch.bool))
    assert torch.equal(plain, masked)


def test_paused_entries_keep_everything_and_go_on_where_they_stood():
    """Every entry takes, of 50 steps, those of its own pattern; torch's AdamW sees these alone."""
    generator = torch.Generator().manual_seed(7)
    pattern = torch.rand(50, LENGTH, generator=generator) < 0.4
    pattern[:, 0], pattern[:, 1] = False, True
    delta, steps = nn.Parameter(start()), gradients(50)
    optimizer = ours(delta)
    state = optimizer.state[delta]
    for gradient, active in zip(steps, pattern, strict=True):
        before = {name: value.clone() for name, value in [*state.items(), ("delta", delta.detach())]}
        delta.grad = gradient.clone()
        optimizer.step(active=active)
        for name, value in [*optimizer.state[delta].items(), ("delta", delta.detach())]:
            assert torch.equal(value[~active], before[name][~active]), name
        assert bool((delta[active] != before["delta"][active]).all())
    assert torch.equal(optimizer.state[delta]["entry_step"], pattern.sum(0).to(torch.int32))
    for entry in range(LENGTH):
        taken = [
            gradient[entry : entry + 1]
            for gradient, active in zip(steps, pattern, strict=True)
            if active[entry]
        ]
        assert close(delta[entry : entry + 1], torchs(start()[entry : entry + 1], taken)), entry


def test_no_active_entry_is_no_step():
    delta = nn.Parameter(start())
    optimizer = ours(delta)
    delta.grad = gradients(1)[0]
    optimizer.step(active=torch.zeros(LENGTH, dtype=torch.bool))
    assert torch.equal(delta, start()) and int(optimizer.state[delta]["entry_step"].sum()) == 0


def test_a_rank_without_entries_steps():
    for entry_steps in (False, True):
        delta = nn.Parameter(torch.empty(0))
        optimizer = ours(delta, entry_steps)
        delta.grad = torch.empty(0)
        optimizer.step()
        optimizer.step(active=None)
        assert delta.numel() == 0


# New entry i stood at KEPT[i] in the old delta; None: it is new. The others of the old delta are gone.
KEPT = [3, None, 0, 17, None, None, 39, 21]


def carried(steps: int):
    """An optimizer that took steps on the old delta and was carried to a new one; old and new delta."""
    old = nn.Parameter(start())
    optimizer = ours(old)
    for gradient in gradients(steps):
        old.grad = gradient.clone()
        optimizer.step()
    found = torch.tensor([place is not None for place in KEPT])
    position = torch.tensor([place if place is not None else 11 for place in KEPT])  # 11: to be ignored
    new = nn.Parameter(torch.where(found, old.detach()[position], 0.0))
    state = {name: value.clone() for name, value in optimizer.state[old].items()}
    optimizer.remap_state(new, position, found)
    return optimizer, state, new


def test_carry_keeps_the_state_of_kept_entries_and_zeros_that_of_new_ones():
    optimizer, before, new = carried(20)
    state = optimizer.state[new]
    assert len(optimizer.state) == 1 and optimizer.param_groups[0]["params"] == [new]
    assert state.keys() == before.keys() == {"exp_avg", "exp_avg_sq", "entry_step"}
    for name, value in before.items():
        expected = [0 if place is None else value[place].item() for place in KEPT]
        assert state[name].tolist() == expected and state[name].dtype == value.dtype
        assert any(expected)


def test_young_entries_take_the_steps_of_a_fresh_optimizer():
    optimizer, _, new = carried(20)
    later = [gradient[: len(KEPT)] for gradient in gradients(30, seed=9)]
    for gradient in later:
        new.grad = gradient.clone()
        optimizer.step()
    for entry, place in enumerate(KEPT):
        own = [gradient[entry : entry + 1] for gradient in later]
        if place is None:
            expected = torchs(torch.zeros(1), own)
        else:
            earlier = [gradient[place : place + 1] for gradient in gradients(20)]
            expected = torchs(start()[place : place + 1], earlier + own)
        assert close(new[entry : entry + 1], expected), entry


def test_the_learning_rate_schedule_goes_on_after_a_carry():
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


def test_make_optimizer_takes_every_key_of_the_recipe():
    settings = OptimizerConfig(lr=0.02, betas=[0.7, 0.9], eps=1e-3, weight_decay=0.5)
    delta, steps = nn.Parameter(start()), gradients(5)
    optimizer = make_optimizer(delta, settings, entry_steps=False)
    for gradient in steps:
        delta.grad = gradient.clone()
        optimizer.step()
    assert close(delta, torchs(start(), steps, lr=0.02, betas=(0.7, 0.9), eps=1e-3, weight_decay=0.5))


def test_pausing_and_carrying_need_ages():
    delta = nn.Parameter(start())
    optimizer = ours(delta, entry_steps=False)
    delta.grad = gradients(1)[0]
    with pytest.raises(ValueError, match="entries that pause need entry_steps"):
        optimizer.step(active=torch.ones(LENGTH, dtype=torch.bool))
    assert torch.equal(delta, start())
    with pytest.raises(ValueError, match="a mask that changes needs entry_steps"):
        optimizer.remap_state(
            nn.Parameter(torch.zeros(1)), torch.zeros(1, dtype=torch.int64), torch.ones(1).bool()
        )


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warmup_rises_to_one_and_every_step_moves(schedule):
    factor = lr_factor(schedule, num_steps=20, warmup_steps=4)
    values = [factor(step) for step in range(20)]
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(value > 0 for value in values)
    assert values[4:] == sorted(values[4:], reverse=True)
    assert factor(20) == pytest.approx(1.0 if schedule == "constant" else 0.0)


def test_linear_and_cosine_meet_halfway():
    for schedule in ("linear", "cosine"):
        assert lr_factor(schedule, 10, 0)(5) == pytest.approx(0.5)


def test_clip_factor():
    assert clip_factor(4.0, 1.0) == 0.25
    assert clip_factor(0.5, 1.0) == 1.0
    assert clip_factor(4.0, None) == 1.0
