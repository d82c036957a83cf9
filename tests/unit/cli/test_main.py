"""The `speft` command: what commands hand over, and how they fail."""

import sys
from unittest import mock

import pytest

from speft_ds.config.load_recipe import load_recipe
from unit.commands import run, speft

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture
def replaced(monkeypatch):
    """Replace a module that a command imports late by a mock, and return that."""

    def replace(module):
        monkeypatch.setitem(sys.modules, f"speft_ds.{module}", mock.MagicMock())
        return sys.modules[f"speft_ds.{module}"]

    return replace


@pytest.mark.parametrize(
    ("options", "given"),
    [
        (["--gpu-gib", "40", "--rows", "9"], {"gpu_gib": 40.0, "num_rows": 9, "device": "cuda"}),
        (["--device", "cpu", "--details"], {"gpu_gib": None, "num_rows": None, "device": "cpu"}),
    ],
)
def test_plan_hands_over_recipe_and_machine(monkeypatch, replaced, options, given):
    make_plan, print_plan = (replaced(f"tools.plan.{name}") for name in ("make_plan", "print_plan"))
    assert run(monkeypatch, "plan", "quickstart", "--world", "8", "seed=1", *options) == 0
    make_plan.make_plan.assert_called_once_with(load_recipe("quickstart", ["seed=1"]), 8, **given)
    plan = make_plan.make_plan.return_value
    print_plan.print_plan.assert_called_once_with(plan, "--details" in options)


def test_doctor_exits_as_its_checks_say(monkeypatch, replaced):
    module = replaced("tools.doctor")
    module.exit_code.return_value = 1
    assert run(monkeypatch, "doctor") == 1
    module.print_report.assert_called_once_with(module.examine.return_value)


@pytest.mark.parametrize(
    ("words", "at", "expected"),
    [("speft sco", 1, "score"), ("speft show quick", 2, "quickstart"), ("speft show --pl", 2, "--plain")],
)
def test_the_shell_completes_commands_recipes_and_options(words, at, expected):
    done = speft(COMP_WORDS=words, COMP_CWORD=str(at), _SPEFT_COMPLETE="complete_bash")
    assert done.stdout.split() == [expected]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("show quickstrat", "did you mean quickstart?"),
        ("show quickstart mask.desnity=1 seed=x", "2 problems"),
        ("cp quickstrat mine.yaml", "did you mean quickstart?"),
        ("schema mask.desnity", "did you mean mask.density?"),
        ("schema density", "did you mean mask.density?"),
        ("schema mask.zz", "mask.salience"),
        ("schema chat_template", "data.chat_template"),
        ("plan quickstrat --world 2", "did you mean quickstart?"),
        ("data quickstrat", "did you mean quickstart?"),
        ("quickstart mask.desnity=1", "did you mean mask.density?"),  # before anything is prepared
        ("score quickstrat", "did you mean quickstart?"),
        ("score quickstart mask.desnity=1", "did you mean mask.density?"),
        ("compare-masks a/mask.safetensors", "speft compare-masks a/mask.safetensors runs/other"),
        ("shwo", "Did you mean 'show'?"),
        ("show quickstart --plian", "--plain"),
        ("show", "RECIPE"),
        ("plan quickstart", "--world"),
        ("plan quickstart --world 0", "'--world'"),
        ("schema mask --json", "leave KEY out"),
        (f"report {'n' * 300}", "command line"),  # a name that no folder holds
    ],
)
def test_user_errors_have_no_traceback_and_exit_with_2(monkeypatch, capsys, arguments, said):
    assert run(monkeypatch, *arguments.split()) == 2
    printed = capsys.readouterr()
    assert said in printed.err and "Traceback" not in printed.err and printed.out == ""
