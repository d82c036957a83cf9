"""`speft data`: what the rows of a recipe look like to the model. A second look imports no torch."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.table import Table
from rich.text import Text

from speft_ds.config.recipe import Recipe
from speft_ds.data.dataset import TokenizedDataset
from speft_ds.data.dataset_cache import DatasetSpec, left_out_rows, prepare
from speft_ds.data.row_counts import in_words, row_counts
from speft_ds.data.tokenize import recipe_tokenizer
from speft_ds.env import log_rank0
from speft_ds.errors import RecipeError, UserError
from speft_ds.io import write_bytes
from speft_ds.jobs.preflight import check_training_rows, resolve_offline
from speft_ds.terminal import Console

NUM_BINS = 12
WIDEST_BAR = 40


def show_data(recipe: Recipe, output: Path | None, left_out: bool = False) -> None:
    """Tokenise the rows of a recipe, or take them from the cache, and show them.

    The picture goes to `output`, or runs/<recipe>-data.png. With `left_out`, list the rows that are left out
    instead, each by its place and why. Raises UserError.
    """
    console = Console()
    if note := resolve_offline(recipe):
        log_rank0(note)
    spec = DatasetSpec.from_recipe(recipe)
    if problems := check_training_rows(recipe):
        raise RecipeError(problems, f"recipe {recipe.name}")
    if left_out:
        list_left_out(recipe, spec)
        return
    dataset = prepare(spec, lambda: recipe_tokenizer(recipe), log_rank0)
    for number, pieces in enumerate(dataset.facts["samples"], 1):
        console.print(sample_text(f"row {number}", pieces), "", sep="\n", soft_wrap=True)
    console.print(_sources_table(recipe, dataset))
    console.print(_lengths_table(dataset.lengths))
    console.print(summary(recipe, dataset), highlight=False, soft_wrap=True)
    from speft_ds.report.plots import length_histogram  # late: it takes a second

    path = output or Path("runs") / f"{recipe.name}-data.png"
    try:
        counts = (dataset.lengths, dataset.num_label_tokens, recipe.data.max_length)
        write_bytes(path, length_histogram(*counts, recipe.name))
    except OSError as error:
        fix = "name another: --output FILE.png"
        raise UserError(f"cannot write the picture: {error}", str(path), fix) from error
    console.print(f"picture: {path}", highlight=False, soft_wrap=True)


def list_left_out(recipe: Recipe, spec: DatasetSpec) -> None:
    """Print a line for each row that is left out, and how many there are."""
    reasons = Counter()
    for where, why in left_out_rows(spec, recipe_tokenizer(recipe)):
        log_rank0(f"{where}: {why}")
        reasons[why] += 1
    log_rank0(f"{reasons.total():,} rows left out")
    if recipe.data.select != "all":
        log_rank0(f"of the others, data.select={recipe.data.select} takes {recipe.data.select_rows:,}")


def sample_text(title: str, pieces: Sequence[tuple[str, bool]]) -> Text:
    """A row as text, label tokens in double brackets, for want of colours, and in green."""
    text = Text(f"{title}: ", style="bold")
    for piece, is_label in pieces:
        text.append(f"[[{piece}]]" if is_label else piece, "green" if is_label else "not bold")
    return text


def summary(recipe: Recipe, dataset: TokenizedDataset) -> str:
    """What a run makes of the rows, as lines of text."""
    data, train = recipe.data, recipe.train
    tokens, labels = int(dataset.lengths.sum()), int(dataset.num_label_tokens.sum())
    order = dataset.order(data.weights, recipe.seed)
    num_steps = order.num_steps(train.global_batch, train.steps, train.epochs)
    if dataset.is_packed:
        kind, packs, packing = "packs", len(dataset), "on"
    else:
        packs = dataset.num_packs(data.max_length)
        kind, packing = "rows", "off; data.packing=true would make"
    filled = tokens / (packs * data.max_length)
    share = f"{labels:,} of them label tokens ({labels / tokens:.1%})"
    lines = [
        f"{dataset.num_rows:,} rows, {tokens:,} tokens; {share}",
        f"an epoch: {len(order):,} {kind}",
        f"the run: {num_steps:,} steps of {train.global_batch} {kind}",
        f"packing: {packing} {packs:,} sequences of {data.max_length} tokens, {filled:.1%} filled",
        in_words(row_counts(dataset, order.num_epochs(num_steps * train.global_batch))),
    ]
    if ends := dataset.facts["end_of_turn"]:
        told = (f"{token} ({number:,} rows)" for token, number in ends.items())
        lines.append(f"a response ends with: {', '.join(told)}")
    if dataset.facts["classes"]:
        lines.append(f"classes: {', '.join(dataset.facts['classes'])}")
    return "\n".join(lines)


def _sources_table(recipe: Recipe, dataset: TokenizedDataset) -> Table:
    """Rows read, and what became of those that were not taken as they are."""
    counts = dataset.facts["sources"]
    shown = [what for what in counts[0] if what == "rows" or any(count[what] for count in counts)]
    table = Table("data", *shown, "taken")
    for source, count, taken in zip(recipe.data.sources, counts, dataset.row_sizes, strict=True):
        table.add_row(Text(source.path), *(f"{count[what]:,}" for what in shown), f"{taken:,}")
    return table


def _lengths_table(lengths: np.ndarray) -> Table:
    """A histogram of the [rows] lengths, with percentiles in its title."""
    half, most, longest = np.percentile(lengths, [50, 95, 100]).astype(int)
    table = Table("tokens", "rows", "", title=f"length: median {half}, 95% up to {most}, longest {longest}")
    width = -(-(int(longest) + 1) // NUM_BINS)  # equal bins that end above the longest row
    counts, edges = np.histogram(lengths, bins=np.arange(0, longest + width + 1, width))
    for count, start, stop in zip(counts, edges[:-1], edges[1:], strict=True):
        table.add_row(f"{start} to {stop - 1}", f"{count:,}", "#" * round(WIDEST_BAR * count / counts.max()))
    return table
