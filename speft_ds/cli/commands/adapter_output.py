"""What the commands about adapters print."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from speft_ds.adapter.format import Adapter, open_adapter
from speft_ds.adapter.inspect import (
    AdapterDifference,
    Inspection,
    diff,
    diff_whole,
    inspect,
    mask_counts,
    total,
)
from speft_ds.env import log_rank0
from speft_ds.errors import UserError
from speft_ds.io import write_bytes
from speft_ds.model.codecs import base_in_words
from speft_ds.model.targets import place
from speft_ds.report.tables import (
    OTHER,
    density_table,
    jaccard_text,
    print_mask_table,
    print_table,
    short_modules,
)
from speft_ds.sparse.mask import Mask

if TYPE_CHECKING:  # they import transformers
    from speft_ds.adapter.export import Exported
    from speft_ds.adapter.graft import Grafted

NUM_WEIGHTS = 10  # of the weights that differ, how many are listed


def print_inspection(source: Path, against: Path | None, output: Path | None) -> None:
    """Print what an adapter is like, its overlap with another one, and draw where its entries lie.

    Raises:
        UserError: an adapter that cannot be read, another base, or a picture that cannot be written.
    """
    adapter = open_adapter(source)
    found, mask, facts = inspect(adapter), mask_counts(adapter), adapter.facts
    print_mask_table(mask)
    print_table(_norm_table(mask, found))
    rows = ((c.weight, str(c.row), str(c.column), f"{c.delta:+.6g}") for c in found.largest)
    print_table(_table("largest changes", ("weight", "row", "column", "delta"), rows))
    stored = base_in_words(facts["dtype"], facts.get("base_format"), len(facts.get("quantised") or []))
    log_rank0(f"base {facts['base']} in {stored}, fingerprint {facts['fingerprint'][:12]}")
    print(f"size {_size_text(adapter)}")
    if adapter.whole:
        print("trained whole:", ", ".join(f"{name} {adapter.value_shape(name)}" for name in adapter.whole))
    largest = abs(found.largest[0].delta) if found.largest else 0.0
    print(f"norm of all deltas {found.norm:.4g}, largest {largest:.4g}")
    if against is not None:
        overlap = total(diff(adapter, open_adapter(against)).values())
        print(
            f"overlap with {against}: {overlap.common:,} entries in both, {overlap.only_a:,} only here, "
            f"{overlap.only_b:,} only there, Jaccard index {jaccard_text(overlap.jaccard)}"
        )
        print(_agreement(overlap))
    if output is not None:
        from speft_ds.report.plots import mask_heat_map  # late: it takes a second

        title = f"{adapter.folder}: {mask.num_trainable:,} entries ({mask.density:.3%})"
        try:
            write_bytes(output, mask_heat_map(mask, title))
        except OSError as error:
            raise UserError(f"cannot write: {error}", str(output), "choose another file") from error
        print(f"  {output}")


def print_diff(a: Path, b: Path | None) -> None:
    """Print how two adapters differ, or an adapter and its base. Raises UserError."""
    one, other = open_adapter(a), None if b is None else open_adapter(b)
    by_weight = diff(one, other)
    together = total(by_weight.values())
    most = sorted(by_weight, key=lambda name: -by_weight[name].squares_difference)[:NUM_WEIGHTS]
    headings = ("only in A", "only in B", "equal", "differing", "norm of A", "norm of B", "norm of A - B")
    rows = ((name, *_counts_and_norms(by_weight[name])) for name in most)
    footer = (f"all {len(by_weight)}", *_counts_and_norms(together))
    table = _table("A - B", ("weight", *headings), rows, footer)
    if len(by_weight) > NUM_WEIGHTS:
        table.caption = f"the {NUM_WEIGHTS} weights that differ most, of {len(by_weight)}"
    print_table(table)
    for name, difference in diff_whole(one, other).items():
        print(f"{name}: {difference}")
    if other is not None:
        is_same = not (together.only_a or together.only_b or together.differing)
        print("the entries are the same" if is_same else _agreement(together))


def print_sizes(source: Path, compressed: Adapter, output: Path) -> None:
    """Print the entries and bytes of an adapter before and after it was compressed."""
    before = open_adapter(source)
    share = f"{compressed.num_bytes / before.num_bytes:.1%} of the size"
    print(f"before: {before.num_entries:,} entries, {_size_text(before)}")
    print(f"after: {compressed.num_entries:,} entries, {_size_text(compressed)} ({share})")
    print(f"  {output}")


def print_graft(grafted: Grafted, output: Path) -> None:
    """Print what was taken out of the tuned model, and what of it an adapter does not hold."""
    of = f"{grafted.num_differing:,} that differ in {grafted.num_target_elements:,} targeted weights"
    print(f"{grafted.num_entries:,} entries of {of}")
    print(f"they are {grafted.squares_taken / grafted.squares:.1%} of the squared difference there")
    # The most first: another shape, then by the norm.
    order = sorted(grafted.lost.items(), key=lambda lost: -math.inf if lost[1] is None else -lost[1][1])
    for name, lost in order[:NUM_WEIGHTS]:
        how = "has another shape" if lost is None else f"{lost[0]:,} elements differ, norm {lost[1]:.4g}"
        print(f"lost: {name}: {how}")
    if len(order) > NUM_WEIGHTS:
        print(f"lost: {len(order) - NUM_WEIGHTS} weights more, each by less")
    print(f"  {output}")


def print_export(exported: Exported, output: Path) -> None:
    """Print what was written for PEFT, and where its sums fall short of the trained weights."""
    counts = f"{exported.num_entries:,} entries, {exported.num_padding:,} more that change nothing"
    print(f"{counts}, {exported.num_bytes:,} bytes")
    if exported.num_rounded is None:
        print("note: the base is not cached: PEFT's sums may round entries otherwise")
    elif exported.num_rounded:
        print(f"note: PEFT's sums round {exported.num_rounded:,} entries otherwise than training did")
    print(f"  {output}")


def _norm_table(mask: Mask, found: Inspection) -> Table:
    """The Euclidean norm of the deltas by layer (rows) and module (columns)."""
    layers, modules, _ = density_table(mask)
    squares = Counter()
    for name, value in found.squares.items():
        layer, module = place(name)
        squares[OTHER if layer is None else str(layer), module] += value
    rows = []
    for layer in layers:
        row = [squares.get((layer, module)) for module in modules]
        row.append(sum(value for value in row if value is not None))
        rows.append([layer, *("-" if value is None else f"{math.sqrt(value):.3g}" for value in row)])
    return _table("norm of the deltas", ("layer", *short_modules(modules), "total"), rows)


def _table(
    title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], footer: Sequence[str] | None = None
) -> Table:
    """A table of numbers with names in its first column."""
    table = Table(title=title, box=SIMPLE_HEAD, collapse_padding=True, show_footer=footer is not None)
    for number, heading in enumerate(headings):
        justify = "right" if number else "left"
        table.add_column(Text(heading), footer=footer[number] if footer else "", justify=justify)
    for name, *values in rows:
        table.add_row(Text(name), *values)
    return table


def _counts_and_norms(of: AdapterDifference) -> list[str]:
    counts = [f"{count:,}" for count in (of.only_a, of.only_b, of.equal, of.differing)]
    return counts + [f"{math.sqrt(s):.4g}" for s in (of.squares_a, of.squares_b, of.squares_difference)]


def _agreement(of: AdapterDifference) -> str:
    cosine = "undefined" if of.cosine is None else f"{of.cosine:.4f}"
    signs = f"{of.equal:,} equal, {of.opposite:,} with opposite signs"
    return f"of those in both: {signs}; cosine of the deltas {cosine}"


def _size_text(adapter: Adapter) -> str:
    return f"{adapter.num_bytes:,} bytes, {adapter.num_bytes / max(adapter.num_entries, 1):.2f} an entry"
