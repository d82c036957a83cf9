"""The layer gate: how much it opens, and that seed and period alone say what."""

from collections import Counter

import pytest
import torch

from speft_ds.comm import collectives
from speft_ds.config.mask_config import MaskConfig
from speft_ds.model.targets import layer_number
from speft_ds.training.layer_sampler import LayerSampler

LAYERS, KINDS = range(7), ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
NAMES = [f"model.layers.{layer}.{kind}.weight" for layer in LAYERS for kind in KINDS]
SAMPLED = {"layer_gate": "sampled", "gate_layers": 3, "gate_every": 4}
IMPORTANCE = {"layer_gate": "importance", "gate_layers": 3, "gate_every": 4}
HALF = {"layer_gate": "half", "gate_every": 4}


def sampler(seed: int, names: list[str], **gate) -> LayerSampler:
    section = MaskConfig(**gate)
    return LayerSampler(section.layer_gate, section.gate_every, section.gate_layers, seed, names)


def opened(gate: dict, period: int, seed: int = 5, names=NAMES) -> frozenset[str]:
    """What is open in a period, whatever was drawn before."""
    layer_gate = sampler(seed, names, **gate)
    layer_gate.resample(period * gate["gate_every"])
    return frozenset(name for name in names if layer_gate.is_active(name))


def layers_of(names) -> set[int]:
    return {int(name.split(".")[2]) for name in names}


@pytest.mark.parametrize("gate_layers", [1, 3, 7, 8])
@pytest.mark.parametrize("gate", [SAMPLED, IMPORTANCE])
def test_complete_layers_are_opened(gate, gate_layers):
    for period in range(20):
        names = opened({**gate, "gate_layers": gate_layers}, period)
        assert len(layers_of(names)) == min(gate_layers, len(LAYERS))
        assert names == {name for name in NAMES if layers_of([name]) <= layers_of(names)}


def test_sampled_counts_the_layers_of_the_mask_alone():
    names = [name for name in NAMES if layers_of([name]) <= {2, 5}]
    seen = {opened({**SAMPLED, "gate_layers": 1}, period, names=names) for period in range(20)}
    assert {frozenset(layers_of(names)) for names in seen} == {frozenset({2}), frozenset({5})}


def test_weights_outside_of_the_layers_are_always_open():
    """As LISA trains the head and the embedding all the time; they would never get their turn."""
    names = [*NAMES, "lm_head.weight"]
    for period in range(20):
        found = opened(SAMPLED, period, names=names)
        assert "lm_head.weight" in found and len(layers_of(found - {"lm_head.weight"})) == 3


@pytest.mark.parametrize("number", [1, 2, 20, 21])
def test_half_opens_half_of_the_weights(number):
    for period in range(20):
        assert len(opened(HALF, period, names=NAMES[:number])) == (number + 1) // 2


def test_without_a_gate_all_is_open():
    gate = sampler(5, NAMES)
    for step in range(50):
        gate.resample(step)
        assert gate.active is None and all(map(gate.is_active, NAMES))


@pytest.mark.parametrize("gate", [SAMPLED, IMPORTANCE, HALF])
def test_a_draw_lasts_a_period_and_depends_on_seed_and_period_alone(gate):
    by_step = []
    layer_gate = sampler(5, NAMES, **gate)
    assert layer_gate.active == opened(gate, 0)  # drawn before the first step
    for step in range(40):
        layer_gate.resample(step)
        by_step.append(layer_gate.active)
    assert by_step == [opened(gate, step // 4) for step in range(40)]
    assert len(set(by_step)) >= 6  # of ten periods; a draw of one in 35 may come twice
    layer_gate.resample(0)
    assert layer_gate.active == by_step[0]
    other = [opened(gate, step // 4, seed=6) for step in range(40)]
    assert sum(a != b for a, b in zip(by_step, other, strict=True)) >= 32


@pytest.mark.parametrize(("gate", "share"), [(SAMPLED, 3 / 7), (IMPORTANCE, 3 / 7), (HALF, 11 / 21)])
def test_every_weight_gets_its_turn(gate, share):
    periods = 400
    turns = Counter(name for period in range(periods) for name in opened(gate, period))
    assert turns.keys() == set(NAMES)
    # Four standard deviations of a fair draw.
    margin = 4 * (periods * share * (1 - share)) ** 0.5
    assert all(abs(count - share * periods) < margin for count in turns.values()), turns


def test_important_layers_get_more_turns():
    """One of seven, in proportion to the norms, which are rounded to quarters of an octave; not below 5%."""
    gate = sampler(5, NAMES, **{**IMPORTANCE, "gate_layers": 1})
    gate.importance = [1.0, 0.5, 4.0, 1e-9, 0.0, None, 2.0 * 2**0.12]
    expected = [1.0, 0.5, 4.0, 0.2102, 0.2102, 4.0, 2.0]  # 5% of 4, rounded
    turns, periods = Counter(), 3000
    for period in range(periods):
        gate.resample(4 * period)
        turns.update(layers_of(gate.active))
    for layer, weight in enumerate(expected):
        share = weight / sum(expected)
        assert abs(turns[layer] - share * periods) < 4 * (periods * share * (1 - share)) ** 0.5, turns


def test_importance_is_the_mean_norm_of_the_layers_that_were_open(monkeypatch):
    monkeypatch.setattr(collectives, "all_reduce", lambda own: own)
    gate = sampler(5, NAMES, **IMPORTANCE)
    open_layers = layers_of(gate.active)
    gradient = {name: torch.full((layer_number(name) + 1,), 2.0) for name in NAMES}
    assert [gate.observes for step in range(4) if gate.resample(step) is None] == [False] * 3 + [True]
    gate.observe(gradient)
    norms = [2.0 * (3 * (layer + 1)) ** 0.5 if layer in open_layers else None for layer in LAYERS]
    assert gate.importance == pytest.approx(norms)
    gate.observe({name: 3 * own for name, own in gradient.items()})
    assert gate.importance == pytest.approx([norm and 2 * norm for norm in norms])
