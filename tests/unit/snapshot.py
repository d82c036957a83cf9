"""Texts that should change on purpose only, kept in tests/unit/snapshots."""

import difflib
import os
from pathlib import Path

import pytest

SNAPSHOTS = Path(__file__).resolve().parent / "snapshots"


def check_snapshot(name, text):
    """Compare a text with the snapshot of that name; RENEW_SNAPSHOTS=1 writes the snapshot instead."""
    file = SNAPSHOTS / name
    if os.environ.get("RENEW_SNAPSHOTS") == "1":
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    kept = file.read_text(encoding="utf-8") if file.is_file() else ""
    if text != kept:
        lines = (part.splitlines() for part in (kept, text))
        changes = "\n".join(difflib.unified_diff(*lines, "kept", "now", lineterm="", n=0))
        how = f"RENEW_SNAPSHOTS=1 pytest {os.environ.get('PYTEST_CURRENT_TEST', '').partition(' ')[0]}"
        pytest.fail(f"{name} changed. If that is meant: {how}\n{changes}", pytrace=False)
