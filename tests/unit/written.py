"""Recipes that tests write on the spot."""

import re

import pytest

from speft_ds.config.load_recipe import load_recipe
from speft_ds.errors import RecipeError
from speft_ds.jobs.preflight import check_inputs

MINIMAL = "model:\n  name_or_path: owner/name\ndata:\n  path: rows.jsonl\n"  # four lines; tests append


def load(tmp_path, text="", *overrides):
    """A recipe of the four lines that have no default, and `text`, loaded with overrides."""
    (tmp_path / "mine.yaml").write_text(MINIMAL + text)
    return load_recipe("mine.yaml", overrides)


def refused(tmp_path, text="", *overrides):
    """The RecipeError that such a recipe raises."""
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text, *overrides)
    return caught.value


def problems_of(recipe, world_size=1, job="train"):
    """What the checks before torch is imported find wrong."""
    with pytest.raises(RecipeError) as caught:
        check_inputs(recipe, job, world_size)
    return caught.value.problems


def words_to_type(fix):
    """The `key=value` of a fix, of each the first value where it offers several."""
    return re.findall(r"\b[a-z_]+(?:\.[a-z_]+)+=(?:\[[^]]*\]|[^\s,;:()]+)", fix)


def write_inputs(folder):
    """A recipe mine.yaml in a folder, with all that it names, as far as is checked without torch."""
    (folder / "model").mkdir()
    for file in ("config.json", "model.safetensors"):
        (folder / "model" / file).write_text("{}")
    (folder / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n\n' * 3)
    (folder / "mine.yaml").write_text(MINIMAL.replace("owner/name", "./model"))
