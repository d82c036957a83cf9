"""What the commands about adapters print."""

from __future__ import annotations

import math
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from speft_ds.model.targets import place

from speft_ds.adapter.compress import Sizes, num_bytes
from speft_ds.adapter.derive import open_adapter
from speft_ds.adapter.diff import Difference, diff, diff_heads, total
from speft_ds.adapter.export_peft import Exported
from speft_ds.adapter.format import Adapter
from speft_ds.adapter.graft import Grafted
from speft_ds.adapter.inspection import Inspection, counts, inspect
from speft_ds.errors import UserError
from speft_ds.report.tables import (
    OTHER,
    density_table,
    jaccard_text,
    print_mask_table,
    print_table,
    short_modules,
)

NUM_WEIGHTS = 10  # of the weights that differ, how many are listed


def print_inspection(source: Path, against: Path | None, output: Path | None) -> None:
    """Print what an adapter is like, and draw where its entries lie.

    Args:
        against: another adapter, whose overlap is printed.
        output: the PNG to write, if any.
    Raises:
        UserError: an adapter that cannot be read, another base, or a picture that cannot be written.
    """
    adapter = open_adapter(source)
    seen, mask = inspect(adapter), counts(adapter)
    print_mask_table(mask)
    print_table(norm_table(adapter, seen))
    print_table(changes_table(seen))
    for line in [*adapter_lines(adapter), f"norm of all deltas {seen.norm:.4g}, largest {seen.largest:.4g}"]:
        print(line)
    if against is not None:
        other = open_adapter(against)
        print("\n".join(overlap_lines(total(list(diff(adapter, other).values())), against)))
    if output is not None:
        _draw(output, adapter, mask)


def _draw(output: Path, adapter: Adapter, mask) -> None:
    from speft_ds.report.plots import mask_heat_map  # late: it takes a second

    try:
        mask_heat_map(output, mask, f"{adapter.folder}: {mask.num_trainable:,} entries ({mask.density:.3%})")
    except OSError as error:
        raise UserError(f"cannot write: {error}", where=str(output), fix="choose another file") from error
    print(f"  {output}")


def adapter_lines(adapter: Adapter) -> list[str]:
    """The base, the size and the heads of an adapter."""
    facts, size = adapter.facts, num_bytes(adapter)
    heads = [f"{name} {adapter.head_shape(name)}" for name in adapter.heads]
    return [
        f"base {facts['base']} in {facts['dtype']}, fingerprint {facts['fingerprint'][:12]}",
        f"size {size_text(size, adapter.num_entries)}",
        *([f"kept whole: {', '.join(heads)}"] if heads else []),
    ]


def size_text(num_bytes: int, num_entries: int) -> str:
    return f"{num_bytes:,} bytes, {num_bytes / max(num_entries, 1):.2f} an entry"


def norm_table(adapter: Adapter, seen: Inspection) -> Table:
    """The Euclidean norm of the deltas by layer (rows) and module (columns)."""
    layers, modules, _ = density_table(counts(adapter))
    squares: dict[tuple[str, str], float] = {}
    for name, weight in seen.weights.items():
        layer, module = place(name)
        where = (OTHER if layer is None else str(layer), module)
        squares[where] = squares.get(where, 0.0) + weight.squares
    table = Table(title="norm of the deltas", box=SIMPLE_HEAD, collapse_padding=True)
    for heading in ("layer", *short_modules(modules), "total"):
        table.add_column(Text(heading), justify="right")
    for layer in layers:
        row = [squares.get((layer, module)) for module in modules]
        row.append(sum(value for value in row if value is not None))
        table.add_row(layer, *("-" if value is None else f"{math.sqrt(value):.3g}" for value in row))
    return table


def changes_table(seen: Inspection) -> Table:
    """The largest changes of single weights."""
    table = Table(title="largest changes", box=SIMPLE_HEAD)
    table.add_column("weight")
    for heading in ("row", "column", "delta"):
        table.add_column(heading, justify="right")
    for change in seen.changes:
        table.add_row(Text(change.weight), str(change.row), str(change.column), f"{change.delta:+.6g}")
    return table


def overlap_lines(all_of_it: Difference, against: Path) -> list[str]:
    cosine = all_of_it.cosine
    return [
        f"overlap with {against}: {all_of_it.common:,} entries in both, "
        f"{all_of_it.only_a:,} only here, {all_of_it.only_b:,} only there, "
        f"Jaccard index {jaccard_text(all_of_it.jaccard)}",
        f"of those in both: {all_of_it.equal:,} equal, {all_of_it.opposite:,} with opposite signs; "
        f"cosine of the deltas {'undefined' if cosine is None else f'{cosine:.4f}'}",
    ]


def print_diff(a: Path, b: Path | None) -> None:
    """Print what sets two adapters apart, or an adapter and its base. Raises UserError."""
    one, other = open_adapter(a), None if b is None else open_adapter(b)
    by_weight = diff(one, other)
    all_of_it = total(list(by_weight.values()))
    print_table(diff_table(by_weight, all_of_it))
    for name, said in diff_heads(one, other).items():
        print(f"{name}: {said}")
    is_same = not (all_of_it.only_a or all_of_it.only_b or all_of_it.differing)
    if other is not None:
        print("the entries are the same" if is_same else overlap_lines(all_of_it, b)[1])


def diff_table(by_weight: dict[str, Difference], all_of_it: Difference) -> Table:
    """Counts and norms of the weights that differ most, and of all weights together."""
    table = Table(title="A - B", box=SIMPLE_HEAD, show_footer=True)
    headings = ("only in A", "only in B", "equal", "differing", "norm of A", "norm of B", "norm of A - B")
    table.add_column("weight", footer=f"all {len(by_weight)}")
    for heading, value in zip(headings, _cells(all_of_it), strict=True):
        table.add_column(heading, footer=value, justify="right")
    apart = sorted(by_weight, key=lambda name: -by_weight[name].squares_apart)
    for name in apart[:NUM_WEIGHTS]:
        table.add_row(Text(name), *_cells(by_weight[name]))
    if len(apart) > NUM_WEIGHTS:
        table.caption = f"the {NUM_WEIGHTS} weights that differ most, of {len(apart)}"
    return table


def _cells(of: Difference) -> list[str]:
    numbers = [f"{count:,}" for count in (of.only_a, of.only_b, of.equal, of.differing)]
    return numbers + [f"{math.sqrt(s):.4g}" for s in (of.squares_a, of.squares_b, of.squares_apart)]


def compress_lines(sizes: Sizes) -> list[str]:
    """Entries and bytes, before and after."""
    before, after = (size_text(*pair) for pair in zip(sizes.bytes, sizes.entries, strict=True))
    return [
        f"before: {sizes.entries[0]:,} entries, {before}",
        f"after: {sizes.entries[1]:,} entries, {after} ({sizes.bytes[1] / sizes.bytes[0]:.1%} of the size)",
    ]


def graft_lines(grafted: Grafted) -> list[str]:
    """What was taken out of the tuned model, and what of it an adapter does not hold."""
    share = grafted.squares_taken / grafted.squares
    lines = [
        f"{grafted.num_entries:,} entries of {grafted.num_differing:,} that differ in "
        f"{grafted.num_target_elements:,} targeted weights",
        f"they are {share:.1%} of the squared difference there",
    ]
    # The most first: another shape, then by the norm.
    order = sorted(grafted.lost.items(), key=lambda lost: -math.inf if lost[1] is None else -lost[1][1])
    for name, lost in order[:NUM_WEIGHTS]:
        how = "has another shape" if lost is None else f"{lost[0]:,} elements differ, norm {lost[1]:.4g}"
        lines.append(f"lost: {name}: {how}")
    if len(order) > NUM_WEIGHTS:
        lines.append(f"lost: {len(order) - NUM_WEIGHTS} weights more, each by less")
    return lines


def export_lines(exported: Exported) -> list[str]:
    """What was written for PEFT, and where its sums fall short of the trained weights."""
    lines = [
        f"{exported.num_entries:,} entries, {exported.num_padding:,} more that change nothing, "
        f"{exported.num_bytes:,} bytes"
    ]
    if exported.num_rounded is None:
        lines.append("note: the base is not at hand: PEFT's sums may round entries otherwise")
    elif exported.num_rounded:
        lines.append(f"note: PEFT's sums round {exported.num_rounded:,} entries otherwise than training did")
    return lines
