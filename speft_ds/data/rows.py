"""Tokenised rows: what the model sees as one sequence. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise


@dataclass(frozen=True)
class Row:
    """What the model sees as one sequence: a row, or several packed ones.

    Attributes:
        ids: token ids.
        spans: [start, stop) of the tokens that are learnt, ascending; the first token of a row never is.
        starts: where each of the packed rows begins.
        label: the class, for sequence classification; then there are no spans.
    """

    ids: list[int]
    spans: list[tuple[int, int]]
    starts: list[int] = field(default_factory=lambda: [0])
    label: int | None = None

    @property
    def num_labels(self) -> int:
        """What the loss is a sum over: learnt tokens, or one label."""
        return sum(stop - start for start, stop in self.spans) if self.label is None else 1

    def as_text(self, tokenizer) -> list[tuple[str, bool]]:
        """The tokens as text again, cut where learning starts and stops, with whether a piece is learnt."""
        edges = sorted({0, len(self.ids), *(edge for span in self.spans for edge in span)})
        learnt = {start for start, _ in self.spans}
        pieces = [
            (tokenizer.decode(self.ids[start:stop]), start in learnt) for start, stop in pairwise(edges)
        ]
        return pieces if self.label is None else [*pieces, (f"class {self.label}", True)]


def pack(rows: list[Row]) -> Row:
    """The rows as one sequence, one after the other."""
    ids, spans, starts = [], [], []
    for row in rows:
        spans += [(start + len(ids), stop + len(ids)) for start, stop in row.spans]
        starts.append(len(ids))
        ids += row.ids
    return Row(ids, spans, starts)
