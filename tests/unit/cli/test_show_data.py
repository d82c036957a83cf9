"""`speft data`: what the rows of a recipe look like to the model."""

import pytest
import tiny as made
import yaml

from unit.commands import run


@pytest.mark.parametrize("packing", [False, True])
def test_rows_lengths_and_steps_are_shown(tiny, tmp_path, capsys, monkeypatch, packing):
    values = made.recipe_values(tiny, data={"packing": packing})
    recipe, picture = tmp_path / "mine.yaml", tmp_path / "data.png"
    recipe.write_text(yaml.safe_dump(values))
    assert run(monkeypatch, "data", str(recipe), "--output", str(picture)) == 0
    out, rows = capsys.readouterr().out, made.read_rows(tiny["data"])
    tokens, labels = sum(len(row.ids) for row in rows), sum(row.num_labels for row in rows)
    assert f"48 rows, {tokens:,} tokens; {labels:,} of them label tokens" in out
    assert "<s>say ant </s><s>[[ant 0</s>]]" in out and "4 steps of 8" in out
    assert ("packs" in out) == packing
    assert picture.read_bytes().startswith(b"\x89PNG")
