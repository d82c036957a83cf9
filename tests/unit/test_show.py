"""`speft show`: the resolved recipe, where its values come from, and that it loads again."""

import json
import re

import pytest
import yaml

from speft_ds.cli.commands.show_recipe import annotated_yaml
from speft_ds.config.load_recipe import RECIPES_DIR, load_recipe, resolved_yaml
from unit.commands import speft
from unit.written import MINIMAL, load

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.mark.parametrize("option", [[], ["--plain"]])
def test_show_prints_the_resolved_recipe(option):
    overrides = ["mask.density=0.01", "mask.targets=[a, b]"]
    done = speft("show", "quickstart", *overrides, *option)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout) == yaml.safe_load(resolved_yaml(load_recipe("quickstart", overrides)))
    assert ("#" in done.stdout) == (not option)


def origins(text):
    """key -> comment of an annotated recipe, keys below one another."""
    section, found = "", {}
    for line in text.splitlines():
        name, _, rest = line.strip().partition(":")
        if rest:
            found[f"{section}{name}" if line[0] == " " else name] = rest.rpartition("  # ")[2]
        else:
            section = f"{name}."
    return found


def test_show_says_where_values_come_from(tmp_path):
    (tmp_path / "base.yaml").write_text(MINIMAL + "seed: 3\noptimizer: {lr: 1e-4}\n")
    (tmp_path / "mine.yaml").write_text("extends: ./base.yaml\nseed: 4\n")
    text = annotated_yaml(load_recipe("mine.yaml", ["mask.num_trainable=5"]))
    found = origins(text)
    assert found["model.name_or_path"] == "base.yaml:2" and found["optimizer.lr"] == "base.yaml:6"
    assert found["seed"] == "mine.yaml:2"
    assert found["mask.num_trainable"] == "command line"
    assert found["mask.density"] == "not used: another key takes its place"
    assert found["output_dir"] == found["train.epochs"] == "default"
    assert len({line.index("  # ") for line in text.splitlines() if "  # " in line}) == 1  # aligned


LONG = "a {prompt}\n\n# no comment: 'x' \"y\" \\ é\u2028 " + "z" * 200


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"mask: {{targets: [{json.dumps(LONG)}, 'null', '1e3', '~', '- a']}}\noptimizer: {{eps: 1e-12}}",
        "output_dir: 'a: b #c'\nmask: {layers: [0, 3]}",
    ],
)
def test_annotated_recipes_load_again_as_the_same(tmp_path, text):
    recipe = load(tmp_path, text)
    check_that_it_loads_again(tmp_path, recipe)


def test_an_annotated_mixture_loads_again(tmp_path):
    mixture = "{path: a.jsonl, weight: 2, columns: {prompt: q}}, {path: b.jsonl, weight: 1}"
    recipe = load(tmp_path, "", "data.path=null", f"data.mixture=[{mixture}]")
    assert "null" not in annotated_yaml(recipe).partition("mixture: ")[2].partition("\n")[0]
    check_that_it_loads_again(tmp_path, recipe)


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES_DIR.glob("*.yaml")))
def test_every_recipe_annotated_loads_again(tmp_path, name):
    check_that_it_loads_again(tmp_path, load_recipe(name))


def check_that_it_loads_again(folder, recipe):
    """Annotated, written to a file of that name and loaded, it is the same; each value has one line."""
    text = annotated_yaml(recipe)
    (folder / "again").mkdir()
    (folder / "again" / f"{recipe.name}.yaml").write_text(text)
    again = load_recipe(f"again/{recipe.name}.yaml")
    assert again.model_dump() == recipe.model_dump()
    assert all(re.match(r" *\w+:( |$)", line) for line in text.splitlines())
