"""Row counts: how many rows were read, left out and why, and are trained on. Imports no torch."""

from typing import Any

from speft_ds.data.dataset import TokenizedDataset
from speft_ds.data.tokenize import CUT_PROMPT, CUT_RESPONSE, NO_LABELS, TOO_LONG

EMPTY, DUPLICATE, NOT_SELECTED = "empty, left out", "duplicate id, left out", "not selected"
COUNTED = (
    "rows",
    EMPTY,
    DUPLICATE,
    NO_LABELS,
    CUT_PROMPT,
    CUT_RESPONSE,
    TOO_LONG,
    NOT_SELECTED,
)  # of each source
LEFT_OUT = {
    EMPTY: "empty",
    DUPLICATE: "duplicate id",
    NO_LABELS: "nothing to learn",
    TOO_LONG: "too long",
    NOT_SELECTED: NOT_SELECTED,
}


def row_counts(dataset: TokenizedDataset, epochs: float) -> dict[str, Any]:
    """What became of the rows of all sources, as run.json has it.

    Args:
        epochs: that the run's steps come to.
    Returns:
        `rows_read`; `left_out` and `truncated`, each reason -> rows, only where there are some; `rows` and
        `packs` (None: not packed) that are trained on; `label_tokens` (a class counts as one); `epochs`.
    """
    sources = dataset.facts["sources"]
    totals = {what: sum(source.get(what, 0) for source in sources) for what in COUNTED}
    return {
        "rows_read": totals["rows"],
        "left_out": {name: totals[what] for what, name in LEFT_OUT.items() if totals[what]},
        "truncated": {what: totals[what] for what in (CUT_PROMPT, CUT_RESPONSE) if totals[what]},
        "rows": dataset.num_rows,
        "packs": len(dataset) if dataset.is_packed else None,
        "label_tokens": dataset.num_labels,
        "epochs": epochs,
    }


def in_words(counts: dict[str, Any]) -> str:
    """The result of `row_counts` on one line."""
    left_out = sum(counts["left_out"].values())
    reasons = f" ({_listed(counts['left_out'])})" if left_out else ""
    truncated = f", {_listed(counts['truncated'])}" if counts["truncated"] else ""
    packs = "" if counts["packs"] is None else f" in {counts['packs']:,} packs"
    read = f"{counts['rows_read']:,} read, {left_out:,} left out{reasons}{truncated}"
    trained = f"{counts['rows']:,} trained{packs}, {counts['label_tokens']:,} label tokens"
    return f"rows: {read}; {trained}, {counts['epochs']:.3g} epochs"


def _listed(numbers: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {what}" for what, number in numbers.items())
