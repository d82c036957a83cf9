"""The rules of the schema: what goes with what, and what has no effect."""

from io import StringIO
from typing import get_args

import pytest
from rich.console import Console
from speft_ds.config.train_config import TrainConfig

from speft_ds.cli.commands.schema_reference import as_text, entries, print_reference, rules, takes
from speft_ds.config.mask_config import NEEDS_DATA, MaskConfig
from speft_ds.config.recipe import FIELDS, SECTIONS
from unit.snapshot import check_snapshot
from unit.written import load, refused

pytestmark = pytest.mark.usefixtures("own_folder")


def test_num_trainable_switches_the_default_density_off(tmp_path):
    mask = load(tmp_path, "", "mask.num_trainable=100").mask
    assert (mask.density, mask.num_trainable) == (None, 100)
    mask = load(tmp_path, "mask: {density: 0.1}", "mask.num_trainable=100", "mask.density=null").mask
    assert (mask.density, mask.num_trainable) == (None, 100)
    assert MaskConfig(num_trainable=5).density is None


def test_steps_switch_the_default_epochs_off(tmp_path):
    assert (load(tmp_path).train.steps, load(tmp_path).train.epochs) == (None, 1.0)
    assert load(tmp_path, "", "train.steps=9").train.epochs is None
    assert TrainConfig(steps=5).epochs is None


@pytest.mark.parametrize(
    ("overrides", "is_scored", "needs_calibration"),
    [
        ([], True, True),
        (["mask.salience=lift"], True, False),
        (["mask.load=m"], False, False),
        (["mask.load=m", "mask.schedule=drop_grow"], False, False),
        (["mask.load=m", "mask.schedule=periodic"], True, True),
        (["mask.load=m", "mask.schedule=periodic", "mask.salience=random"], True, False),
    ],
)
def test_when_a_mask_is_scored_and_on_rows(tmp_path, overrides, is_scored, needs_calibration):
    mask = load(tmp_path, "", *overrides).mask
    assert (mask.is_scored, mask.needs_calibration) == (is_scored, needs_calibration)


def test_metrics_that_need_data_are_metrics():
    data_free = {"magnitude", "low_magnitude", "synflow", "random", "lift"}
    assert set(get_args(FIELDS["mask.salience"].annotation)) == NEEDS_DATA | data_free
    assert not NEEDS_DATA & data_free


def test_every_field_has_a_description():
    assert [key for key, field in FIELDS.items() if not field.description] == []


NO_EFFECT = {  # -> the key and values that would give it one
    "mask.block_size=8": "mask.granularity=block",
    "mask.lift_rank=8": "mask.salience=lift",
    "mask.update_every=8": "mask.schedule=periodic or drop_grow",
    "mask.drop_rate=0.3": "mask.schedule=drop_grow",
    "mask.drop_anneal=cosine": "mask.schedule=drop_grow",
    "mask.growth=sft_ma": "mask.schedule=drop_grow",
    "mask.growth_steps=8": "mask.schedule=drop_grow",
    "mask.topk_fraction=0.1": "mask.schedule=grad_topk",
    "mask.gate_every=8": "mask.layer_gate=sampled or half",
    "mask.gate_layers=8": "mask.layer_gate=sampled",
}


@pytest.mark.parametrize("override", NO_EFFECT)
def test_a_key_without_effect_is_refused(tmp_path, override):
    (problem,) = refused(tmp_path, "", override).problems
    key, used_with = override.partition("=")[0], NO_EFFECT[override].partition(" or ")[0]
    default = FIELDS[key].default
    assert problem.what.startswith(f"{override} has no effect with {used_with.partition('=')[0]}=")
    assert problem.where == f"command line: {override}"
    assert problem.fix == f"{key}={default}, its default, or {NO_EFFECT[override]}"
    load(tmp_path, "", override, f"{key}={default}")  # both fixes, as typed
    load(tmp_path, "", override, used_with)


COMBINATIONS = {  # overrides -> what, the last override to blame, and the fixes that mend it
    ("mask.granularity=row", "mask.budget=per_row"): (
        "mask.budget=per_row does not go with mask.granularity=row: a row quota counts single entries",
        "mask.granularity=element, or mask.budget=global or per_layer",
    ),
    ("mask.granularity=block", "mask.schedule=drop_grow"): (
        "mask.schedule=drop_grow does not go with mask.granularity=block: it drops and grows single entries",
        "mask.granularity=element, or mask.schedule=static or periodic or grad_topk",
    ),
    ("mask.schedule=drop_grow", "mask.layer_gate=half"): (
        "mask.layer_gate=half does not go with mask.schedule=drop_grow: entries that the gate keeps still",
        "mask.schedule=static or periodic or grad_topk, or mask.layer_gate=none",
    ),
    ("mask.schedule=drop_grow", "mask.layer_gate=sampled"): (
        "mask.layer_gate=sampled does not go with mask.schedule=drop_grow",
        "mask.schedule=static or periodic or grad_topk, or mask.layer_gate=none",
    ),
    ("mask.budget=per_row", "mask.schedule=drop_grow"): (
        "mask.schedule=drop_grow does not go with mask.budget=per_row: it would not keep the rows' quotas",
        "mask.budget=global or per_layer, or mask.schedule=static or periodic or grad_topk",
    ),
    ("mask.schedule=drop_grow", "mask.update_every=6", "mask.growth_steps=7"): (
        "mask.growth_steps=7 is more than mask.update_every=6",
        "mask.growth_steps=6, or mask.update_every=7 or more",
    ),
    ("mask.salience=grasp",): (
        "mask.salience=grasp needs model.dtype=float32, not bfloat16",
        "model.dtype=float32: it takes a small step along the gradient, which bfloat16 rounds away",
    ),
    ("train.steps=9", "mask.schedule=periodic", "mask.update_every=9"): (
        "mask.update_every=9, train.steps=9: the mask would not change",
        "mask.update_every=1, or train.steps=10 or more",
    ),
    ("mask.schedule=periodic", "train.steps=1", "mask.update_every=1"): (
        "mask.update_every=1, train.steps=1: the mask would not change",
        "train.steps=2 or more",
    ),
    ("train.steps=20", "mask.schedule=drop_grow", "mask.growth_steps=6", "mask.update_every=20"): (
        "mask.update_every=20, train.steps=20: the mask would not change",
        "mask.update_every=6, or train.steps=21 or more",
    ),
}


@pytest.mark.parametrize("overrides", COMBINATIONS)
def test_combinations_that_are_refused(tmp_path, overrides):
    what, fix = COMBINATIONS[overrides]
    (problem,) = refused(tmp_path, "", *overrides).problems
    assert problem.what.startswith(what) and problem.fix == fix
    assert problem.where == f"command line: {overrides[-1]}"
    for way in fix.partition(":")[0].split(", or "):
        load(tmp_path, "", *overrides, way.partition(" ")[0].rstrip(","))  # each fix mends it, as typed


def test_a_default_that_does_not_fit_is_refused_too(tmp_path):
    shown = str(refused(tmp_path, "mask: {schedule: drop_grow, update_every: 3}"))
    assert "mask.growth_steps=5 is more than mask.update_every=3" in shown and "mask.growth_steps=3" in shown
    shown = str(refused(tmp_path, "mask: {schedule: periodic}\ntrain: {steps: 60}"))
    assert "mask.update_every=100, train.steps=60" in shown and "mask.update_every=12" in shown


def test_a_key_without_effect_is_accepted_where_the_choice_is_given_too(tmp_path):
    """One line of a recipe changed: its other lines may stay."""
    text = "mask: {schedule: drop_grow, update_every: 20, growth: sft_ma}"
    assert load(tmp_path, text, "mask.schedule=static").mask.update_every == 20
    load(tmp_path, text, "mask.growth_steps=8")


def test_a_loaded_mask_is_not_scored_by_grasp(tmp_path):
    load(tmp_path, "", "mask.salience=grasp", "mask.load=mask.safetensors")
    refused(tmp_path, "", "mask.salience=grasp", "mask.load=mask.safetensors", "mask.schedule=periodic")


# What `speft schema` prints


def test_the_reference_is_as_it_was():
    """A key, a type, a bound, a default or a meaning that changes should be seen in review."""
    check_snapshot("schema.txt", as_text(entries()) + "\n")


def test_the_reference_has_every_key():
    keys = [entry.key for entry in entries() if "[]" not in entry.key]
    assert keys == ["extends", *FIELDS]


def terminal(width, key=None):
    output = StringIO()
    print_reference(Console(file=output, width=width, force_terminal=True, color_system=None), key)
    return output.getvalue()


@pytest.mark.parametrize("width", [80, 200])
def test_tables_fit_a_terminal(width):
    shown = terminal(width)
    assert all(len(line) <= width for line in shown.splitlines()) and "…" not in shown
    assert all(f"{section}: " in shown for section in SECTIONS)
    assert all(entry.name in shown for entry in entries())


def test_a_section_alone():
    shown = terminal(80, "data")
    assert "data.columns: the names of the columns" in shown and "data.mixture[]" in shown
    assert "mask" not in shown and terminal(80, "data.") == shown


def test_one_key_in_detail():
    assert terminal(80, "mask.density").splitlines() == [
        "mask.density: the fraction of the targets to train",
        "  type     number > 0 and <= 1, or null",
        "  default  0.005",
        "",
    ]
    assert "weight" in terminal(80, "data.mixture").partition("data.mixture[]\n")[2]
    assert terminal(80, "extends").startswith("extends: a recipe")


def test_rules_of_the_schema_are_told():
    for key, needs in NO_EFFECT.items():
        told = " ".join(rules(key.partition("=")[0]))
        assert needs in told
    assert takes("mask.schedule", "grad_topk") == ["mask.topk_fraction"]
    assert any("it drops and grows single entries" in rule for rule in rules("mask.granularity"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{path: a, format: alpaca, template_no_input: x}", "template_no_input is given without a template"),
        ("{path: a, format: messages, template: x}", "template has no effect with format messages"),
        ("{path: a, format: messages, chat_template: false}", "written by the tokenizer's chat template"),
    ],
)
def test_a_source_of_a_mixture_that_contradicts_itself(tmp_path, source, message):
    shown = str(refused(tmp_path, "", "data.path=null", f"data.mixture=[{{path: b}}, {source}]"))
    assert message in shown and "data.mixture[1]" in shown and "command line: data.mixture" in shown


def test_a_source_s_own_template_stands_alone(tmp_path):
    shared = ["data.format=alpaca", "data.template='{instruction}: {input}'"]
    shared += ["data.template_no_input='{instruction}'"]
    mixture = "data.mixture=[{path: a}, {path: b, template: 'Do {instruction}'}]"
    one, other = load(tmp_path, "", "data.path=null", mixture, *shared).data.sources
    assert (one.template, one.template_no_input) == ("{instruction}: {input}", "{instruction}")
    assert (other.template, other.template_no_input) == ("Do {instruction}", None)
