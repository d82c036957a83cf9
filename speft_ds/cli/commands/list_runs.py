"""`speft runs`: the runs in some folders, one line each."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from speft_ds.config.mask_config import MASK_FILE
from speft_ds.errors import UserError
from speft_ds.report.run import RunFolder, is_run, read_run
from speft_ds.report.tables import plain
from speft_ds.terminal import Console
from speft_ds.training.run_dir import is_locked

MAX_DEPTH = 3  # folders below the named one that are looked into
MAX_SCORES = 3  # of a run


def print_runs(folders: Sequence[Path]) -> None:
    """Print a table of all runs in some folders, the one that was written to last first.

    Raises:
        UserError: a folder is not there, or none has a run.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"no folder {folder}", "command line", "speft runs /the/folder/of/your/runs")
    found = {os.path.realpath(path): path for folder in folders for path in find_runs(folder)}
    if not found:
        what = f"no run in {', '.join(map(str, folders))}"
        raise UserError(what, "command line", "name the folder of your runs, or start one: speft quickstart")
    table = Table(
        "run", "recipe", "model", "state", "scores", box=SIMPLE_HEAD, pad_edge=False, show_edge=False
    )
    for path in sorted(found.values(), key=_last_written, reverse=True):
        run = read_run(path)
        recipe = run.fact("recipe", "") or "-"
        model = Path(run.setting("model.name_or_path", "") or "-").name
        cells = map(plain, (str(path), recipe, model, state_of(run)))
        table.add_row(*cells, Text("\n").join(map(plain, scores_of_run(run))))
    Console().print(table)


def find_runs(folder: Path, depth: int = MAX_DEPTH) -> Iterator[Path]:
    """Run folders at or below a folder; what lies inside a run is not looked at."""
    if is_run(folder):
        yield folder
    elif depth and os.access(folder, os.R_OK | os.X_OK):
        for path in folder.iterdir():
            if path.is_dir():
                yield from find_runs(path, depth - 1)


def state_of(run: RunFolder) -> str:
    """`finished`, `running, step 3 of 60`, `stopped at step 3 of 60`."""
    steps = f"step {run.num_done}" + (f" of {run.num_steps}" if run.num_steps else "")
    if run.is_finished:
        return f"finished, {run.num_done} steps"
    if is_locked(run.folder):
        return f"running, {steps}"
    if not run.lines and (run.folder / MASK_FILE).is_file():
        return "a mask, not trained"
    return f"stopped at {steps}"


def scores_of_run(run: RunFolder) -> list[str]:
    """`arc_easy acc 41.0% -> 61.0%`, a line each."""
    lines = []
    for score in run.evaluations.main_scores():
        values = [each.short for each in run.evaluations.both(score) if each]
        lines.append(f"{score.name} {' -> '.join(values)}")
    more = len(lines) - MAX_SCORES
    return [*lines[:MAX_SCORES], f"and {more} more"] if more > 0 else lines


def _last_written(folder: Path) -> float:
    """When a file of the run, or of its scores, was written last; it may be one that is just replaced."""
    times = [0.0]
    for path in (*folder.iterdir(), *folder.glob("eval/*")):
        with suppress(OSError):
            times.append(path.lstat().st_mtime if path.is_file() else 0.0)
    return max(times)
