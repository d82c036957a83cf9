"""Bad inputs: found before torch is imported, each with where it is and a fix."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from unit.jobs import bad_inputs

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Messages by name, from one process without a network, and whether that imported torch."""
    folder = tmp_path_factory.mktemp("bad")
    bad_inputs.write_files(folder)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "PYTHONPATH": str(ROOT)}
    env.pop("HF_HUB_CACHE", None)
    command = [sys.executable, bad_inputs.__file__]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_every_bad_input_is_refused_before_torch_is_imported(shown):
    assert len(shown["messages"]) >= 60
    assert [name for name, text in shown["messages"].items() if text == "nothing is wrong"] == []
    assert not shown["torch"]


def test_every_message_says_what_where_and_what_to_do(shown):
    for name, text in shown["messages"].items():
        problems = [part for part in text.split("\n  ") if part[:1].isdigit()]
        assert problems and text.count("where: ") >= len(problems), name
        assert text.count("fix: ") >= len(problems), (name, text)
