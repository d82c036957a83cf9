"""The help of the commands, and whether the examples in it and in the README hold."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import typer

from speft_ds.cli import launch
from speft_ds.cli import main as cli
from speft_ds.config.load_recipe import ROOT, load_recipe
from unit.commands import run

pytestmark = pytest.mark.usefixtures("own_folder")


COMMANDS = typer.main.get_command(cli.app).commands


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(monkeypatch, command, "--help") == 0
    shown, examples = capsys.readouterr().out, examples_of(COMMANDS[command].epilog)
    assert len(examples) >= 2 and all(example in shown for example in examples)
    assert all(parameter.help for parameter in COMMANDS[command].params)


def examples_of(text):
    """Commands in a text, without what follows them on their lines."""
    pattern = re.compile(r"^ *((?:[A-Z_]+=\S+ )*(?:speft|deepspeed) .*)$", re.MULTILINE)
    lines = pattern.findall((text or "").replace("\\\n", " "))
    return [re.split(r" # | > |   ", line)[0].rstrip() for line in lines]


def shell_blocks(markdown):
    return "\n".join(re.findall(r"```bash\n(.*?)```", markdown, re.DOTALL))


HELP_TEXTS = [command.epilog for command in COMMANDS.values()]
SCRIPTS = [(ROOT / "launch" / f"{job}.py").read_text() for job in ("train", "score", "evaluate")]
READMES = [ROOT / page for page in ("README.md", "recipes/README.md", "launch/README.md")]
PAGES = [shell_blocks(page.read_text()) for page in [*READMES, *(ROOT / "docs").glob("*.md")]]
TEXTS = [*HELP_TEXTS, *SCRIPTS, *PAGES, launch.MORE_HELP]
EXAMPLES = list(dict.fromkeys(line for text in TEXTS for line in examples_of(text)))
assert len(EXAMPLES) > 30


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_parse(example, monkeypatch):
    """The command and its options exist; its recipe loads with its overrides."""
    words = [word for word in shlex.split(example) if not re.match(r"[A-Z_]+=", word)]
    if words[0] == "deepspeed":
        start = next(i for i, word in enumerate(words) if word.startswith("launch/"))
        assert (ROOT / words[start]).is_file()
        monkeypatch.setattr(sys, "argv", words[start:])
        given = launch.parse_arguments(Path(words[start]).stem, "")
        if getattr(given, "recipe", None):
            load_recipe(given.recipe, given.overrides)
        return
    if len(words) > 1 and words[1].startswith("--"):
        assert words[1] in ("--install-completion", "--show-completion", "--help")
        return
    given = COMMANDS[words[1]].make_context(words[1], launch.with_resume(words[2:])).params
    if recipe := "quickstart" if words[1] == "quickstart" else given.get("recipe"):
        load_recipe(recipe, given.get("overrides") or [])
