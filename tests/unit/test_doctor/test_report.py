"""The real report of this machine, and how it is printed."""

import os
import pty
import re
import subprocess
import sys
import threading
import time

import pytest
from limits import HANG_S

from speft_ds import doctor
from speft_ds.config.load_recipe import ROOT
from speft_ds.doctor import Check
from speft_ds.doctor.processes import in_thread
from speft_ds.doctor.report import _outcome
from unit.test_doctor.made import STRANGE, TOKEN

REPORT = """
import sys
from speft_ds import doctor
checks = doctor.examine()
doctor.print_report(checks)
assert "torch" not in sys.modules
sys.exit(doctor.exit_code(checks))
"""


@pytest.fixture(scope="module")
def report():
    env = {key: value for key, value in os.environ.items() if not STRANGE.fullmatch(key)}
    env |= {"HF_TOKEN": TOKEN, "FORCE_COLOR": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", REPORT]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=HANG_S, check=False)


def test_this_machine_is_ready(report):
    assert report.returncode == 0, report.stdout + report.stderr
    lines = report.stdout.splitlines()
    assert lines[0].startswith("speft doctor: speft_ds ") and lines[-1].startswith("verdict: ready to run; ")
    assert not any(line.startswith("problem") for line in lines)
    assert re.search(r"^ok +2 ranks, gloo +all_reduce and reduce_scatter in", report.stdout, re.M)
    assert re.search(r"^ok +DeepSpeed +imports; accelerator", report.stdout, re.M)
    assert re.search(r"^(ok|skipped) +shared-memory op ", report.stdout, re.M)
    assert re.search(r"^ok +transformers +\d", report.stdout, re.M)


def test_a_piped_report_is_plain_text_without_the_token(report):
    assert "\x1b" not in report.stdout and report.stdout.isascii()
    assert re.search(r"^ok +hub token +there is one$", report.stdout, re.M)
    assert TOKEN not in report.stdout + report.stderr


CHECKS = [
    Check("a", "ok", "fine"),
    Check("long name", "warning", "[red]so so[/red]", "type this"),
    Check("c", "skipped", "no GPU"),
    Check("d", "problem", "broken " * 30, "mend it"),
]


def test_the_report_says_status_fix_and_verdict_in_words(capsys):
    doctor.print_report(CHECKS)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:4] == [
        "ok       a          fine",
        "warning  long name  [red]so so[/red]",
        "                    fix: type this",
    ]
    assert lines[-1] == "verdict: NOT ready: 1 problem to fix; 1 warning"
    assert len(lines) == 8  # nothing is wrapped


def test_a_terminal_gets_the_same_words_in_colour():
    main, terminal = pty.openpty()
    code = f"from speft_ds.doctor import *; print_report({CHECKS!r})"
    env = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    env.pop("NO_COLOR", None)
    subprocess.run([sys.executable, "-c", code], stdout=terminal, env=env, check=True, timeout=HANG_S)
    os.close(terminal)
    shown = os.read(main, 10_000).decode()
    os.close(main)
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown).replace("\r", "")
    assert plain != shown.replace("\r", "")
    assert "warning  long name  [red]so so[/red]\n" in plain and "broken " * 30 in plain


def test_only_problems_fail():
    assert doctor.exit_code(CHECKS) == 1 and doctor.exit_code(CHECKS[:3]) == 0


def test_a_check_that_hangs_or_fails_is_a_problem_of_its_own():
    endless = threading.Event()
    hangs, fails = in_thread(endless.wait), in_thread(lambda: 1 / 0)
    try:
        (check,) = _outcome("drive", hangs, time.monotonic() + 0.2)
        assert (check.name, check.status) == ("drive", "problem") and "no answer" in check.what
        (check,) = _outcome("numbers", fails, time.monotonic() + HANG_S)
        assert check.status == "problem" and "ZeroDivisionError" in check.what
    finally:
        endless.set()
