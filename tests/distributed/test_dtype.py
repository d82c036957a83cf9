"""`model.dtype: auto` on ranks that are not alike, from the start to a resumed end."""

import json

import yaml
from live import LiveRun
from tiny import recipe_values

from distributed import rank_hooks


def test_ranks_that_are_not_alike_run_in_one_dtype_and_a_resumed_run_keeps_it(tiny, tmp_path):
    values = recipe_values(tiny, model={"dtype": "auto"}, output_dir=str(tmp_path / "run"))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    logs = (tmp_path / name for name in ("first", "resumed", "other"))

    def run(*more, hooks):
        started = LiveRun(next(logs), ["--recipe", str(tmp_path / "mine.yaml"), *more], hooks=hooks)
        assert started.codes() == [0, 0], started.text()
        return [line for line in started.text().splitlines() if "model.dtype" in line]

    def dtypes(folder):
        facts = json.loads((folder / "adapter" / "adapter.json").read_text())
        return yaml.safe_load((folder / "recipe.yaml").read_text())["model"]["dtype"], facts["dtype"]

    both = dict.fromkeys((0, 1), rank_hooks.multiplies_bfloat16)
    (said,) = run("train.steps=4", hooks={**both, 1: rank_hooks.emulates_bfloat16})
    assert "float32" in said and dtypes(tmp_path / "run") == ("float32", "float32")
    (said,) = run(f"output_dir={tmp_path / 'fast'}", hooks=both)
    assert "bfloat16" in said and dtypes(tmp_path / "fast") == ("bfloat16", "bfloat16")
    # On ranks that would take bfloat16, from the run's own first checkpoint.
    first = tmp_path / "run" / "checkpoints" / "step_000004"
    assert first.is_dir()
    branch = ["--resume", str(first), f"output_dir={tmp_path / 'branch'}"]
    (said,) = run(*branch, hooks=both)
    assert "float32" in said and dtypes(tmp_path / "branch") == ("float32", "float32")
