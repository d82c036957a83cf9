"""What reaches a terminal: text as text, and ASCII where its encoding has no more."""

import io
import json
import os
import sys

import pytest
from rich.table import Table
from rich.text import Text

from speft_ds.config.load_recipe import ROOT
from speft_ds.terminal import ASCII, Console
from unit.commands import run, speft
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


@pytest.mark.parametrize("width", [8, 20, 35])
def test_a_secret_that_a_line_break_divides_is_none_on_the_terminal(width, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdefghij")
    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None)
    text = "token hf_0123456789abcdefghij of https://me:pass-word-1@host/x \x1b[2J"
    table = Table(text, title=text, width=width)
    table.add_row(Text.assemble("now ", (text, "bold")))
    for each in (text, Text(text, "red"), table):
        console.print(each)
    written = "".join(letter for letter in stream.getvalue() if letter.isalnum() or letter in "\x1b-")
    assert "0123" not in written and "pass" not in written and "\x1b" not in written
    assert written.count("token") >= 3


def test_rows_and_names_on_the_terminal(own_folder, tmp_path, tiny, monkeypatch, capsys):
    """`speft data` and `speft validate` show the rows, `plan` the names."""
    monkeypatch.setenv("COLUMNS", "200")
    write_inputs(tmp_path)
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps({'prompt': HOSTILE, 'response': HOSTILE})}\n" * 20)
    model = f"model.name_or_path={tiny['untied']}"
    for command in ("data", "validate"):
        code, said = run(monkeypatch, command, "mine.yaml", model, "data.max_length=256"), capsys.readouterr()
        assert code == 0 and "[link=http://evil]c[/link]" in said.out, said
        assert not set("\x1b\x07") & set(said.out + said.err)
    named = tmp_path / "[bold]x[/nothing]"
    named.mkdir(parents=True)
    (named / "mine.yaml").write_text((tmp_path / "mine.yaml").read_text())
    hostile = ["model.name_or_path=meta-llama/Llama-2-[/b]x", "--world", "1"]
    assert run(monkeypatch, "plan", f"{named}/mine.yaml", *hostile) == 2
    assert "Llama-2-[/b]x" in capsys.readouterr().err


def encoded(monkeypatch, encoding, *words):
    """Exit code, stdout and stderr of a command at a terminal of this encoding, which must hold them all."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", streams[0])
        patched.setattr(sys, "stderr", streams[1])
        code = run(patched, *words)
    for stream in streams:
        stream.flush()
    return code, *(stream.buffer.getvalue().decode(encoding) for stream in streams)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_output_in_any_encoding(own_folder, tmp_path, monkeypatch, encoding):
    write_inputs(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "ä → ±", "response": "漢"}\n' * 9, encoding="utf-8")
    code, text, _ = encoded(monkeypatch, encoding, "validate", "mine.yaml")
    assert code == 2  # the model is none
    for mark in ("ok", "problem"):  # which are words in a log
        assert any(line.startswith(f"{mark} ") for line in text.splitlines())
    code, _, said = encoded(monkeypatch, encoding, "report", os.fsdecode(b"n\xff\xc3\xb6"))  # no text
    assert code == 2 and "recipe.yaml" in said


def test_the_command_itself_in_ascii():
    """By the real command: a name that is no text, and a letter that ASCII does not have."""
    done = speft("runs", b"n\xff\xc3\xb6", PYTHONIOENCODING="ascii")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "n??" in done.stderr


def test_tables_in_ascii_have_straight_edges():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    table = Table("a", "b")
    for cell in ("45.2% \u00b1 1.1", "no mark", Text("\u00b1 \u6f22 and more")):
        table.add_row(cell, "x")
    Console(file=stream, width=40).print(table)
    stream.seek(0)
    lines = stream.read().splitlines()
    assert len({len(line) for line in lines}) == 1 and "45.2% +- 1.1" in "".join(lines)


def test_every_mark_of_ours_has_its_ascii():
    ours = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "speft_ds").rglob("*.py"))
    assert {letter for letter in ours if ord(letter) > 127} == set(ASCII)
    assert all(value.isascii() for value in ASCII.values())
