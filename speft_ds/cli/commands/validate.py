"""`speft validate`: all that can be known of a recipe before GPUs are taken, check by check.

The checks of `jobs.preflight` come first, then what a launched job finds out later. What needs torch comes
last, and only where nothing is missing. Imports no torch before.
"""

import shlex
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from speft_ds import hub
from speft_ds.cli.launch import EXIT_USER_ERROR
from speft_ds.cli.options import Overrides, Ranks, RecipeName
from speft_ds.cli.start_ranks import count_gpus
from speft_ds.config.data_config import Source
from speft_ds.config.load_recipe import load_recipe
from speft_ds.config.recipe import FIELDS, Recipe
from speft_ds.data.bad_rows import BadRow, BadRows
from speft_ds.data.sources import iterate_rows
from speft_ds.errors import RecipeError, UserError
from speft_ds.jobs.preflight import CHECKS, resolve_offline
from speft_ds.terminal import Console
from speft_ds.training.checkpoint.folder import checkpoint_entry, num_checkpoints
from speft_ds.training.run_dir import check_output_dir

NUM_ROWS = 1000  # that are read of each source, unless all are
NUM_SHOWN, MOST_NAMED = 3, 20  # rows as text, and rows that are left out by name
ROWS = "rows as the model sees them"
OK, NOTE, PROBLEM, SKIPPED = "ok", "note", "problem", "skipped"  # in a log; on a terminal:
SIGNS = {OK: "[green]✓[/green]", NOTE: "[yellow]![/yellow]", PROBLEM: "[red]✗[/red]", SKIPPED: "-"}
Found = tuple[str, str]  # a mark, and what was found
Check = Callable[[Recipe, int], Found]


def keys_found(recipe: Recipe, num_ranks: int) -> Found:
    num_set = sum(recipe.is_given(key) for key in FIELDS)
    return OK, f"{num_set} keys set, {len(FIELDS) - num_set} by default (speft show lists them)"


def input_found(title: str, recipe: Recipe, num_ranks: int) -> Found:
    """A check of the launched jobs: what it passed."""
    if problems := CHECKS[title](recipe, "train", num_ranks):
        raise RecipeError(problems)
    train, name = recipe.train, recipe.model.name_or_path
    folder = hub.model_folder(name)
    if title == "model" and (folder is None or hub.missing_weights(folder)):
        return NOTE, f"{name}: not in the hub's cache, will be fetched from {hub.public_endpoint()}"
    accumulated = train.global_batch // (train.micro_batch * num_ranks)
    batch = f"{train.global_batch} = {train.micro_batch} x {num_ranks} ranks x {accumulated} accumulated"
    passed = {
        "model": name,
        "data": ", ".join(source.path for source in recipe.data.sources),
        "method": recipe.method.name,
        "mask": recipe.mask.load
        or (f"scored by {recipe.mask.salience}" if recipe.method.has_mask else "none"),
        "tasks": ", ".join(recipe.eval.tasks) or "none",
        "DeepSpeed and batch": f"{recipe.deepspeed.config}, merged without conflict; global batch {batch}",
    }
    return OK, passed[title]


def run_folder_found(recipe: Recipe, num_ranks: int) -> Found:
    check_output_dir(recipe)
    return OK, recipe.output_dir


def gpus_found(recipe: Recipe, num_ranks: int) -> Found:
    if num_gpus := count_gpus():
        return OK, f"{num_gpus} on this machine"
    return NOTE, "none on this machine: here it would run on CPU ranks (gloo)"


def rows_found(recipe: Recipe, num_ranks: int, most: int | None = NUM_ROWS) -> Found:
    """The first rows of each source as the model sees them, up to `most`; those that are left out by line."""
    from speft_ds.data.dataset_cache import DatasetSpec, classes_of, encode_rows  # late: they import numpy
    from speft_ds.data.tokenize import recipe_tokenizer

    spec, bad = DatasetSpec.from_recipe(recipe), BadRows(names_all=most is None)
    classes = classes_of(recipe.data, bad)
    tokenizer = recipe_tokenizer(recipe)
    encoder = spec.encoder(tokenizer)
    num_read, rows, left_out, reads_all = 0, [], [], True
    for source in _sources(recipe):
        located = iterate_rows(source, bad)
        for where, _, encoded in encode_rows(islice(located, most), source, spec, encoder, classes, bad):
            num_read += 1
            left_out += [f"{where}: {made.change}" for made in encoded if made.row is None]
            rows += [made.row for made in encoded if made.row is not None][: NUM_SHOWN - len(rows)]
        reads_all = reads_all and next(located, None) is None
    bad.check()
    scope = "all" if reads_all else f"the first {most:,} of each source; --all reads all"
    lines = [f"{num_read:,} rows read ({scope}), {len(left_out):,} left out", *left_out[:MOST_NAMED]]
    if len(left_out) > MOST_NAMED:
        lines.append("and more: speft data --left-out lists them all")
    if not rows:
        return NOTE, "\n     ".join([*lines, "none is left: see data.max_length and data.empty_rows"])
    lines += [*(f"note: {note}" for note in encoder.notes()), "the first ones; [[trained on]]"]
    for number, row in enumerate(rows, 1):
        text = "".join(f"[[{part}]]" if is_label else part for part, is_label in row.as_text(tokenizer))
        lines.append(f"row {number}, {len(row.ids)} tokens: {text}")
    return NOTE if left_out else OK, "\n     ".join(lines)


def _sources(recipe: Recipe) -> list[Source]:
    """Of all rows that a run reads: to train on first, then to validate and to calibrate on."""
    mask = recipe.mask
    files = [recipe.eval.validation, mask.calibration_path if recipe.needs_calibration else None]
    return recipe.data.sources + [recipe.data.of_file(file).sources[0] for file in files if file is not None]


def targets_found(recipe: Recipe, num_ranks: int) -> Found:
    """What is trained, and whether the disk has room for it."""
    from speft_ds.tools.plan.geometry import read_geometry
    from speft_ds.training.checks import check_shapes  # late: they import torch

    geometry = read_geometry(recipe)
    check_shapes(recipe.mask, geometry.targets)
    whole = sum(geometry.numel[name] for name in geometry.whole)
    share = geometry.density
    number = num_checkpoints(recipe.train, recipe.train.steps or 0)  # of epochs: without train.keep_every
    num_bytes = 8 + number * checkpoint_entry(recipe)  # per entry; 8 of the adapter, at most
    needed = num_bytes * (geometry.num_entries + whole)
    folder = Path(recipe.output_dir).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    sizes = f"{needed / 2**30:.2f} GiB of {free / 2**30:.1f} free"
    disk = f"adapter and checkpoints (up to {number} at a time) take {sizes}"
    if needed > free:
        raise UserError(f"the disk is too full: {disk}", str(existing), "free space there")
    trained = (
        f"{geometry.num_entries:,} of their {geometry.num_target_elements:,} elements trained ({share:.3%})"
    )
    return OK, "\n     ".join([*geometry.reach, f"{trained}; {disk}"])


CHECKED: dict[str, Check] = {
    "recipe": keys_found,
    **{title: partial(input_found, title) for title in CHECKS},
    "run folder": run_folder_found,
    "GPUs": gpus_found,
    ROWS: rows_found,
    "targets and disk": targets_found,
}
NEEDED = {ROWS: ("model", "data"), "targets and disk": ("model", "mask")}


def validate(
    recipe: RecipeName,
    overrides: Overrides = None,
    ranks: Ranks = None,
    all_rows: Annotated[
        bool, typer.Option("--all", help=f"read all rows, not the first {NUM_ROWS:,} of each source")
    ] = False,
) -> None:
    """Check a recipe, its model, its data and this machine, as far as that goes without training.

    Every check says what it found; exits with 2 where something has to be fixed.
    """
    console, overrides = Console(highlight=False, soft_wrap=True, markup=True), overrides or []
    try:
        loaded = load_recipe(recipe, overrides)
    except RecipeError as error:
        _print(console, "1. recipe", PROBLEM, recipe, error.problems)
        num_problems = len(error.problems)
    else:
        checks = CHECKED | ({ROWS: partial(rows_found, most=None)} if all_rows else {})
        num_problems = _print_checks(console, checks, loaded, ranks or count_gpus() or 1)
    if num_problems:
        console.print(f"[red]{num_problems} problem{'' if num_problems == 1 else 's'} to fix[/red]")
        raise typer.Exit(EXIT_USER_ERROR)
    options = [] if ranks is None else ["--ranks", str(ranks)]
    console.print("[green]ready[/green]; ", end="")
    console.print(f"start it: {shlex.join(['speft', 'train', recipe, *overrides, *options])}", markup=False)


def _print_checks(console: Console, checks: dict[str, Check], recipe: Recipe, num_ranks: int) -> int:
    """Run and print every check; returns the number of problems."""
    if note := resolve_offline(recipe):
        console.print(note, markup=False)
    marks, num_problems = {}, 0
    for number, (title, find) in enumerate(checks.items(), 1):
        problems, needed = [], NEEDED.get(title, ())
        try:
            if all(marks[other] == OK for other in needed):
                marks[title], found = find(recipe, num_ranks)
            else:
                marks[title], found = SKIPPED, f"needs the {' and the '.join(needed)}"
        except UserError as error:
            marks[title], found = PROBLEM, ""
            problems = error.problems if isinstance(error, RecipeError) else [error]
            if title == "data" and marks.get("model") == OK and all(isinstance(p, BadRow) for p in problems):
                marks[title], found, problems = OK, "its files are there", []  # all bad rows are named below
        _print(console, f"{number}. {title}", marks[title], found, problems)
        num_problems += len(problems)
    return num_problems


def _print(console: Console, title: str, mark: str, found: str, problems: Sequence[UserError]) -> None:
    console.print(f"{SIGNS[mark] if console.is_terminal else f'{mark:<7}'} {title}:", end=" ")
    console.print(found, markup=False)
    for line in "\n".join(map(str, problems)).splitlines():
        console.print(f"     {line}", markup=False)
