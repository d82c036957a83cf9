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
def run(tmp_path_factory):
    """Problems by case, from one process without a network, and whether that imported torch."""
    folder = tmp_path_factory.mktemp("bad")
    bad_inputs.write_files(folder)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "PYTHONPATH": str(ROOT)}
    env.pop("HF_HUB_CACHE", None)
    command = [sys.executable, bad_inputs.__file__]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_bad_inputs_are_found_before_torch_is_imported(run):
    assert not run["torch"] and len(run["found"]) == len(bad_inputs.CASES)


@pytest.mark.parametrize("case", bad_inputs.CASES)
def test_a_problem_says_what_where_and_what_to_do(run, case):
    _, _, place, part_of_fix = bad_inputs.CASES[case]
    ((what, where, fix), *more) = run["found"][case]
    assert not more and where.endswith(place) and part_of_fix in fix and fix
    assert what and "pydantic" not in what
