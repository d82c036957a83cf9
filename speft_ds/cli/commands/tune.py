"""`speft tune`: a learning-rate range test, or a search over keys of a recipe. Imports no torch."""

from __future__ import annotations

from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from signal import SIGTERM
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from speft_ds.cli.options import Hostfile, Overrides, RecipeName, Verbose
from speft_ds.cli.options import Ranks as NumRanks
from speft_ds.cli.start_ranks import Ranks, choose_ranks, launch
from speft_ds.comm.signals import EXIT_CTRL_C, EXIT_STOPPED
from speft_ds.config.load_recipe import as_override, load_recipe, resolved_yaml
from speft_ds.errors import UserError, shell
from speft_ds.io import write_bytes, write_json, write_text
from speft_ds.report.run import read_run
from speft_ds.terminal import Console

if TYPE_CHECKING:
    from optuna import Study, Trial

    from speft_ds.tune.lr_range import LrRange

NO_SCORES = ("eval.before=false", "eval.after=false", "eval.slice=null")
# A short run on the first mask, of which only the training loss is looked at.
LR_DEFAULTS = ("optimizer.lr=1", "train.steps=40")
LR_FIXED = (
    "optimizer.schedule=range_test",
    "optimizer.warmup_steps=0",
    "mask.schedule=static",
    "train.checkpoint_every=null",
    "train.keep_best=false",
    "train.profile=null",
    "eval.validation=null",
    *NO_SCORES,
)


# Trials are compared by the validation loss and by what they cost.
TRIAL_FIXED = ("train.checkpoint_every=null", "train.keep_best=false", "train.profile=null", *NO_SCORES)
STOPPED = (EXIT_STOPPED, EXIT_CTRL_C, 128 + SIGTERM)


def tune(
    recipe: RecipeName,
    overrides: Overrides = None,
    lr: Annotated[bool, typer.Option("--lr", help="a range test: a short run under a rising rate")] = False,
    search: Annotated[bool, typer.Option("--search", help="try out values of several keys")] = False,
    over: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUES",
            help="with --search: a range, LOW..HIGH, or choices, A,B,C, of a key; repeatable; "
            "default: rates, densities and metrics around the recipe's",
        ),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="with --search: how many, of all starts")] = 20,
    sampler: Annotated[
        Literal["tpe", "nsga2"], typer.Option(help="with --search: how values are drawn")
    ] = "tpe",
    ranks: NumRanks = None,
    hostfile: Hostfile = None,
    verbose: Verbose = False,
) -> None:
    """Find settings of a recipe: its learning rate by one short run, or any keys by many.

    --lr: 40 steps under a rate that rises from optimizer.lr / 100,000 to optimizer.lr (here 1 by default).
    --search: runs of train.steps each, for a low loss on eval.validation, few entries and short steps; the
    same command goes on with a search, and several at once share it.
    """
    if lr == search:
        fix = shell("speft", "tune", recipe, "--lr") + ", or --search"
        raise UserError("what to find is not said, or twice", "command line", fix)
    if lr and over:
        raise UserError("--over goes with --search", "command line", "leave it out, or --search for --lr")
    chosen = choose_ranks(ranks, hostfile)
    if lr:
        range_test(recipe, overrides or [], chosen, verbose)
    else:
        run_search(recipe, overrides or [], over or [], trials, sampler, chosen, verbose)


def range_test(name: str, overrides: list[str], ranks: Ranks, is_verbose: bool) -> None:
    """Run a range test; leave lr.json and lr.png in its run folder, and print the rate that it suggests.

    Raises:
        UserError: the recipe or its files are wrong, or the loss does not fall.
        Exit: the run ended otherwise, with its code.
    """
    asked = load_recipe(name, overrides)
    fixed = [text for text in LR_FIXED if asked.method.has_mask or not text.startswith("mask.")]
    words = [as_override("output_dir", f"runs/{asked.name}-lr"), *LR_DEFAULTS, *overrides, *fixed]
    folder = Path(load_recipe(name, words).output_dir)
    from speft_ds.tune.lr_range import find_lr, has_diverged, read_losses  # late: numpy takes its time

    def should_stop() -> bool:
        return has_diverged(read_losses(folder)[1])

    code = launch("train", ["--recipe", name, *words], ranks, is_verbose, should_stop)
    rates, losses = read_losses(folder)
    if code and not has_diverged(losses):
        raise typer.Exit(code)
    try:
        found = find_lr(rates, losses)
    except ValueError as error:
        fix = "more steps, or another range: train.steps=100 optimizer.lr=10"
        raise UserError(str(error), str(folder / "metrics.jsonl"), fix) from error
    _write_range(found, folder)
    fix = shell("speft", "train", name, f"optimizer.lr={found.suggestion:g}")
    print(f"{folder / 'lr.png'} shows it; to train with it: {fix}")


def _write_range(found: LrRange, folder: Path) -> None:
    from speft_ds.report.plots import lr_range_curve

    rows = found.in_words()
    marks = {what: rate for what, rate, _ in rows if rate is not None}
    write_json(folder / "lr.json", {**vars(found), "suggested": found.suggestion})
    write_bytes(folder / "lr.png", lr_range_curve(found.rates, found.losses, found.smoothed, marks))
    table = Table(title="learning rates")
    for heading in ("", "optimizer.lr", "how it was found"):
        table.add_column(heading)
    for what, rate, how in rows:
        table.add_row(what, "-" if rate is None else f"{rate:.1e}", how)
    Console().print(table)


def run_search(
    name: str,
    overrides: list[str],
    over: list[str],
    num_trials: int,
    sampler: str,
    ranks: Ranks,
    is_verbose: bool,
) -> None:
    """Search, or go on with the search in the folder; leave search.json, pareto.png and best.yaml there.

    Raises:
        UserError: the recipe, its files or the values are wrong; or trials fail.
        Exit: it was stopped, with the code of the run of that moment.
    """
    words = [as_override("output_dir", f"runs/{load_recipe(name, overrides).name}-search"), *overrides]
    recipe = load_recipe(name, words)
    steps, folder = recipe.train.steps, Path(recipe.output_dir)
    if steps is None:
        raise UserError("a trial has no length", recipe.where("train.steps"), "train.steps=60")
    if recipe.eval.validation is None:
        what = "there are no rows to compare trials by"
        raise UserError(what, recipe.where("eval.validation"), "eval.validation=rows.jsonl")
    from speft_ds.tune import search  # late: Optuna takes its time
    from speft_ds.tune.space import default_space, read_space

    fixed = [*words, f"eval.every={search.measured_every(steps)}", *TRIAL_FIXED]
    over = over or default_space(recipe)
    space = read_space(over, name, fixed)
    print(f"search over {', '.join(over)} in {folder}")
    study = search.open_study(folder, {"recipe": resolved_yaml(recipe), "over": over}, sampler, num_trials)

    def run_trial(trial: Trial, values: list[str]) -> search.Values | None:
        own = folder / f"trial-{trial.number:04}"
        halving = search.Halving(study, trial, steps, own)
        command = ["--recipe", name, *fixed, *values, as_override("output_dir", str(own))]
        with own.with_suffix(".log").open("w") as log, redirect_stdout(log):
            code = launch("train", command, ranks, is_verbose, halving, log)
        said = f"trial {trial.number} ({' '.join(values)}): "
        if halving.stopped_at is not None:
            print(f"{said}stopped after step {halving.stopped_at}, behind the better half", flush=True)
            return None
        if code in STOPPED:
            print("stopped; the same command goes on", flush=True)
            raise typer.Exit(code)
        if code:
            print(f"{said}failed: {log.name}", flush=True)
            raise search.TrialFailed(log.name)
        result = search.values_of(read_run(own))
        print(said + search.in_words(result), flush=True)
        return result

    try:
        search.search(
            study, space, num_trials, lambda values: load_recipe(name, [*fixed, *values]), run_trial
        )
    except search.TrialFailed as error:
        fix = "read the log, and change the recipe or --over"
        raise UserError("several trials in a row failed", str(error), fix) from error
    _write_search(study, folder, name, words)


def _write_search(study: Study, folder: Path, name: str, words: list[str]) -> None:
    from speft_ds.report.plots import pareto_points
    from speft_ds.report.tables import print_table
    from speft_ds.tune.search import OBJECTIVES, choose, in_words, points_of, state_of

    points, front = points_of(study.trials), points_of(study.best_trials)
    if not points:
        raise UserError("no trial was run to its end", str(folder), "more of them: --trials")
    best = choose(front)
    own = as_override("output_dir", f"{folder}-best")
    best_recipe = load_recipe(name, [*words, *best.overrides, own])
    header = f"# Trial {best.number} of `speft tune {name} --search`: {in_words(best.values)}.\n"
    write_text(folder / "best.yaml", header + resolved_yaml(best_recipe))
    trials = [
        {"number": each.number, "state": state_of(each), "params": each.params, "values": each.values}
        for each in study.trials
    ]
    write_json(folder / "search.json", {"objectives": OBJECTIVES, "best": best.number, "trials": trials})
    numbers = [point.number for point in points]
    on_front = [numbers.index(point.number) for point in front]
    picture = pareto_points([point.values for point in points], on_front, numbers.index(best.number))
    write_bytes(folder / "pareto.png", picture)
    counts = Counter(each["state"] for each in trials)
    table = Table(title=f"Pareto front of {', '.join(f'{n} {state}' for state, n in counts.items())} trials")
    for heading in ("trial", *OBJECTIVES, "values"):
        table.add_column(heading)
    for point in front:
        loss, entries, step_ms = point.values
        mark = " (best.yaml)" if point.number == best.number else ""
        cells = (f"{point.number}{mark}", f"{loss:.4f}", f"{entries:,.0f}", f"{step_ms:,.0f}")
        table.add_row(*cells, " ".join(point.overrides))
    print_table(table)
    print("best.yaml: of those within 1% of the lowest loss, the one with the fewest entries")
    command = shell("speft", "train", folder / "best.yaml")
    print(f"{folder / 'pareto.png'} shows all; to train the best: {command}")
