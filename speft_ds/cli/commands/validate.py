"""`speft validate`: all that can be known of a recipe before GPUs are taken, check by check.

Each check says what it found, or what is wrong and how to mend it. What needs torch comes last, and only
where nothing is missing.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from rich.console import Console
from speft_ds.data.dataset_cache import classes_of

from speft_ds import hub
from speft_ds.cli.start_ranks import count_gpus
from speft_ds.commands.data import print_sample
from speft_ds.config.data_config import Source
from speft_ds.config.deepspeed_config import batch_problems, read_ds_config
from speft_ds.config.load_recipe import load_recipe
from speft_ds.config.recipe import FIELDS, Recipe
from speft_ds.data.formats import Classes, EmptyRow, Example, make_example
from speft_ds.data.readers import iterate_rows
from speft_ds.data.tokenize import Encoder, load_tokenizer
from speft_ds.errors import RecipeError, UserError
from speft_ds.jobs.preflight import model_problems, other_problems, resolve_offline, rows_problems
from speft_ds.training.run_dir import check_output_dir

NUM_ROWS = 3
MARKS = {"ok": "[green]✓[/green]", "problem": "[red]✗[/red]", "note": "[yellow]![/yellow]", "skipped": "-"}
EXIT_PROBLEM = 2


@dataclass
class Outcome:
    """What a check came to: `ok`, a `note` that stops nothing, a `problem`, or `skipped`."""

    what: str
    status: str = "ok"
    problems: list[UserError] = field(default_factory=list)
    samples: list[list[tuple[str, bool]]] = field(default_factory=list)


class Validation:
    """The checks of one recipe, in order.

    Args:
        recipe: loaded.
        num_ranks: that it is to run on.
        num_gpus: of this machine.
    """

    def __init__(self, recipe: Recipe, num_ranks: int, num_gpus: int):
        self.recipe, self.num_ranks, self.num_gpus = recipe, num_ranks, num_gpus
        self.has_model = self.has_rows = False
        self.num_entries: int | None = None
        self.checks: list[tuple[str, Callable[[], Outcome]]] = [
            ("recipe", self.check_recipe),
            ("model", self.check_model),
            ("data", self.check_data),
            ("mask, tasks, run folder", self.check_other_files),
            ("DeepSpeed and batch", self.check_deepspeed),
            ("GPUs", self.check_gpus),
            ("rows as the model sees them", self.check_rows),
            ("targets", self.check_targets),
            ("disk", self.check_disk),
        ]

    def check_recipe(self) -> Outcome:
        num_set = sum(key in self.recipe._sources for key in FIELDS)
        return Outcome(f"{num_set} keys set, {len(FIELDS) - num_set} by default (speft show lists them)")

    def check_model(self) -> Outcome:
        name = self.recipe.model.name_or_path
        if problems := model_problems(self.recipe):
            return Outcome(name, "problem", problems)
        folder = hub.model_folder(name)
        if folder is None or hub.missing_weights(folder):
            return Outcome(f"{name}: not in the hub's cache, will be fetched from {hub.endpoint()}", "note")
        self.has_model = True
        weights = sum(f.stat().st_size for f in folder.iterdir() if f.suffix in hub.WEIGHT_SUFFIXES)
        return Outcome(f"{name}: config and {weights / 2**30:.2f} GiB of weights")

    def check_data(self) -> Outcome:
        problems = rows_problems(self.recipe, needs_training_rows=True)
        names = ", ".join(source.path for source in self.recipe.data.sources) or "none"
        self.has_rows = not problems
        return Outcome(names, "problem" if problems else "ok", problems)

    def check_other_files(self) -> Outcome:
        problems = other_problems(self.recipe)
        try:
            check_output_dir(self.recipe)
        except UserError as error:
            problems.append(error)
        what = f"results go to {self.recipe.output_dir}"
        return Outcome(what, "problem" if problems else "ok", problems)

    def check_deepspeed(self) -> Outcome:
        train, ranks = self.recipe.train, self.num_ranks
        problems = read_ds_config(self.recipe)[1] + batch_problems(self.recipe, ranks)
        what = f"{self.recipe.deepspeed.config}, merged without conflict"
        if problems:
            return Outcome(self.recipe.deepspeed.config, "problem", problems)
        accumulation = train.global_batch // (train.micro_batch * ranks)
        batch = f"{train.global_batch} = {train.micro_batch} x {ranks} ranks x {accumulation} accumulated"
        return Outcome(f"{what}; global batch {batch}")

    def check_gpus(self) -> Outcome:
        if self.num_gpus:
            return Outcome(f"{self.num_gpus} on this machine")
        return Outcome("none on this machine: here it would run on CPU ranks (gloo)", "note")

    def check_rows(self) -> Outcome:
        if not (self.has_model and self.has_rows):
            return Outcome("needs the model and the data", "skipped")
        recipe = self.recipe
        tokenizer = load_tokenizer(recipe.model.name_or_path, recipe.where("model.name_or_path"))
        encoder = Encoder(tokenizer, recipe.data.max_length, recipe.data.long_rows)
        classes, rows = classes_of(recipe.data), []
        for source in recipe.data.sources:
            encoded = encoder.encode(self._first_examples(source, classes))
            rows += [row for row, _ in encoded if row is not None]
        if not rows:
            return Outcome("the first rows are all left out: speft data tells why", "note")
        lengths = ", ".join(str(len(row.ids)) for row in rows)
        samples = [row.as_text(tokenizer) for row in rows]
        return Outcome(f"the first ones, of {lengths} tokens; [[learnt]]", samples=samples)

    def _first_examples(self, source: Source, classes: Classes | None) -> list[tuple[str, Example]]:
        examples, recipe = [], self.recipe
        for where, row in islice(iterate_rows(source), NUM_ROWS):
            try:
                classify = recipe.model.task == "sequence_classification"
                examples.append((where, make_example(row, where, source, classes, classify)))
            except EmptyRow:
                if recipe.data.empty_rows == "refuse":
                    raise
        return examples

    def check_targets(self) -> Outcome:
        if not self.has_model:
            return Outcome("needs the model", "skipped")
        from speft_ds.plan.geometry import read_geometry
        from speft_ds.training.checks import check_shapes  # late: they import torch

        geometry = read_geometry(self.recipe)
        check_shapes(self.recipe, geometry.targets)
        self.num_entries = geometry.num_entries + geometry.num_head
        share = geometry.num_entries / geometry.num_target_elements
        return Outcome(
            f"{len(geometry.targets)} linears, {geometry.num_target_elements:,} weights; "
            f"{geometry.num_entries:,} of them trained ({share:.3%})"
        )

    def check_disk(self) -> Outcome:
        folder = Path(self.recipe.output_dir).absolute()
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        what = f"{free / 2**30:.1f} GiB free at {existing}"
        if not os.access(existing, os.W_OK):
            fix = "choose another output_dir"
            return Outcome(what, "problem", [UserError(f"{existing} is not writable", str(existing), fix)])
        if self.num_entries is None:
            return Outcome(f"{what}; what is needed is known with the model", "note")
        num_checkpoints = self.recipe.train.keep_last + 1  # and the one that is being written
        needed = (8 + 16 * num_checkpoints) * self.num_entries
        what += f"; adapter and {num_checkpoints} checkpoints take {needed / 2**30:.2f} GiB"
        if needed <= free:
            return Outcome(what)
        return Outcome(
            what, "problem", [UserError("the disk is too full", str(existing), "free space there")]
        )


def validate(name_or_path: str, overrides: list[str], num_ranks: int | None = None) -> int:
    """Run and print every check; returns the exit code, 2 where something has to be mended."""
    console = Console(highlight=False, soft_wrap=True)
    try:
        recipe = load_recipe(name_or_path, overrides)
    except RecipeError as error:
        _print(console, "1", "recipe", Outcome(name_or_path, "problem", error.problems))
        return _verdict(console, len(error.problems), "the other checks need a recipe that loads")
    if note := resolve_offline(recipe):
        console.print(note, markup=False)
    num_gpus = count_gpus()
    ranks = num_ranks or num_gpus or 2
    validation, num_problems = Validation(recipe, ranks, num_gpus), 0
    for number, (title, check) in enumerate(validation.checks, 1):
        try:
            outcome = check()
        except RecipeError as error:
            outcome = Outcome("", "problem", error.problems)
        except UserError as error:
            outcome = Outcome("", "problem", [error])
        _print(console, str(number), title, outcome)
        num_problems += len(outcome.problems)
    command = shlex.join(["deepspeed", "launch/train.py", "--recipe", name_or_path, *overrides])
    return _verdict(console, num_problems, f"start it: {command}")


def _print(console: Console, number: str, title: str, outcome: Outcome) -> None:
    console.print(f"{MARKS[outcome.status]} {number}. {title}:", end=" ")
    console.print(outcome.what, markup=False)
    for sample, pieces in enumerate(outcome.samples, 1):
        print_sample(console, f"     row {sample}", pieces)
    for problem in outcome.problems:
        for line in str(problem).splitlines():
            console.print(f"     {line}", markup=False)


def _verdict(console: Console, num_problems: int, otherwise: str) -> int:
    if num_problems:
        plural = "" if num_problems == 1 else "s"
        console.print(f"[red]{num_problems} problem{plural} to mend[/red]")
        return EXIT_PROBLEM
    console.print("[green]ready[/green]; ", end="")
    console.print(otherwise, markup=False)
    return 0
