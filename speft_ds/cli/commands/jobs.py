"""The commands that start ranks: `speft train`, `evaluate`, `score`, `quickstart`. Imports no torch."""

import os
from typing import Annotated

import typer

from speft_ds.cli.launch import ACTIVATIONS_HELP, RESUME_HELP, RESUME_WITH_HELP, TEXT_HELP, WEIGHTS_HELP
from speft_ds.cli.options import ON_CPU, Hostfile, Overrides, Ranks, RecipeName, Verbose
from speft_ds.cli.start_ranks import choose_ranks, fit_overrides, launch
from speft_ds.config.load_recipe import load_recipe
from speft_ds.errors import UserError, shell
from speft_ds.training.checkpoint.resume import IF_ANY, NEWEST


def train(
    recipe: RecipeName = None,
    overrides: Overrides = None,
    resume: Annotated[str | None, typer.Option(metavar="[PATH]", help=RESUME_HELP)] = None,
    resume_with: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help=f"{RESUME_WITH_HELP}; repeatable")
    ] = None,
    ranks: Ranks = None,
    hostfile: Hostfile = None,
    verbose: Verbose = False,
) -> None:
    """Train a recipe: choose a small part of a model's weights, train them, save an adapter.

    Ctrl-C stops it after the step, with a checkpoint, and it exits with 85; --resume goes on from there.
    """
    recipe, overrides = _recipe_and_overrides(recipe, overrides)
    if recipe is None and resume in (None, NEWEST, IF_ANY):
        fix = "speft train RECIPE (`speft ls` lists them), or speft train --resume runs/NAME"
        raise UserError("there is no recipe to train", "command line", fix)
    if resume_with and resume is None:
        raise UserError("--resume-with goes with --resume", "command line", "leave it out, or add --resume")
    words = [*(("--recipe", recipe) if recipe else ()), *overrides]
    words += [f"--resume={resume}"] if resume else []
    words += [f"--resume-with={text}" for text in resume_with or []]
    raise typer.Exit(launch("train", words, choose_ranks(ranks, hostfile), verbose))


def evaluate(
    run: Annotated[str | None, typer.Argument(metavar="RUN", help="the folder of a finished run")] = None,
    overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option(metavar="PATH", help="instead of a run: a model folder or hub id")
    ] = None,
    adapter: Annotated[str | None, typer.Option(metavar="PATH", help="an adapter of that model")] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="A,B", help="lm-eval tasks; default: the recipe's")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="examples in each prompt")] = None,
    limit: Annotated[
        float | None, typer.Option(min=0, help="documents per task, or below 1 the share of them")
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="FILE", help=TEXT_HELP)] = None,
    weights: Annotated[str | None, typer.Option(metavar="FORMAT", help=WEIGHTS_HELP)] = None,
    activations: Annotated[str | None, typer.Option(metavar="FORMAT", help=ACTIVATIONS_HELP)] = None,
    ranks: Ranks = None,
    hostfile: Hostfile = None,
    verbose: Verbose = False,
) -> None:
    """Score a finished run, or any model, with lm-eval; train nothing.

    The scores that the run has from before and after training are printed beside the new ones.
    """
    run, overrides = _recipe_and_overrides(run, overrides)
    if (run is None) == (model is None):
        fix = "speft evaluate runs/NAME, or speft evaluate --model PATH --tasks A,B"
        raise UserError("what to score is one run or one model", "command line", fix)
    if adapter and model is None:
        fix = f"leave it out, or {shell('--model', 'PATH', '--adapter', adapter)}"
        raise UserError("--adapter goes with --model; a run has its own", "command line", fix)
    given = {"run": run, "model": model, "adapter": adapter, "tasks": tasks, "num-fewshot": num_fewshot}
    given |= {"text": text, "weights": weights, "activations": activations}
    given["limit"] = limit if limit is None or limit % 1 else int(limit)
    words = [f"--{name}={value}" for name, value in given.items() if value is not None]
    raise typer.Exit(launch("evaluate", [*words, *overrides], choose_ranks(ranks, hostfile), verbose))


def score(
    recipe: RecipeName,
    overrides: Overrides = None,
    ranks: Ranks = None,
    hostfile: Hostfile = None,
    verbose: Verbose = False,
) -> None:
    """Score the weights and select a mask; train nothing.

    Writes mask.safetensors, mask.png and score.json to the run folder, which mask.load=FOLDER trains with.
    """
    words = ["--recipe", recipe, *(overrides or [])]
    raise typer.Exit(launch("score", words, choose_ranks(ranks, hostfile), verbose))


def quickstart(
    overrides: Overrides = None,
    prepare_only: Annotated[bool, typer.Option("--prepare-only", help="make the inputs, and stop")] = False,
    ranks: Annotated[
        int | None, typer.Option(min=1, help=f"number of ranks; default: one per GPU, or {ON_CPU} on the CPU")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Prepare a small model and data, then train and score it: the whole job in minutes, GPU or not."""
    load_recipe("quickstart", overrides or [])  # a typo should not wait for the model
    from speft_ds.tools.quickstart import prepare  # late, because it may import torch

    prepare()
    if prepare_only:
        return
    chosen = choose_ranks(ranks, on_cpu=ON_CPU)
    words = ["--recipe", "quickstart", *fit_overrides("quickstart", overrides or [], chosen.count)]
    raise typer.Exit(launch("train", words, chosen, verbose))


def _recipe_and_overrides(first: str | None, others: list[str] | None) -> tuple[str | None, list[str]]:
    """The first word of a command line and the overrides, of which it may be one."""
    if first is not None and "=" in first and not os.path.exists(first):
        return None, [first, *(others or [])]
    return first, others or []
