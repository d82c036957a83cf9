"""How far masks overlap: `speft compare-masks A B ...`."""

import os
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from speft_ds.adapter.format import TENSORS as ADAPTER_FILE
from speft_ds.adapter.format import Adapter
from speft_ds.config.mask_config import MASK_FILE
from speft_ds.errors import UserError
from speft_ds.io import write_bytes
from speft_ds.report.plots import jaccard_picture
from speft_ds.report.tables import jaccard_text, percent, print_table, unique_tails
from speft_ds.sparse.mask import Mask, jaccard, read_mask


@dataclass(frozen=True)
class MaskSource:
    """A mask file or an adapter.

    Attributes:
        mask: of an adapter, with the weights that have entries alone.
        num_target_elements: what the density is a fraction of; None where unknown.
        fingerprint: of the base, one for all dtypes that it may have been loaded in; None where unknown.
    """

    path: Path
    mask: Mask
    num_target_elements: int | None
    fingerprint: str | None


def compare(paths: list[Path], output: Path | None) -> None:
    """Print the Jaccard matrix of masks and adapters, and draw it into the PNG `output`, if any.

    Raises:
        UserError: an unreadable file, masks over different models, an output that cannot be written.
    """
    sources = [read_source(path) for path in paths]
    for one, other in combinations(sources, 2):
        check_same_model(one, other)
    matrix = [[jaccard(a.mask, b.mask) for b in sources] for a in sources]
    names = short_names(paths)
    print_table(_matrix_table(sources, names, matrix))
    if len({source.fingerprint for source in sources} - {None}) > 1:
        print("note: these masks were made for bases with different weights (their fingerprints differ)")
    if output is None:
        return
    try:
        write_bytes(output, jaccard_picture(names, matrix))
    except OSError as error:
        raise UserError(f"cannot write: {error}", str(output), "choose another file") from error
    print(f"  {output}")


def read_source(path: Path) -> MaskSource:
    """The mask or adapter of a file, the folder it lies in, or the folder of its run. Raises UserError."""
    places = [path, path / MASK_FILE, path / ADAPTER_FILE, path / "adapter" / ADAPTER_FILE]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        fix = f"give a {MASK_FILE}, a folder with one, an adapter or a run folder"
        raise UserError("there is no mask and no adapter", where=str(path), fix=fix)
    if found.name == ADAPTER_FILE:
        adapter = Adapter.open(found.parent)
        mask, facts = Mask({n: adapter.entries(n)[0] for n in adapter.names}, adapter.shape), adapter.facts
        about = facts.get("mask")
        num_elements = about.get("num_target_elements") if isinstance(about, dict) else None
    else:
        mask, facts = read_mask(found)
        num_elements = mask.num_target_elements
    fingerprint = facts.get("fingerprint_bfloat16")
    return MaskSource(found, mask, num_elements, fingerprint if isinstance(fingerprint, str) else None)


def check_same_model(a: MaskSource, b: MaskSource) -> None:
    """Refuse masks that have no weight in common, or another shape of one. Raises UserError."""
    where, fix = f"{a.path} and {b.path}", "compare masks of one model"
    shapes_a, shapes_b = a.mask.shape, b.mask.shape
    common = sorted(shapes_a.keys() & shapes_b.keys())
    if not common:
        raise UserError("these masks have no weight in common", where, fix)
    for name in common:
        if shapes_a[name] != shapes_b[name]:
            what = f"these masks are of different models: {name} is {shapes_a[name]} and {shapes_b[name]}"
            raise UserError(what, where, fix)


def short_names(paths: list[Path]) -> list[str]:
    """A name for each path: `runs/snip/mask.safetensors` -> `snip`, or more where that is not enough."""
    full = short = [Path(os.path.abspath(path)).parts for path in paths]
    for usual in (MASK_FILE, ADAPTER_FILE, "adapter"):  # the names that every run has
        short = [parts[:-1] if len(parts) > 1 and parts[-1] == usual else parts for parts in short]
    # A run's mask and its adapter would have one short name.
    parts = short if len(set(short)) == len(set(full)) else full
    return [str(Path(*tail)) for tail in unique_tails(parts)]


def _matrix_table(sources: list[MaskSource], names: list[str], matrix: list[list[float]]) -> Table:
    """The Jaccard matrix with numbered columns, and what is known of each mask."""
    table = Table(title="Jaccard index: entries in both masks / entries in either", box=SIMPLE_HEAD)
    table.add_column("", justify="right")
    table.add_column("mask")
    for heading in ("entries", "density", *map(str, range(1, len(sources) + 1))):
        table.add_column(heading, justify="right")
    for number, (source, name, row) in enumerate(zip(sources, names, matrix, strict=True), 1):
        entries, elements = source.mask.num_trainable, source.num_target_elements
        density = percent(entries, elements) if isinstance(elements, int) else "unknown"
        table.add_row(str(number), Text(name), f"{entries:,}", density, *map(jaccard_text, row))
    return table
