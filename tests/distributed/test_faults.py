"""Runs that are killed without warning, and resumed; `benchmarks/faults.py` does it 60 times."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from faults import trials


def test_killed_and_resumed_is_undisturbed(tmp_path):
    """At two moments of training, and before three file operations: bit for bit, from the newest whole."""
    rows = list(trials(tmp_path, kills=2, points=3, ranks=2, seed=1))
    assert len(rows) == 5
    for row in rows:
        assert row["identical"] and row["newest kept"], row
        assert row["exit codes"] in ("-9 1", "1 -9", "-9 -9"), row
        assert row["redone"] <= 4, row  # a checkpoint every 2 steps, one in flight
