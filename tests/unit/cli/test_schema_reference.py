"""`speft schema`: every key with its type, default and meaning, and the rules between keys."""

import json
from io import StringIO

import pytest
from rich.console import Console

from speft_ds.cli.commands.schema_reference import keys, print_reference, rules
from speft_ds.config.recipe import FIELDS, SECTIONS, Recipe
from unit.commands import run


def printed(key=None, width=80, is_terminal=True):
    output = StringIO()
    console = Console(file=output, width=width, force_terminal=is_terminal, color_system=None)
    print_reference(console, key)
    return output.getvalue()


def test_the_reference_has_every_key():
    assert [key for key in keys() if "[]" not in key] == ["extends", *FIELDS]
    lines = {line.partition(" (")[0]: line for line in printed(is_terminal=False).splitlines()}
    assert list(lines) == list(keys())
    assert all(field.description in lines[key] for key, field in FIELDS.items())


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("mask.density", "number > 0 and <= 1, or null; default 0.005"),
        ("mask.drop_rate", "number > 0 and < 1; default 0.2"),
        ("mask.layers", "list of 2: integer >= 0, or null; default null"),
        ("mask.targets", "list of 1 or more: text, or null; default null"),
        ("mask.growth", "sft_ag | sft_ma; default sft_ag"),
        ("model.name_or_path", "path; required"),
        ("train.checkpoint_every", "integer or text, or null; default 15 minutes"),
        ("eval.before", "true | false; default true"),
        ("optimizer.betas", "list of 2: number >= 0 and < 1; default [0.9, 0.999]"),
        ("data.mixture", "list of 1 or more: source section, or null; default null"),
        ("data.mixture[].path", "path; required"),
        ("data.mixture[].columns", "columns section, or null; default null"),
        ("data.chat_template_kwargs", "keys and values, or null; default null"),
        ("extends", "text; default null"),
    ],
)
def test_types_bounds_and_defaults(key, kind):
    assert printed(key, is_terminal=False).startswith(f"{key} ({kind}): ")


@pytest.mark.parametrize("width", [80, 200])
def test_tables_fit_a_terminal(width):
    shown = printed(width=width)
    assert all(len(line) <= width for line in shown.splitlines()) and "…" not in shown
    assert all(f"{section}: " in shown for section in SECTIONS)
    assert all(key.rpartition(".")[2] in shown for key in keys())


def test_a_section_alone():
    shown = printed("data")
    assert "data.columns: " in shown and "data.mixture[]" in shown
    assert "mask" not in shown and printed("data.") == shown
    assert "weight" in printed("data.mixture").partition("data.mixture[]\n")[2]


@pytest.mark.parametrize(
    ("key", "other"),
    [
        ("mask.block_size", "mask.granularity=block"),
        ("mask.granularity", "mask.schedule=drop_grow"),
        ("mask.schedule", "mask.topk_fraction"),
        ("mask.density", "mask.num_trainable"),
        ("data.labels", "data.format=classification"),
        ("data.chat_template", "data.format=prompt_completion"),
        ("optimizer.momentum", "optimizer.name=sgd"),
    ],
)
def test_rules_are_told_of_both_keys(key, other):
    assert any(key in rule and other in rule for rule in rules(key)) and rules("seed") == []
    assert all(rule in " ".join(printed(key, is_terminal=False).split()) for rule in rules(key))


def test_json_schema_is_for_files(monkeypatch, capsys):
    assert run(monkeypatch, "schema", "--json") == 0
    schema = json.loads(capsys.readouterr().out)
    assert "name" not in schema["properties"] and "extends" in schema["properties"]
    assert set(Recipe.model_fields) - {"name"} < set(schema["properties"])
    assert "required" not in schema and schema["additionalProperties"] is False
    mask = schema["$defs"]["MaskConfig"]["properties"]
    assert mask["drop_rate"]["exclusiveMaximum"] == 1 and mask["budget"]["enum"][0] == "global"
