"""The `speft` command: what commands hand over, and how they fail."""

import sys
import types
from pathlib import Path

import pytest

from speft_ds.cli.commands import list_recipes
from speft_ds.config.load_recipe import load_recipe
from unit.commands import run, speft

pytestmark = pytest.mark.usefixtures("own_folder")


# The commands of other modules


@pytest.fixture
def called(monkeypatch):
    """Replace a module that a command imports late; returns the list of its calls."""

    def replace(module, **functions):
        calls = []
        stand_in = types.ModuleType(f"speft_ds.{module}")
        for name, result in functions.items():

            def function(*args, _name=name, _result=result, **kwargs):
                calls.append((_name, *args, *([kwargs] if kwargs else [])))
                return _result

            setattr(stand_in, name, function)
        monkeypatch.setitem(sys.modules, f"speft_ds.{module}", stand_in)
        return calls

    return replace


def test_compare_masks_hands_over_the_paths(monkeypatch, called):
    calls = called("cli.commands.compare_masks", compare=None)
    assert run(monkeypatch, "compare-masks", "a", "b/mask.safetensors", "--output", "c.png") == 0
    assert run(monkeypatch, "compare-masks", "a", "b", "c") == 0
    assert calls[0] == ("compare", [Path("a"), Path("b/mask.safetensors")], Path("c.png"))
    assert calls[1] == ("compare", [Path("a"), Path("b"), Path("c")], None)


def test_validate_exits_as_the_checks_say(monkeypatch, called):
    calls = called("cli.commands.validate", validate=2)
    assert run(monkeypatch, "validate", "quickstart", "seed=1", "--ranks", "3") == 2
    assert run(monkeypatch, "validate", "quickstrat") == 2
    assert calls == [("validate", "quickstart", ["seed=1"], 3), ("validate", "quickstrat", [], None)]


def test_plan_hands_over_recipe_and_machine(monkeypatch, called):
    calls = called("tools.plan.make_plan", make_plan="the plan", print_plan=None)
    arguments = ["plan", "quickstart", "--world", "8", "seed=1", "--gpu-gib", "40", "--rows", "9"]
    assert run(monkeypatch, *arguments) == 0
    assert run(monkeypatch, "plan", "quickstart", "--world", "2") == 0
    quickstart = load_recipe("quickstart")
    seeded = load_recipe("quickstart", ["seed=1"])
    assert calls[:2] == [
        ("make_plan", seeded, 8, {"gpu_gib": 40.0, "num_rows": 9, "device": "cuda"}),
        ("print_plan", "the plan"),
    ]
    assert calls[2] == ("make_plan", quickstart, 2, {"gpu_gib": 80.0, "num_rows": None, "device": "cuda"})


def test_doctor_exits_as_its_checks_say(monkeypatch, called):
    calls = called("tools.doctor", examine=["a check"], print_report=None, exit_code=1)
    assert run(monkeypatch, "doctor") == 1
    assert calls == [("examine",), ("print_report", ["a check"]), ("exit_code", ["a check"])]


def test_data_hands_over_recipe_and_picture(monkeypatch, called):
    calls = called("cli.commands.show_data", show_data=None)
    assert run(monkeypatch, "data", "quickstart", "seed=1", "--output", "a.png") == 0
    assert calls == [("show_data", load_recipe("quickstart", ["seed=1"]), Path("a.png"))]


@pytest.mark.parametrize(
    ("words", "at", "expected"),
    [("speft sco", 1, "score"), ("speft show quick", 2, "quickstart"), ("speft show --pl", 2, "--plain")],
)
def test_the_shell_completes_commands_recipes_and_options(words, at, expected):
    done = speft(COMP_WORDS=words, COMP_CWORD=str(at), _SPEFT_COMPLETE="complete_bash")
    assert done.stdout.split() == [expected]


# How commands fail


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "quickstrat"], "did you mean quickstart?"),
        (["show", "quickstart", "mask.desnity=1", "seed=x"], "2 problems"),
        (["cp", "quickstrat", "mine.yaml"], "did you mean quickstart?"),
        (["schema", "mask.desnity"], "did you mean mask.density?"),
        (["schema", "density"], "did you mean mask.density?"),
        (["schema", "mask.zz"], "mask.salience"),
        (["schema", "chat_template"], "data.chat_template"),
        (["plan", "quickstrat", "--world", "2"], "did you mean quickstart?"),
        (["data", "quickstrat"], "did you mean quickstart?"),
        (["quickstart", "mask.desnity=1"], "did you mean mask.density?"),  # before anything is prepared
        (["score", "quickstrat"], "did you mean quickstart?"),
        (["score", "quickstart", "mask.desnity=1"], "did you mean mask.density?"),
        (["compare-masks", "a/mask.safetensors"], "speft compare-masks a/mask.safetensors runs/other"),
        (["shwo"], "Did you mean 'show'?"),
        (["show", "quickstart", "--plian"], "--plain"),
        (["show"], "RECIPE"),
        (["plan", "quickstart"], "--world"),
        (["plan", "quickstart", "--world", "0"], "'--world'"),
        (["schema", "mask", "--json"], "leave KEY out"),
    ],
)
def test_user_errors_have_no_traceback_and_exit_with_2(arguments, said):
    done = speft(*arguments)
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr and done.stdout == ""


def test_ctrl_c_ends_quietly(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(list_recipes, "list_recipes", interrupted)
    assert run(monkeypatch, "ls") == 130
    assert capsys.readouterr() == ("", "")
