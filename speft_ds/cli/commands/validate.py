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

import typer
from rich.console import Console

from speft_ds import hub
from speft_ds.cli.launch import EXIT_USER_ERROR
from speft_ds.cli.options import Overrides, Ranks, RecipeName
from speft_ds.cli.start_ranks import count_gpus, default_ranks
from speft_ds.config.load_recipe import load_recipe
from speft_ds.config.recipe import FIELDS, Recipe
from speft_ds.data.conversations import EmptyRow
from speft_ds.data.formats import make_example
from speft_ds.data.readers import iterate_rows
from speft_ds.errors import RecipeError, UserError
from speft_ds.jobs.preflight import CHECKS, resolve_offline
from speft_ds.training.checkpoint.folder import checkpoint_entry, num_checkpoints
from speft_ds.training.run_dir import check_output_dir

NUM_ROWS = 3
OK, NOTE, PROBLEM, SKIPPED = "[green]✓[/green]", "[yellow]![/yellow]", "[red]✗[/red]", "-"
Found = tuple[str, str]  # a mark, and what was found


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
        return NOTE, f"{name}: not in the hub's cache, will be fetched from {hub.endpoint()}"
    accumulated = train.global_batch // (train.micro_batch * num_ranks)
    batch = f"{train.global_batch} = {train.micro_batch} x {num_ranks} ranks x {accumulated} accumulated"
    passed = {
        "model": name,
        "data": ", ".join(source.path for source in recipe.data.sources),
        "mask": recipe.mask.load or f"scored by {recipe.mask.salience}",
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


def rows_found(recipe: Recipe, num_ranks: int) -> Found:
    """The first rows of each source as the model sees them."""
    from speft_ds.data.dataset_cache import DatasetSpec, classes_of  # late: they import numpy
    from speft_ds.data.tokenize import load_tokenizer

    tokenizer = load_tokenizer(recipe.model.name_or_path, recipe.where("model.name_or_path"))
    encoder = DatasetSpec.from_recipe(recipe).encoder(tokenizer)
    classes, classify = classes_of(recipe.data), recipe.model.task == "sequence_classification"
    examples = []
    for source in recipe.data.sources:
        for where, row in islice(iterate_rows(source), NUM_ROWS):
            try:
                examples.append((where, make_example(row, where, source, classes, classify)))
            except EmptyRow:
                if recipe.data.empty_rows == "refuse":
                    raise
    rows = [made.row for some in encoder.encode(examples) for made in some if made.row is not None]
    if not rows:
        return NOTE, "the first rows are all left out: speft data tells why"
    lines = ["the first ones; [[trained on]]", *(f"note: {note}" for note in encoder.turns.notes())]
    for number, row in enumerate(rows, 1):
        text = "".join(f"[[{part}]]" if is_label else part for part, is_label in row.as_text(tokenizer))
        lines.append(f"row {number}, {len(row.ids)} tokens: {text}")
    return OK, "\n     ".join(lines)


def targets_found(recipe: Recipe, num_ranks: int) -> Found:
    """What is trained, and whether the disk has room for it."""
    from speft_ds.tools.plan.geometry import read_geometry
    from speft_ds.training.checks import check_shapes  # late: they import torch

    geometry = read_geometry(recipe)
    check_shapes(recipe.mask, geometry.targets)
    share = geometry.num_entries / geometry.num_target_elements
    number = num_checkpoints(recipe.train, recipe.train.steps or 0)  # of epochs: without train.keep_every
    num_bytes = 8 + number * checkpoint_entry(recipe)  # per entry; 8 of the adapter, at most
    needed = num_bytes * (geometry.num_entries + geometry.num_head)
    folder = Path(recipe.output_dir).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    sizes = f"{needed / 2**30:.2f} GiB of {free / 2**30:.1f} free"
    disk = f"adapter and checkpoints (up to {number} at a time) take {sizes}"
    if needed > free:
        raise UserError(f"the disk is too full: {disk}", str(existing), "free space there")
    return OK, (
        f"{len(geometry.targets)} linears, {geometry.num_target_elements:,} weights; "
        f"{geometry.num_entries:,} of them trained ({share:.3%}); {disk}"
    )


CHECKED: dict[str, Callable[[Recipe, int], Found]] = {
    "recipe": keys_found,
    **{title: partial(input_found, title) for title in CHECKS},
    "run folder": run_folder_found,
    "GPUs": gpus_found,
    "rows as the model sees them": rows_found,
    "targets and disk": targets_found,
}
NEEDED = {"rows as the model sees them": ("model", "data"), "targets and disk": ("model", "mask")}


def validate(recipe: RecipeName, overrides: Overrides = None, ranks: Ranks = None) -> None:
    """Check a recipe, its model, its data and this machine, as far as that goes without training.

    Every check says what it found; exits with 2 where something has to be fixed.
    """
    console, overrides = Console(highlight=False, soft_wrap=True), overrides or []
    try:
        loaded = load_recipe(recipe, overrides)
    except RecipeError as error:
        _print(console, "1. recipe", PROBLEM, recipe, error.problems)
        num_problems = len(error.problems)
    else:
        num_problems = _print_checks(console, loaded, ranks or default_ranks(count_gpus()))
    if num_problems:
        console.print(f"[red]{num_problems} problem{'' if num_problems == 1 else 's'} to fix[/red]")
        raise typer.Exit(EXIT_USER_ERROR)
    command = shlex.join(["deepspeed", "launch/train.py", "--recipe", recipe, *overrides])
    console.print("[green]ready[/green]; ", end="")
    console.print(f"start it: {command}", markup=False)


def _print_checks(console: Console, recipe: Recipe, num_ranks: int) -> int:
    """Run and print every check; returns the number of problems."""
    if note := resolve_offline(recipe):
        console.print(note, markup=False)
    marks, num_problems = {}, 0
    for number, (title, find) in enumerate(CHECKED.items(), 1):
        problems, needed = [], NEEDED.get(title, ())
        try:
            if all(marks[other] == OK for other in needed):
                marks[title], found = find(recipe, num_ranks)
            else:
                marks[title], found = SKIPPED, f"needs the {' and the '.join(needed)}"
        except UserError as error:
            marks[title], found = PROBLEM, ""
            problems = error.problems if isinstance(error, RecipeError) else [error]
        _print(console, f"{number}. {title}", marks[title], found, problems)
        num_problems += len(problems)
    return num_problems


def _print(console: Console, title: str, mark: str, found: str, problems: Sequence[UserError]) -> None:
    console.print(f"{mark} {title}:", end=" ")
    console.print(found, markup=False)
    for line in "\n".join(map(str, problems)).splitlines():
        console.print(f"     {line}", markup=False)
