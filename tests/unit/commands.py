"""The `speft` command as tests type it."""

import os
import subprocess
import sys

import pytest

from speft_ds import cli
from speft_ds.config.load_recipe import ROOT


def speft(*arguments, **environment):
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"} | environment
    command = [sys.executable, "-m", "speft_ds.cli", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def run(monkeypatch, *arguments):
    """Run a command in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["speft", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code
