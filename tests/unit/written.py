"""Recipes that tests write on the spot."""

from speft_ds.recipe import load_recipe

MINIMAL = "model:\n  name_or_path: owner/name\ndata:\n  path: rows.jsonl\n"  # four lines; tests append


def load(tmp_path, text="", *overrides):
    """A recipe of the four lines that have no default, and `text`, loaded with overrides."""
    (tmp_path / "mine.yaml").write_text(MINIMAL + text)
    return load_recipe("mine.yaml", overrides)
