"""`speft ls`: what it says of each recipe."""

import pytest

from speft_ds.cli.commands.list_recipes import about
from speft_ds.config.load_recipe import list_recipes
from unit.commands import speft
from unit.written import MINIMAL

GOOD = f"# Good\n# Needs 2.5 GPUs; more\n{MINIMAL}mask: {{num_trainable: 7000}}\n"
pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.mark.parametrize("width", [80, 200])
def test_ls_lists_every_recipe(width):
    done = speft("ls", COLUMNS=str(width))
    assert done.returncode == 0
    words = " ".join(done.stdout.split())
    assert all(name in words for name in list_recipes())
    assert "SmolLM2-135M-Instruct" in words and "0.500%" in words and "quickstart/train.jsonl" in words
    assert all(len(line) <= width for line in done.stdout.splitlines())
    assert "…" not in words  # nothing is cut


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (GOOD, ["Good", "name on rows.jsonl", "needs 2.5 GPUs"]),
        (MINIMAL, ["name on rows.jsonl"]),
        ("# What\n# Needs [1] GPU. More.\nseed: [red]\n", ["What", "does not load", "needs [1] GPU"]),
    ],
)
def test_what_ls_says_of_a_recipe(tmp_path, monkeypatch, text, lines):
    (tmp_path / "mine.yaml").write_text(text)
    for module in ("config.load_recipe", "cli.commands.list_recipes"):
        monkeypatch.setattr(f"speft_ds.{module}.RECIPES_DIR", tmp_path)
    said = about("mine").plain.splitlines()
    assert len(said) == len(lines) and all(map(str.startswith, said, lines))
    assert "seed: [red]" not in text or ("model.name_or_path" in said[1] and "seed" in said[1])
    assert "7000" not in text or "7,000 weights" in said[1]
