"""`speft tune` on real ranks of a tiny model."""

import json

import pytest
import yaml
from live import SPEFT, run_script
from tiny import recipe_values

from speft_ds.config.load_recipe import load_recipe


@pytest.fixture
def tune(tiny, tmp_path):
    """tune(*words, code=0): what `speft tune` says of a recipe of the tiny model, on one rank."""
    values = recipe_values(tiny, mask={"schedule": "periodic", "update_every": 2}, output_dir="runs/mine")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))

    def typed(*words, code=0):
        found, said = run_script(SPEFT, ["tune", "mine.yaml", *words], tmp_path, DS_ACCELERATOR="cpu")
        assert found == code, said
        return said

    return typed


def test_a_range_test_suggests_a_rate_that_learns(tune, tmp_path):
    said = tune("--lr", "train.steps=40", "optimizer.lr=10")
    folder = tmp_path / "runs" / "mine-lr"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = json.loads((folder / "lr.json").read_text())
    assert (folder / "lr.png").read_bytes().startswith(b"\x89PNG")
    assert lines[0]["lr"] == pytest.approx(1e-4) and len(found["rates"]) == len(lines) - 1
    assert found["losses"][:9] == pytest.approx([line["loss"] for line in lines[1:10]])
    assert found["suggested"] <= found["steepest"] * 1.05 and found["steepest"] <= found["lowest"]
    assert f"optimizer.lr={found['suggested']:g}" in said


def test_a_search_leaves_a_front_and_a_recipe_and_goes_on(tune, tiny, tmp_path):
    words = ["--search", "train.steps=8", "mask.schedule=static", f"eval.validation={tiny['data']}"]
    words += ["--over", "optimizer.lr=1e-4..1e-1", "--over", "mask.density=0.01,0.1"]
    tune(*words, "--trials", "2")
    said = tune(*words, "--trials", "3")
    folder = tmp_path / "runs" / "mine-search"
    found = json.loads((folder / "search.json").read_text())
    states = [trial["state"] for trial in found["trials"]]
    assert len(states) == 3 and set(states) <= {"complete", "stopped"}
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")
    for trial in found["trials"]:
        own = folder / f"trial-{trial['number']:04}"
        lines = [json.loads(line) for line in (own / "metrics.jsonl").read_text().splitlines()]
        facts = json.loads((own / "run.json").read_text())
        assert "step" in own.with_suffix(".log").read_text() and facts["mask"]["num_trainable"] > 0
        if trial["state"] == "complete":
            assert trial["values"][:2] == [lines[-1]["validation_loss"], facts["mask"]["num_trainable"]]
    best = found["trials"][found["best"]]
    recipe = load_recipe(str(folder / "best.yaml"))
    assert recipe.mask.density == float(best["params"]["mask.density"]) and recipe.train.steps == 8
    assert recipe.optimizer.lr == pytest.approx(best["params"]["optimizer.lr"], rel=0.01)
    assert "runs/mine-search/best.yaml" in said and recipe.output_dir == "runs/mine-search-best"
