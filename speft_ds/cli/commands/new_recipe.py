"""`speft new`: a recipe for one's own data, proposed from the model and the rows."""

import math
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from speft_ds import hub
from speft_ds.cli.commands.recipes import check_new, in_line, print_next_steps
from speft_ds.cli.options import ON_CPU
from speft_ds.cli.start_ranks import count_gpus
from speft_ds.config.check_model import num_positions, read_config
from speft_ds.config.load_recipe import load_recipe, recipe_of
from speft_ds.config.recipe import Recipe
from speft_ds.data.bad_rows import BadRows
from speft_ds.data.conversations import conversation_columns
from speft_ds.env import log_rank0
from speft_ds.errors import UserError
from speft_ds.io import write_text
from speft_ds.jobs.preflight import check_inputs, check_model, check_training_rows, resolve_offline
from speft_ds.untrusted import printable

# Words in the name of a column, the likelier first.
PROMPTS = ("prompt", "instruction", "question", "query", "request", "input", "user")
RESPONSES = ("response", "completion", "answer", "output", "reply", "assistant", "target")
TEXTS = ("text", "sentence", "review", "content", "document")
LABELS = ("label", "labels", "class", "category")
MOST_ROWS = 20_000  # that are looked at
MOST_TOKENS = 4096  # of a micro-batch
MOST_POSITIONS = 32_768  # of a row, whatever the model can
MOST_NAMED = 20  # rows that are left out
EPOCHS, MIN_STEPS, MAX_STEPS = 3, 20, 1000
Entry = tuple[str, Any, str]  # key, value, and where the value comes from


@dataclass(frozen=True)
class Seen:
    """What the rows of a source became.

    Attributes:
        rows: where each stands, its tokens, and why it has none: it is left out. Of a conversation, several.
        num_read: rows of the source that were tokenised.
        num_all: rows that the source has.
        notes: what a user should know of them.
    """

    rows: list[tuple[str, int, str | None]]
    num_read: int
    num_all: int
    notes: list[str]

    def left_out(self, max_length: int) -> list[tuple[str, str]]:
        """Where each row stands that is left out, and why."""
        longer = f"longer than data.max_length={max_length}"
        return [(where, why or longer) for where, tokens, why in self.rows if why or tokens > max_length]


def new(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="the new .yaml file")],
    data: Annotated[str, typer.Option(metavar="PATH", help="the rows, as data.path of a recipe")],
    model: Annotated[str, typer.Option(metavar="MODEL", help="a model's folder, or its id on the hub")],
    prompt: Annotated[str | None, typer.Option(metavar="COLUMN", help="default: by its name")] = None,
    response: Annotated[str | None, typer.Option(metavar="COLUMN", help="default: by its name")] = None,
    force: Annotated[bool, typer.Option("--force", help="overwrite a file that is there")] = False,
) -> None:
    """Write a recipe for your own data: each value with where it comes from, by the rows and the model."""
    check_new(file, force)
    entries: list[Entry] = [("model.name_or_path", model, "--model"), ("data.path", data, "--data")]
    num_ranks = count_gpus() or ON_CPU  # whose batch a single rank takes, too
    draft = _recipe(entries)
    if note := resolve_offline(draft):
        log_rank0(note)
    if problems := check_model(draft, "evaluate", num_ranks):
        raise problems[0]
    entries += _machine() + find_columns(draft, prompt, response)
    seen = look_at(entries)
    entries += propose(seen, _positions(draft.model.name_or_path), num_ranks) + _mask_and_rate(draft)
    check_inputs(_recipe(entries), "train", num_ranks)
    title = f"{Path(data).name} on {Path(model).name}, as `speft new` proposes it: change what you like."
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, f"{_comment(title)}\n{_as_yaml(entries)}")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error}", "command line") from None
    _print_left_out(seen, load_recipe(str(file.absolute())).data.max_length)
    log_rank0(f"wrote {file}")
    print_next_steps(file)


def _recipe(entries: list[Entry]) -> Recipe:
    return recipe_of("new", [f"{key}={in_line(value)}" for key, value, _ in entries])


def _as_yaml(entries: list[Entry]) -> str:
    """The entries by section, each with where it comes from behind it."""
    sections = list(dict.fromkeys(key.partition(".")[0] for key, *_ in entries))
    lines, before = [], []
    for key, value, why in sorted(entries, key=lambda entry: sections.index(entry[0].partition(".")[0])):
        *above, name = key.split(".")
        for depth, section in enumerate(above):
            if above[: depth + 1] != before[: depth + 1]:
                lines.append(f"{'  ' * depth}{section}:")
        lines.append(f"{'  ' * len(above)}{name}: {in_line(value)}  {_comment(why)}")
        before = above
    return "\n".join(lines) + "\n"


def _comment(text: str) -> str:
    """On one line of YAML, whatever the names of files and columns in it hold."""
    return f"# {' '.join(printable(text).split())}"


def _print_left_out(seen: Seen, max_length: int) -> None:
    left_out = seen.left_out(max_length)
    scope = f"the first {seen.num_read:,} of " if seen.num_read < seen.num_all else ""
    lines = [f"{scope}{seen.num_all:,} rows read, {len(left_out):,} left out"]
    lines += [f"  {where}: {why}" for where, why in left_out[:MOST_NAMED]]
    if len(left_out) > MOST_NAMED:
        lines.append("  and more: speft data --left-out lists them all")
    log_rank0("\n".join([*lines, *(f"note: {note}" for note in seen.notes)]))


def _machine() -> list[Entry]:
    if count_gpus():
        why = "this machine has GPUs"
        return [("model.dtype", "bfloat16", why), ("deepspeed.config", "zero3_bf16", why)]
    why = "this machine has no GPU"
    return [
        ("model.dtype", "auto", f"{why}: bfloat16 where the CPU multiplies it"),
        ("deepspeed.config", "zero3_cpu", why),
    ]


def find_columns(draft: Recipe, prompt: str | None, response: str | None) -> list[Entry]:
    """The format and the columns of the rows, by the first one that has any.

    Args:
        prompt, response: columns that are given.
    Raises:
        UserError: no such file, no rows, or names that say nothing.
    """
    from speft_ds.data.sources import iterate_rows

    (source,) = draft.data.sources
    bad = BadRows()
    row = next((row for _, row in iterate_rows(source, bad) if isinstance(row, dict) and row), None)
    if row is None:
        bad.check()
        raise UserError(f"{source.path} has no rows with columns", "--data", "name a file of rows")
    names = list(row)
    for given in (prompt, response):
        if given is not None and given not in names:
            raise UserError(f"no column {given!r}", "command line", f"one of: {', '.join(names)}")
    why = f"columns: {', '.join(names)}"
    if not (prompt or response):
        if found := conversation_columns(row, source.model_copy(update={"format": "messages"})):
            is_usual = len(found) > 1 or found == (source.columns.messages,)
            renamed = [] if is_usual else [("data.columns.messages", found[0], why)]
            return [("data.format", "messages", why), *renamed]
        if {"instruction", "output"} <= set(names):
            without = [] if "input" in names else [("data.columns.input", None, "no column input")]
            return [("data.format", "alpaca", why), *without]
    how = "the command line" if prompt and response else "by its name"
    prompt = prompt or _likeliest(PROMPTS, [name for name in names if name != response])
    response = response or _likeliest(RESPONSES, [name for name in names if name != prompt])
    if prompt and response:
        return [("data.format", "prompt_completion", why), *_named(how, prompt=prompt, response=response)]
    text, label = _likeliest(TEXTS, names), _likeliest(LABELS, names)
    if text and label:
        return [("data.format", "classification", why), *_named(how, text=text, label=label)]
    if text:
        return [("data.format", "text", why), *_named(how, text=text)]
    what = f"no telling which columns are prompt and response: {', '.join(names)}"
    raise UserError(what, source.path, "name them: --prompt COLUMN --response COLUMN")


def _named(how: str, **columns: str) -> list[Entry]:
    """Which column holds what."""
    return [(f"data.columns.{role}", name, how) for role, name in columns.items()]


def _likeliest(words: tuple[str, ...], names: list[str]) -> str | None:
    """The column that is called by one of the words, or has it in its name."""
    split = {name: re.findall(r"[a-z]+", name.lower()) for name in names}
    by_word = [name for word in words for name in names if split[name] == [word]]
    by_part = [name for word in words for name in names if word in split[name] and "id" not in split[name]]
    return next(iter(by_word + by_part), None)


def look_at(entries: list[Entry]) -> Seen:
    """The rows, the first ones tokenised; `entries` gets what the tokenizer asks for.

    Raises:
        UserError: a row or the tokenizer cannot be used.
    """
    from speft_ds.data.dataset_cache import DatasetSpec, classes_of, encode_rows  # late: they import numpy
    from speft_ds.data.sources import iterate_rows
    from speft_ds.data.tokenize import load_tokenizer

    draft, bad = _recipe(entries), BadRows()
    if problems := check_training_rows(draft):
        raise problems[0]
    tokenizer = load_tokenizer(draft.model.name_or_path, "--model")
    if not tokenizer.chat_template and draft.data.format not in ("messages", "text"):
        entries.append(("data.chat_template", False, "the tokenizer has none"))
        if draft.data.format == "prompt_completion":
            entries.append(("data.template", "{prompt}\n\n", "a blank line before the response"))
    longest = ("data.max_length", _positions(draft.model.name_or_path), "")
    data = _recipe([*entries, longest, ("data.empty_rows", "drop", ""), ("data.long_rows", "drop", "")]).data
    spec, rows = DatasetSpec(data, draft.model.name_or_path), iterate_rows(data.sources[0], bad)
    encoder = spec.encoder(tokenizer)
    arguments = (data.sources[0], spec, encoder, classes_of(data, bad), bad)
    seen, num_read = [], 0
    for where, _, encoded in encode_rows(islice(rows, MOST_ROWS), *arguments):
        num_read += 1
        seen += [(where, *((len(m.row.ids), None) if m.row else (0, m.change))) for m in encoded]
    num_all = num_read + sum(1 for _ in rows)
    bad.check()
    if not any(tokens for _, tokens, _ in seen):
        where, _, why = seen[0]
        raise UserError(f"no row can be trained on; the first one is {why}", where, "complete the rows")
    return Seen(seen, num_read, num_all, encoder.notes())


def _positions(model: str) -> int:
    """The most tokens that a row may have. Raises UserError where the model has no configuration here."""
    folder = hub.model_folder(model)
    most = num_positions(read_config(folder / "config.json")) if folder else None
    return 2048 if most is None else min(most, MOST_POSITIONS)


def propose(seen: Seen, positions: int, num_ranks: int) -> list[Entry]:
    """Length, batch and steps, going by the rows."""
    from speft_ds.data.row_counts import EMPTY  # late: it imports numpy

    lengths = sorted(tokens for _, tokens, why in seen.rows if not why)
    longest, usual = lengths[-1], lengths[math.ceil(0.95 * len(lengths)) - 1]
    # A few rows that are far longer than the others would make every batch wide.
    fitting = longest if longest <= 4 * usual else 2 * usual
    length = min(positions, max(64, math.ceil(fitting / 32) * 32))
    share = f"95% of the rows have {usual} tokens or fewer, the longest {longest}"
    entries: list[Entry] = [("data.max_length", length, share)]
    if empty := [where for where, _, why in seen.rows if why == EMPTY]:
        why = f"{len(empty):,} without prompt or response, the first: {empty[0]}"
        entries.append(("data.empty_rows", "drop", why))
    num_rows = sum(tokens <= length for tokens in lengths)
    counted = f"{num_rows:,} rows"
    if seen.num_read < seen.num_all:  # the others are taken to be like these
        num_rows = round(num_rows * seen.num_all / seen.num_read)
        counted = f"about {num_rows:,} rows, going by the first {seen.num_read:,}"
    per_rank = max(1, min(16, num_rows // 4) // num_ranks)
    micro_batch = 2 ** int(math.log2(min(per_rank, max(1, MOST_TOKENS // length))))
    batch = micro_batch * (per_rank // micro_batch) * num_ranks
    steps = min(MAX_STEPS, max(MIN_STEPS, math.ceil(EPOCHS * num_rows / batch)))
    few = f"a quarter of {counted}" if num_rows < 64 else "16 rows"
    return [
        *entries,
        ("train.steps", steps, f"{steps * batch / num_rows:.3g} epochs of {counted}"),
        ("train.global_batch", batch, f"{few}, shared by {num_ranks} rank(s)"),
        ("train.micro_batch", micro_batch, f"{MOST_TOKENS:,} tokens of {length} each at most"),
        ("optimizer.warmup_steps", math.ceil(0.03 * steps), "3% of the steps"),
        ("mask.calibration_samples", min(64, num_rows), f"64, or all {counted}"),
    ]


def _mask_and_rate(draft: Recipe) -> list[Entry]:
    from speft_ds.tools.plan.geometry import read_geometry  # late: it imports torch

    num_weights = read_geometry(draft).num_weights
    rate, why = 2e-4, "not tried: as llama2_70b_alpaca"
    if num_weights < 3 * 10**10:
        rate, why = 5e-4, "not tried: as llama2_13b_alpaca"
    if num_weights < 10**9:
        rate, why = 1e-3, "the best of 3e-4, 1e-3, 3e-3 for SmolLM2-135M on SST-2"
    return [
        ("mask.salience", "gradient", "as all recipes of this repository that were measured"),
        ("mask.density", 0.005, "the default; measured on SmolLM2-135M"),
        ("optimizer.lr", rate, f"{num_weights:,} weights; {why}"),
    ]
