"""The rules between keys: what goes with what, and what has no effect."""

import json

import pytest
import yaml

from speft_ds.config.load_recipe import load_recipe, resolved_yaml
from speft_ds.config.mask_config import MaskConfig
from speft_ds.config.recipe import FIELDS, SECTIONS
from speft_ds.config.train_config import OptimizerConfig, TrainConfig
from speft_ds.errors import RecipeError
from unit.written import load, refused, words_to_type

pytestmark = pytest.mark.usefixtures("own_folder")


def test_a_section_knows_its_key():
    assert all(section.key() == key for key, section in SECTIONS.items() if "." not in key)


def test_a_key_switches_off_the_default_of_the_one_that_it_replaces(tmp_path):
    mask = load(tmp_path, "", "mask.num_trainable=100").mask
    assert (mask.density, mask.num_trainable) == (None, 100)
    mask = load(tmp_path, "mask: {density: 0.1}", "mask.num_trainable=100", "mask.density=null").mask
    assert (mask.density, mask.num_trainable) == (None, 100)
    assert MaskConfig(num_trainable=5).density is None and TrainConfig(steps=5).epochs is None
    assert (load(tmp_path).train.epochs, load(tmp_path, "", "train.steps=9").train.epochs) == (1.0, None)


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


@pytest.mark.parametrize("method", ["full", "lisa", "half", "lora", "dora"])
def test_a_method_without_a_mask_sets_aside_the_mask_of_a_recipe_below_it(tmp_path, method):
    """And refuses one beside it, by name; a run's own recipe loads again."""
    text = "mask: {density: 0.1, salience: snip}"
    recipe = load(tmp_path, text, f"method.name={method}")
    assert not recipe.method.has_mask and not recipe.needs_calibration
    again = tmp_path / "again.yaml"
    again.write_text(resolved_yaml(recipe))
    assert load_recipe(str(again)).method == recipe.method
    load(tmp_path, "", f"method.name={method}", "mask.load=null")  # which is none
    for problem in (
        refused(tmp_path, f"{text}\nmethod: {{name: {method}}}"),
        refused(tmp_path, "", f"method.name={method}", "mask.density=0.1"),
    ):
        assert "mask.density" in str(problem) and "method.name=sparse" in str(problem)


def test_no_other_method_than_sparse_trains_a_base_in_few_bits(tmp_path):
    (problem,) = refused(tmp_path, "", "method.name=full", "model.base_format=nf4").problems
    assert set(words_to_type(problem.fix)) == {"method.name=sparse", "model.base_format=null"}


NO_EFFECT = {  # -> the key and a value that would give it one
    "mask.block_size=8": "mask.granularity=block",
    "mask.lift_rank=8": "mask.salience=lift",
    "mask.update_every=8": "mask.schedule=periodic",
    "mask.drop_rate=0.3": "mask.schedule=drop_grow",
    "mask.drop_anneal=cosine": "mask.schedule=drop_grow",
    "mask.growth=sft_ma": "mask.schedule=drop_grow",
    "mask.growth_steps=8": "mask.schedule=drop_grow",
    "mask.topk_fraction=0.1": "mask.schedule=grad_topk",
    "mask.gate_every=8": "mask.layer_gate=sampled",
    "mask.gate_layers=8": "mask.layer_gate=sampled",
    "method.rank=8": "method.name=lora",
    "method.alpha=8.0": "method.name=lora",
    "method.lora_share=0.3": "method.name=sparse_lora",
    "method.every=8": "method.name=lisa",
    "method.layers=8": "method.name=lisa",
    "optimizer.momentum=0.9": "optimizer.name=sgd",
    "data.labels=[a,b]": "data.format=classification",
    "data.template_no_input=x": "data.format=alpaca",
    "data.select_rows=3": "data.select=longest",
    "data.scorer=small": "data.select=ifd",
}


@pytest.mark.parametrize("override", NO_EFFECT)
def test_a_key_without_effect_is_refused(tmp_path, override):
    key, used_with = override.partition("=")[0], NO_EFFECT[override]
    default = FIELDS[key].default
    written = "null" if default is None else default
    needed = {"data.template_no_input=x": ["data.template=x"], "data.scorer=small": ["data.select_rows=3"]}
    (problem,) = refused(tmp_path, "", override).problems
    assert problem.where == f"command line: {override}"
    assert set(words_to_type(problem.fix)) == {used_with, f"{key}={written}"}
    load(tmp_path, "", override, f"{key}={written}")  # both fixes, as typed
    load(tmp_path, "", override, used_with, *needed.get(override, []))


COMBINATIONS = [  # the last word is to blame
    ["mask.granularity=row", "mask.budget=per_row"],
    ["mask.granularity=block", "mask.schedule=drop_grow"],
    ["mask.granularity=row", "mask.only_nonzero=true"],
    ["mask.only_nonzero=true", "mask.compute=0.1"],
    ["mask.schedule=drop_grow", "mask.layer_gate=half"],
    ["mask.schedule=drop_grow", "mask.layer_gate=sampled"],
    ["mask.schedule=drop_grow", "mask.layer_gate=importance"],
    ["mask.budget=per_row", "mask.schedule=drop_grow"],
    ["mask.schedule=drop_grow", "mask.update_every=6", "mask.growth_steps=7"],
    ["mask.salience=grasp"],
    ["mask.salience=quant_error"],
    ["mask.start=exact"],
    ["model.base_format=nf4", "eval.mode=gathered"],
    ["method.name=lora", "eval.mode=gathered"],
    ["train.steps=9", "mask.schedule=periodic", "mask.update_every=9"],
    ["mask.schedule=periodic", "train.steps=1", "mask.update_every=1"],
    ["train.steps=20", "mask.schedule=drop_grow", "mask.growth_steps=6", "mask.update_every=20"],
    ["optimizer.name=sgd", "optimizer.betas=[0.8,0.9]"],
    ["optimizer.name=sgd", "optimizer.eps=1e-6"],
    ["optimizer.name=lion", "optimizer.eps=1e-6"],
    ["optimizer.name=lion", "optimizer.momentum=0.9"],
    ["optimizer.clip_norm=null", "optimizer.clip=per_layer"],
    ["data.chat_template=false", "data.system=x"],
    ["data.chat_template=false", "data.chat_template_kwargs={a: 1}"],
    ["data.chat_template=false", "data.turns=each"],
    ["data.format=text", "data.turns=last"],
    ["data.format=text", "data.system=''"],
    ["data.path=null", "data.mixture=[{path: a.jsonl, format: text}]", "data.turns=each"],
]


@pytest.mark.parametrize("overrides", COMBINATIONS, ids=" ".join)
def test_combinations_that_are_refused(tmp_path, overrides):
    (problem,) = refused(tmp_path, "", *overrides).problems
    assert problem.where == f"command line: {overrides[-1]}"
    ways = words_to_type(problem.fix)
    assert ways
    for way in ways:
        load(tmp_path, "", *overrides, way)  # each fix does, as typed


@pytest.mark.parametrize("word", ["data.date=tomorrow", "data.chat_template_kwargs={tools: 1}"])
def test_what_a_chat_template_is_given_is_checked(tmp_path, word):
    (problem,) = refused(tmp_path, "", word).problems
    assert problem.where == f"command line: {word}" and problem.fix
    section = load(tmp_path, "", "data.date=2026-01-31", "data.chat_template_kwargs={a: [1]}").data
    assert (section.date, section.chat_template_kwargs) == ("2026-01-31", {"a": [1]})


def test_a_default_that_does_not_fit_is_refused_too(tmp_path):
    for text, way in (
        ("mask: {schedule: drop_grow, update_every: 3}", "mask.growth_steps=3"),
        ("mask: {schedule: periodic}\ntrain: {steps: 60}", "mask.update_every=12"),
    ):
        (problem,) = refused(tmp_path, text).problems
        assert way in words_to_type(problem.fix)
        load(tmp_path, text, way)


def test_a_key_without_effect_is_accepted_where_the_choice_is_given_too(tmp_path):
    """One line of a recipe changed: its other lines may stay."""
    text = "mask: {schedule: drop_grow, update_every: 20, growth: sft_ma}"
    assert load(tmp_path, text, "mask.schedule=static").mask.update_every == 20
    load(tmp_path, text, "mask.growth_steps=8")
    # Not an optimizer's: what is left would be another optimizer's.
    text = "optimizer: {betas: [0.8, 0.9]}"
    assert load(tmp_path, text, "optimizer.name=lion").optimizer.betas == [0.8, 0.9]
    (problem,) = refused(tmp_path, text, "optimizer.name=sgd").problems
    assert problem.where == "mine.yaml:5 (optimizer.betas)"


def test_a_loaded_mask_is_not_scored_by_grasp(tmp_path):
    load(tmp_path, "", "mask.salience=grasp", "mask.load=mask.safetensors")
    refused(tmp_path, "", "mask.salience=grasp", "mask.load=mask.safetensors", "mask.schedule=periodic")


def test_lion_has_betas_of_its_own(tmp_path):
    assert load(tmp_path, "optimizer: {name: lion}").optimizer.betas == [0.9, 0.99]
    assert load(tmp_path, "optimizer: {name: lion, betas: [0.95, 0.98]}").optimizer.betas == [0.95, 0.98]
    assert OptimizerConfig(name="lion").betas == [0.9, 0.99] and OptimizerConfig().betas == [0.9, 0.999]


# Mixtures


@pytest.mark.parametrize(
    ("source", "key"),
    [
        ({"format": "alpaca", "template_no_input": "x"}, "template_no_input"),
        ({"format": "messages", "template": "x"}, "template"),
        ({"format": "messages", "chat_template": False}, "chat_template"),
    ],
)
def test_a_source_of_a_mixture_that_contradicts_itself(tmp_path, source, key):
    mixture = [{"path": "b"}, {"path": "a"} | source]
    word = f"data.mixture={json.dumps(mixture)}"
    (problem,) = refused(tmp_path, "", "data.path=null", word).problems
    assert "data.mixture[1]" in problem.what and problem.where == f"command line: {word}" and problem.fix
    recipe = {"model": {"name_or_path": "m"}, "data": {"mixture": mixture}}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError, match=rf"other\.yaml:\d \(data\.mixture\[1\]\.{key}\)"):
        load_recipe("other.yaml")


def test_a_source_s_own_template_stands_alone(tmp_path):
    shared = ["data.format=alpaca", "data.template='{instruction}: {input}'"]
    shared += ["data.template_no_input='{instruction}'"]
    mixture = "data.mixture=[{path: a}, {path: b, template: 'Do {instruction}'}]"
    one, other = load(tmp_path, "", "data.path=null", mixture, *shared).data.sources
    assert (one.template, one.template_no_input) == ("{instruction}: {input}", "{instruction}")
    assert (other.template, other.template_no_input) == ("Do {instruction}", None)


def test_null_in_a_source_is_null_and_stays_so(tmp_path):
    mixture = "data.mixture=[{path: a, subset: null, split: null}, {path: b}]"
    recipe = load(tmp_path, "", "data.path=null", mixture, "data.subset=s", "data.split=test")
    (tmp_path / "again.yaml").write_text(resolved_yaml(recipe))
    for each in (recipe, load_recipe("again.yaml")):
        assert [source.subset for source in each.data.sources] == [None, "s"]
        assert [source.split for source in each.data.sources] == ["test", "test"]


def test_all_rows_of_another_file(tmp_path):
    text = "  mixture: [{path: a, weight: 1}, {path: b, weight: 2}]\n  select: random\n  select_rows: 3"
    data = load(tmp_path, text.replace("mixture", "subset: s\n  mixture"), "data.path=null").data
    other = data.of_file("c.jsonl")
    assert [source.path for source in other.sources] == ["c.jsonl"] and other.weights is None
    assert (other.select, other.select_rows, other.subset) == ("all", None, "s")
    assert data.of_file("c", ["x", "y"]).labels == ["x", "y"]
