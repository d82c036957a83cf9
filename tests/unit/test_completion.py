"""Tab completion: what is offered for recipes, keys and values, and the shells' protocol."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from speft_ds.commands.completion import complete_key, complete_override, complete_recipe
from speft_ds.config.load_recipe import ROOT, list_recipes
from speft_ds.config.recipe import FIELDS


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick.yaml").write_text("# Mine\nseed: 1\n")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "other.yml").write_text("seed: 1\n")
    (tmp_path / "notes.txt").write_text("")


def offered(incomplete, *before):
    """What is offered for a word of KEY=VALUE, after other such words."""
    return [
        typed for typed, _ in complete_override(SimpleNamespace(params={"overrides": before}), incomplete)
    ]


def test_recipes_are_names_and_files():
    everything = dict(complete_recipe(""))
    assert set(everything) == {*list_recipes(), "quick.yaml", "below/other.yml"}
    assert everything["quickstart"].startswith("A first sparse fine-tuning run")
    assert everything["quick.yaml"] == "Mine" and everything["below/other.yml"] == ""
    assert [typed for typed, _ in complete_recipe("quick")] == ["quickstart", "quick.yaml"]
    assert complete_recipe("zzz") == []


def test_sections_come_first_then_their_keys():
    assert {"mask.", "model.", "seed=", "output_dir="} <= set(offered(""))
    assert not any("=" in typed for typed in offered("m"))
    keys = [f"{key}=" for key in FIELDS if key.startswith("mask.")]
    assert offered("mask.") == keys == offered("ma")  # only one section begins so
    assert {"data.path=", "data.columns."} <= set(offered("data."))
    assert "data.columns.prompt=" in offered("data.columns.")
    about = dict(complete_override(SimpleNamespace(params={}), "mask."))
    assert about["mask.density="] == FIELDS["mask.density"].description
    assert about["mask.layers="].startswith(r"\[first, last] decoder layers")  # no markup


def test_a_key_comes_with_its_choices_or_its_default():
    assert offered("mask.growth")[:1] == ["mask.growth="]
    assert offered("mask.drop_a") == [
        "mask.drop_anneal=",
        "mask.drop_anneal=linear",
        "mask.drop_anneal=cosine",
    ]
    assert offered("optimizer.lr") == ["optimizer.lr=", "optimizer.lr=0.001"]
    assert offered("model.name") == ["model.name_or_path="]


def test_values_are_the_choices():
    assert offered("model.dtype=") == ["model.dtype=bfloat16", "model.dtype=float32"]
    assert offered("eval.before=t") == ["eval.before=true"]
    assert offered("mask.salience=fo") == ["mask.salience=force"]
    assert offered("nothing=") == []


def test_values_as_bash_splits_them():
    assert offered("fl", "model.dtype", "=") == ["float32"]
    assert offered("", "model.dtype") == ["bfloat16", "float32"]  # the word at hand is `=`
    assert offered("", "optimizer.lr", "=") == []  # then bash offers files
    assert offered("mask.den", "seed=3") == ["mask.density=", "mask.density=0.005"]


def test_keys_of_schema():
    assert {"mask", "data.columns", "seed", "extends"} <= {typed for typed, _ in complete_key("")}
    assert ("mask.density", FIELDS["mask.density"].description) in complete_key("mask.d")


def by_shell(**variables):
    env = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, "-m", "speft_ds.cli"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("words", "at", "expected"),
    [
        ("speft sco", 1, ["score"]),
        ("speft show quick", 2, ["quickstart", "quick.yaml"]),
        ("speft show quickstart mask.salience = gr", 5, ["gradient", "grasp", "grad_low_magnitude"]),
        ("speft show quickstart model.dtype =", 4, ["bfloat16", "float32"]),
        ("speft score quickstart seed = 3 mask.den", 6, ["mask.density=", "mask.density=0.005"]),
        ("speft schema mask.den", 2, ["mask.density"]),
        ("speft show --pl", 2, ["--plain"]),
    ],
)
def test_bash(words, at, expected):
    assert by_shell(COMP_WORDS=words, COMP_CWORD=str(at), _SPEFT_COMPLETE="complete_bash") == expected


def test_zsh_shows_descriptions():
    shown = by_shell(_TYPER_COMPLETE_ARGS="speft show quickstart mask.lay", _SPEFT_COMPLETE="complete_zsh")
    assert '"mask.layers=":"[first, last] decoder layers' in shown[0]
