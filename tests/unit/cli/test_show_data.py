"""`speft data`: what the rows of a recipe look like to the model."""

import pytest
import tiny as made
import yaml

from speft_ds.cli.commands.show_data import show_data
from speft_ds.config.load_recipe import load_recipe


@pytest.mark.parametrize("packing", [False, True])
def test_rows_lengths_and_steps_are_shown(tiny, tmp_path, capsys, packing):
    values = made.recipe_values(tiny, data={"packing": packing})
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    show_data(load_recipe(str(tmp_path / "mine.yaml"), []), tmp_path / "data.png")
    out, rows = capsys.readouterr().out, made.read_rows(tiny["data"])
    tokens, labels = sum(len(row.ids) for row in rows), sum(row.num_labels for row in rows)
    assert f"48 rows, {tokens:,} tokens; {labels:,} of them label tokens" in out
    assert "<s>say ant </s><s>[[ant 0</s>]]" in out and "4 steps of 8" in out
    assert ("packs" in out) == packing
    assert (tmp_path / "data.png").read_bytes().startswith(b"\x89PNG")
