"""What reaches a terminal: text as text, and ASCII where its encoding has no more."""

import io
import json
import os
import subprocess
import sys

import pytest
from rich.table import Table

from speft_ds.config.load_recipe import ROOT
from speft_ds.terminal import ASCII, Console
from unit.commands import speft
from unit.written import write_inputs

HOSTILE = "say [/red] \x1b[2J\x1b]0;owned\x07 [bold]x[/bold] [link=http://evil]c[/link] :smile:"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_console_takes_texts_as_they_are(is_terminal):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=is_terminal, width=200, color_system=None)
    table = Table(HOSTILE, title=HOSTILE, caption=HOSTILE)
    table.add_row(HOSTILE)
    console.print(HOSTILE)
    console.print(table)
    written = stream.getvalue()
    assert "\x1b]" not in written and "\x1b[2J" not in written and "\x07" not in written
    assert written.count("[link=http://evil]c[/link] :smile:") >= 3  # the title is wrapped


def test_rows_and_names_on_the_terminal(own_folder, tmp_path, tiny):
    """`speft data` and `speft validate` show the rows, `plan` the names; by the real commands."""
    write_inputs(tmp_path)
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps({'prompt': HOSTILE, 'response': HOSTILE})}\n" * 20)
    model = f"model.name_or_path={tiny['untied']}"
    for command in ("data", "validate"):
        done = speft(command, "mine.yaml", model, "data.max_length=256")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "[link=http://evil]c[/link]" in done.stdout
        assert not set("\x1b\x07") & set(done.stdout + done.stderr)
    named = tmp_path / "[bold]x[/nothing]"
    named.mkdir(parents=True)
    (named / "mine.yaml").write_text((tmp_path / "mine.yaml").read_text())
    done = speft("plan", f"{named}/mine.yaml", "model.name_or_path=meta-llama/Llama-2-[/b]x", "--world", "1")
    assert done.returncode == 2 and "Llama-2-[/b]x" in done.stderr


def encoded(encoding, *words, **environment):
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding, "COLUMNS": "100"} | environment
    command = [sys.executable, "-m", "speft_ds.cli.main", *words]
    return subprocess.run(command, env=env, capture_output=True, check=False)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_output_in_any_encoding(own_folder, tmp_path, encoding):
    write_inputs(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "ä → ±", "response": "漢"}\n' * 9, encoding="utf-8")
    done = encoded(encoding, "validate", "mine.yaml")
    assert b"Traceback" not in done.stderr and done.returncode == 2  # the model is none
    text = done.stdout.decode(encoding)
    for mark in ("ok", "problem"):  # which are words in a log
        assert any(line.startswith(f"{mark} ") for line in text.splitlines())
    done = encoded(encoding, "report", b"n\xff\xc3\xb6")  # a name that is no text
    assert b"Traceback" not in done.stderr and done.returncode == 2
    assert "report" in done.stderr.decode(encoding) or done.stderr.decode(encoding)


def test_every_mark_of_ours_has_its_ascii():
    ours = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "speft_ds").rglob("*.py"))
    assert {letter for letter in ours if ord(letter) > 127} == set(ASCII)
    assert all(value.isascii() for value in ASCII.values())
