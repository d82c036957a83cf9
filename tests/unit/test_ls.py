"""`speft ls`: what it says of each recipe."""

from io import StringIO

import pytest
from rich.console import Console

from speft_ds.cli.commands import list_recipes as listing
from speft_ds.config.load_recipe import list_recipes
from unit.commands import speft
from unit.written import MINIMAL

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.mark.parametrize("width", [80, 200])
def test_ls_lists_every_recipe(width):
    done = speft("ls", COLUMNS=str(width))
    assert done.returncode == 0
    words = " ".join(done.stdout.split())
    assert all(name in words for name in list_recipes())
    assert "SmolLM2-135M-Instruct" in words and "0.500%" in words and "quickstart/train.jsonl" in words
    assert "A first sparse fine-tuning run" in words
    assert all(len(line) <= width for line in done.stdout.splitlines())
    assert "…" not in words  # nothing is cut


@pytest.fixture
def odd_recipes(tmp_path, monkeypatch):
    """A folder of recipes, one of which does not load."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "broken.yaml").write_text("# What\n# Needs [1] GPU. More.\nseed: [red]\n")
    (folder / "good.yaml").write_text(
        f"# Good\n# Needs 2.5 GPUs; more\n{MINIMAL}mask: {{num_trainable: 7000}}\n"
    )
    (folder / "bare.yaml").write_text(MINIMAL)
    for module in ("recipe", "commands.ls"):
        monkeypatch.setattr(f"speft_ds.{module}.RECIPES_DIR", folder)


@pytest.mark.parametrize("width", [80, 200])
def test_ls_shows_a_recipe_that_does_not_load(odd_recipes, width):
    output = StringIO()
    listing.print_list(Console(file=output, width=width))
    words = " ".join(output.getvalue().split())
    assert "does not load: model.name_or_path is missing; seed is ['red']: must be a valid integer" in words


def test_what_ls_says_of_a_recipe(odd_recipes):
    bare, broken, good = listing.list_all()
    assert (good.about, good.needs, good.model, good.density) == ("Good", "2.5 GPUs", "name", "7,000 weights")
    assert (broken.about, broken.needs, broken.model) == ("What", "[1] GPU", "")
    assert (bare.about, bare.needs, bare.data) == ("", "", "rows.jsonl")
