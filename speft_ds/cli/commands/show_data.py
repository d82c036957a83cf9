"""`speft data`: what the rows of a recipe look like to the model. A second look imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from speft_ds.config.recipe import Recipe
from speft_ds.data.dataset import TokenizedDataset
from speft_ds.data.dataset_cache import DatasetSpec, prepare
from speft_ds.data.packing import first_fit
from speft_ds.data.sampler import Sampler
from speft_ds.data.tokenize import load_tokenizer
from speft_ds.errors import UserError
from speft_ds.jobs.preflight import resolve_offline

NUM_BINS = 12
WIDEST_BAR = 40
LEARNT = ("[[", "]]")  # around learnt text, so that it can be told without colours


def show_data(recipe: Recipe, output: Path | None) -> None:
    """Tokenise the rows of a recipe, or take them from the cache, and show them.

    Args:
        output: where the picture goes; None: runs/<recipe>-data.png.
    Raises:
        UserError: the recipe names no rows, or they cannot be used.
    """
    console = Console()
    if note := resolve_offline(recipe):
        print(note)
    corpus = prepare(
        DatasetSpec.from_recipe(recipe), lambda: load_tokenizer(recipe.model.name_or_path), print
    )
    for number, pieces in enumerate(corpus.facts["samples"], 1):
        print_sample(console, f"row {number}", pieces)
    console.print(_sources_table(recipe, corpus))
    console.print(_lengths_table(corpus))
    for line in summary(recipe, corpus):
        console.print(line, highlight=False, markup=False)
    from speft_ds.plots import length_histogram  # late: it takes a second

    path = output or Path("runs") / f"{recipe.name}-data.png"
    try:
        length_histogram(path, corpus.lengths, corpus.num_learnt, recipe.data.max_length, recipe.name)
    except OSError as error:
        raise UserError(
            f"cannot write the picture: {error}", str(path), "name another: --output FILE.png"
        ) from error
    console.print(f"picture: {path}", highlight=False, markup=False, soft_wrap=True)


def print_sample(console: Console, title: str, pieces: Sequence[tuple[str, bool]]) -> None:
    """Print a row as text, learnt pieces in double brackets and, on a terminal, in green."""
    text = Text(f"{title}: ", style="bold")
    for piece, learnt in pieces:
        text.append(f"{LEARNT[0]}{piece}{LEARNT[1]}" if learnt else piece, "green" if learnt else "not bold")
    console.print(text, soft_wrap=True)
    console.print()


def summary(recipe: Recipe, corpus: TokenizedDataset) -> list[str]:
    """What a run makes of the rows, as lines of text."""
    data, tokens = recipe.data, int(corpus.lengths.sum())
    learnt = int(corpus.num_learnt.sum())
    order = Sampler(corpus.sizes, data.weights, recipe.seed)
    num_steps = order.num_steps(recipe.train.global_batch, recipe.train.steps, recipe.train.epochs)
    kind = "packs" if corpus.is_packed else "rows"
    lines = [
        f"{corpus.num_rows:,} rows, {tokens:,} tokens; {learnt:,} of them learnt ({learnt / tokens:.1%})",
        f"an epoch: {len(order):,} {kind}",
        f"the run: {num_steps:,} steps of {recipe.train.global_batch} {kind}",
        f"packing: {_packing(corpus, data.max_length)}",
    ]
    if corpus.facts["classes"]:
        lines.append(f"classes: {', '.join(corpus.facts['classes'])}")
    return lines


def _packing(corpus: TokenizedDataset, max_length: int) -> str:
    packs = len(corpus) if corpus.is_packed else len(first_fit(corpus.lengths.tolist(), max_length))
    share = corpus.lengths.sum() / (packs * max_length)
    whether = "on" if corpus.is_packed else "off; data.packing=true would make"
    return f"{whether} {packs:,} sequences of {max_length} tokens, {share:.1%} filled"


def _sources_table(recipe: Recipe, corpus: TokenizedDataset) -> Table:
    """Rows read, and what became of those that were not taken as they are."""
    counts = corpus.facts["sources"]
    shown = [what for what in counts[0] if what == "rows" or any(count[what] for count in counts)]
    table = Table("data", *shown, "taken")
    for source, count, taken in zip(recipe.data.sources, counts, corpus.row_sizes, strict=True):
        table.add_row(Text(source.path), *(f"{count[what]:,}" for what in shown), f"{taken:,}")
    return table


def _lengths_table(corpus: TokenizedDataset) -> Table:
    """A histogram of the rows' lengths, with percentiles in its title."""
    lengths = corpus.lengths
    half, most, longest = np.percentile(lengths, [50, 95, 100]).astype(int)
    table = Table("tokens", "rows", "", title=f"length: median {half}, 95% up to {most}, longest {longest}")
    counts, edges = np.histogram(lengths, bins=_bin_edges(int(lengths.max())))
    for count, start, stop in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = "#" * round(WIDEST_BAR * count / counts.max())
        table.add_row(f"{start} to {stop - 1}", f"{count:,}", bar)
    return table


def _bin_edges(longest: int) -> np.ndarray:
    """Edges of equal, whole bins that end above the longest row."""
    width = -(-(longest + 1) // NUM_BINS)
    return np.arange(0, longest + width + 1, width)
