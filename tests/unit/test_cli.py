"""The `speft` commands: what they print, how they fail, and whether the examples in help and README hold."""

import json
import os
import re
import shlex
import subprocess
import sys
import types
from io import StringIO
from pathlib import Path

import pytest
import typer
import yaml
from rich.console import Console

from speft_ds import cli, entry
from speft_ds.commands import ls as listing
from speft_ds.commands.cp import copy_recipe
from speft_ds.commands.show import annotated_yaml
from speft_ds.errors import UserError
from speft_ds.recipe import RECIPES_DIR, ROOT, list_recipes, load_recipe, resolved_yaml
from speft_ds.schema import Recipe
from unit.written import MINIMAL, load

COMMANDS = typer.main.get_command(cli.app).commands


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


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


# ls


@pytest.mark.parametrize("width", [80, 200])
def test_ls_lists_every_recipe(width):
    done = speft("ls", COLUMNS=str(width))
    assert done.returncode == 0
    words = " ".join(done.stdout.split())
    assert all(name in words for name in list_recipes())
    assert "SmolLM2-135M-Instruct" in words and "0.500%" in words and "quickstart/train.jsonl" in words
    assert "A first sparse fine-tuning run" in words
    assert all(len(line) <= width for line in done.stdout.splitlines())
    assert "…" not in words  # nothing is cut


@pytest.fixture
def odd_recipes(tmp_path, monkeypatch):
    """A folder of recipes, one of which does not load."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "broken.yaml").write_text("# What\n# Needs [1] GPU. More.\nseed: [red]\n")
    (folder / "good.yaml").write_text(
        f"# Good\n# Needs 2.5 GPUs; more\n{MINIMAL}mask: {{num_trainable: 7000}}\n"
    )
    (folder / "bare.yaml").write_text(MINIMAL)
    for module in ("recipe", "commands.ls"):
        monkeypatch.setattr(f"speft_ds.{module}.RECIPES_DIR", folder)


@pytest.mark.parametrize("width", [80, 200])
def test_ls_shows_a_recipe_that_does_not_load(odd_recipes, width):
    output = StringIO()
    listing.print_list(Console(file=output, width=width))
    words = " ".join(output.getvalue().split())
    assert "does not load: model.name_or_path is missing; seed is ['red']: must be a valid integer" in words


def test_what_ls_says_of_a_recipe(odd_recipes):
    bare, broken, good = listing.list_all()
    assert (good.about, good.needs, good.model, good.density) == ("Good", "2.5 GPUs", "name", "7,000 weights")
    assert (broken.about, broken.needs, broken.model) == ("What", "[1] GPU", "")
    assert (bare.about, bare.needs, bare.data) == ("", "", "rows.jsonl")


# show


@pytest.mark.parametrize("option", [[], ["--plain"]])
def test_show_prints_the_resolved_recipe(option):
    overrides = ["mask.density=0.01", "mask.targets=[a, b]"]
    done = speft("show", "quickstart", *overrides, *option)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout) == yaml.safe_load(resolved_yaml(load_recipe("quickstart", overrides)))
    assert ("#" in done.stdout) == (not option)


def origins(text):
    """key -> comment of an annotated recipe, keys below one another."""
    section, found = "", {}
    for line in text.splitlines():
        name, _, rest = line.strip().partition(":")
        if rest:
            found[f"{section}{name}" if line[0] == " " else name] = rest.rpartition("  # ")[2]
        else:
            section = f"{name}."
    return found


def test_show_says_where_values_come_from(tmp_path):
    (tmp_path / "base.yaml").write_text(MINIMAL + "seed: 3\noptimizer: {lr: 1e-4}\n")
    (tmp_path / "mine.yaml").write_text("extends: ./base.yaml\nseed: 4\n")
    text = annotated_yaml(load_recipe("mine.yaml", ["mask.num_trainable=5"]))
    found = origins(text)
    assert found["model.name_or_path"] == "base.yaml:2" and found["optimizer.lr"] == "base.yaml:6"
    assert found["seed"] == "mine.yaml:2"
    assert found["mask.num_trainable"] == "command line"
    assert found["mask.density"] == "not used: another key takes its place"
    assert found["output_dir"] == found["train.epochs"] == "default"
    assert len({line.index("  # ") for line in text.splitlines() if "  # " in line}) == 1  # aligned


LONG = "a {prompt}\n\n# no comment: 'x' \"y\" \\ é\u2028 " + "z" * 200


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"mask: {{targets: [{json.dumps(LONG)}, 'null', '1e3', '~', '- a']}}\noptimizer: {{eps: 1e-12}}",
        "output_dir: 'a: b #c'\nmask: {layers: [0, 3]}",
    ],
)
def test_annotated_recipes_load_again_as_the_same(tmp_path, text):
    recipe = load(tmp_path, text)
    check_that_it_loads_again(tmp_path, recipe)


def test_an_annotated_mixture_loads_again(tmp_path):
    mixture = "{path: a.jsonl, weight: 2, columns: {prompt: q}}, {path: b.jsonl, weight: 1}"
    recipe = load(tmp_path, "", "data.path=null", f"data.mixture=[{mixture}]")
    assert "null" not in annotated_yaml(recipe).partition("mixture: ")[2].partition("\n")[0]
    check_that_it_loads_again(tmp_path, recipe)


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES_DIR.glob("*.yaml")))
def test_every_recipe_annotated_loads_again(tmp_path, name):
    check_that_it_loads_again(tmp_path, load_recipe(name))


def check_that_it_loads_again(folder, recipe):
    """Annotated, written to a file of that name and loaded, it is the same; each value has one line."""
    text = annotated_yaml(recipe)
    (folder / "again").mkdir()
    (folder / "again" / f"{recipe.name}.yaml").write_text(text)
    again = load_recipe(f"again/{recipe.name}.yaml")
    assert again.model_dump() == recipe.model_dump()
    assert all(re.match(r" *\w+:( |$)", line) for line in text.splitlines())


# cp


def test_cp_copies_with_comments_and_says_what_next(tmp_path):
    done = speft("cp", "quickstart", "new folder/mine.yaml")
    assert done.returncode == 0, done.stderr
    new = tmp_path / "new folder" / "mine.yaml"
    assert new.read_text() == (RECIPES_DIR / "quickstart.yaml").read_text()
    for part in [
        "edit ",
        "speft validate 'new folder/mine.yaml'",
        "train.py --recipe 'new folder/mine.yaml'",
    ]:
        assert part in done.stdout


def test_cp_keeps_a_file_that_is_there(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.yaml").write_text("mine")
    assert run(monkeypatch, "cp", "quickstart", "mine.yaml") == 2
    assert "--force" in capsys.readouterr().err and (tmp_path / "mine.yaml").read_text() == "mine"
    assert run(monkeypatch, "cp", "quickstart", "mine.yaml", "--force") == 0
    assert load_recipe("mine.yaml").train.steps == load_recipe("quickstart").train.steps


@pytest.mark.parametrize(
    ("recipe", "target", "said"),
    [
        ("quickstrat", "mine.yaml", "did you mean quickstart?"),
        ("nowhere.yaml", "mine.yaml", "nowhere.yaml"),
        ("quickstart", "mine", "name it mine.yaml"),
        ("quickstart", "file/mine.yaml", "cannot copy"),
    ],
)
def test_copies_that_cannot_be_made(tmp_path, recipe, target, said):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=re.escape(said)):
        copy_recipe(recipe, Path(target))


def test_cp_into_a_folder(tmp_path):
    assert copy_recipe("quickstart", tmp_path) == tmp_path / "quickstart.yaml"


@pytest.mark.parametrize(
    ("base", "target", "written"),
    [
        ("./base.yaml", "deep/er/copy.yaml", "../../mine/base.yaml"),
        ("base.yaml  # why", "copy.yaml", "mine/base.yaml  # why"),
        ("'../up.yaml'", "copy.yaml", "up.yaml"),
        ("quickstart", "copy.yaml", "quickstart"),
        (str(RECIPES_DIR / "quickstart.yaml"), "copy.yaml", str(RECIPES_DIR / "quickstart.yaml")),
        (os.path.relpath(RECIPES_DIR / "quickstart.yaml", "/x/mine"), "copy.yaml", None),
    ],
)
def test_a_copy_extends_what_the_original_does(tmp_path, base, target, written):
    (tmp_path / "mine").mkdir()
    for file in ("mine/base.yaml", "up.yaml"):
        (tmp_path / file).write_text(MINIMAL)
    if written is None:
        base, written = os.path.relpath(RECIPES_DIR / "quickstart.yaml", tmp_path / "mine"), "quickstart"
    text = "# comment\nextends: {}\nseed: 3  # seed\n"
    (tmp_path / "mine" / "child.yaml").write_text(text.format(base))
    copy = copy_recipe("mine/child.yaml", Path(target))
    assert copy.read_text() == text.format(written)
    original = load_recipe("mine/child.yaml", ["output_dir=x"]).model_dump(exclude={"name"})
    assert load_recipe(target, ["output_dir=x"]).model_dump(exclude={"name"}) == original


# schema


def test_schema_prints_one_line_a_key_into_a_pipe():
    done = speft("schema")
    assert done.returncode == 0
    assert "mask.density (number > 0 and <= 1, or null; default 0.005): the fraction" in done.stdout
    assert "data.columns.prompt (text; default prompt): " in done.stdout
    assert "data.mixture[].path (path; required): " in done.stdout
    assert speft("schema", "mask").stdout.startswith("mask.salience (gradient | magnitude | ")


def test_schema_explains_a_key():
    explained = speft("schema", "mask.schedule").stdout
    assert "choices  static  (the default)\n" in explained
    assert "grad_topk  (takes mask.topk_fraction)\n" in explained
    assert "mask.schedule=drop_grow needs mask.granularity=element: it drops" in explained
    explained = speft("schema", "mask.drop_rate").stdout
    assert "number > 0 and < 1" in explained and "only with mask.schedule=drop_grow" in explained


def test_json_schema_is_for_files():
    schema = json.loads(speft("schema", "--json").stdout)
    assert "name" not in schema["properties"] and "extends" in schema["properties"]
    assert set(Recipe.model_fields) - {"name"} < set(schema["properties"])
    assert "required" not in schema and schema["additionalProperties"] is False


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
    calls = called("commands.compare_masks", compare=None)
    assert run(monkeypatch, "compare-masks", "a", "b/mask.safetensors", "--output", "c.png") == 0
    assert run(monkeypatch, "compare-masks", "a", "b", "c") == 0
    assert calls[0] == ("compare", [Path("a"), Path("b/mask.safetensors")], Path("c.png"))
    assert calls[1] == ("compare", [Path("a"), Path("b"), Path("c")], None)


def test_validate_exits_as_the_checks_say(monkeypatch, called):
    calls = called("commands.validate", validate=2)
    assert run(monkeypatch, "validate", "quickstart", "seed=1", "--ranks", "3") == 2
    assert run(monkeypatch, "validate", "quickstrat") == 2
    assert calls == [("validate", "quickstart", ["seed=1"], 3), ("validate", "quickstrat", [], None)]


def test_plan_hands_over_recipe_and_machine(monkeypatch, called):
    calls = called("plan.plan", make_plan="the plan", print_plan=None)
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
    calls = called("doctor", examine=["a check"], print_report=None, exit_code=1)
    assert run(monkeypatch, "doctor") == 1
    assert calls == [("examine",), ("print_report", ["a check"]), ("exit_code", ["a check"])]


def test_data_hands_over_recipe_and_picture(monkeypatch, called):
    calls = called("commands.data", show_data=None)
    assert run(monkeypatch, "data", "quickstart", "seed=1", "--output", "a.png") == 0
    assert calls == [("show_data", load_recipe("quickstart", ["seed=1"]), Path("a.png"))]


# How commands fail


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "quickstrat"], "did you mean quickstart?"),
        (["show", "quickstart", "mask.desnity=1", "seed=x"], "2 problems"),
        (["cp", "quickstrat", "mine.yaml"], "did you mean quickstart?"),
        (["schema", "mask.desnity"], "did you mean mask.density?"),
        (["schema", "density"], "did you mean mask.density?"),
        (["schema", "mask.zz"], "speft schema mask lists what there is"),
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

    monkeypatch.setattr(cli, "print_list", interrupted)
    assert run(monkeypatch, "ls") == 130
    assert capsys.readouterr() == ("", "")


# Help, and the examples in it and in the README


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command):
    done = speft(command, "--help")
    assert done.returncode == 0 and done.stderr == ""
    examples = examples_of(COMMANDS[command].epilog)
    assert len(examples) >= 2 and all(example in done.stdout for example in examples)
    assert all(parameter.help for parameter in COMMANDS[command].params)


def examples_of(text):
    """Commands in a text, without what follows them on their lines."""
    pattern = re.compile(r"^ *((?:[A-Z_]+=\S+ )*(?:speft|deepspeed) .*)$", re.MULTILINE)
    lines = pattern.findall((text or "").replace("\\\n", " "))
    return [re.split(r" # | > |   ", line)[0].rstrip() for line in lines]


def shell_blocks(markdown):
    return "\n".join(re.findall(r"```bash\n(.*?)```", markdown, re.DOTALL))


HELP_TEXTS = [command.epilog for command in COMMANDS.values()]
SCRIPTS = [(ROOT / "launch" / f"{job}.py").read_text() for job in ("train", "score")]
PAGES = [shell_blocks((ROOT / page).read_text()) for page in ("README.md", "recipes/README.md")]
EXAMPLES = [line for text in [*HELP_TEXTS, *SCRIPTS, *PAGES, entry.MORE_HELP] for line in examples_of(text)]


@pytest.mark.parametrize("example", dict.fromkeys(EXAMPLES))
def test_examples_parse(example, monkeypatch):
    """The command and its options exist; its recipe loads with its overrides."""
    words = [word for word in shlex.split(example) if not re.match(r"[A-Z_]+=", word)]
    if words[0] == "deepspeed":
        start = next(i for i, word in enumerate(words) if word.startswith("launch/"))
        assert (ROOT / words[start]).is_file()
        monkeypatch.setattr(sys, "argv", words[start:])
        arguments = entry.parse_arguments("")
        load_recipe(arguments.recipe, arguments.overrides)
        return
    if len(words) > 1 and words[1].startswith("--"):
        assert words[1] in ("--install-completion", "--show-completion", "--help")
        return
    given = COMMANDS[words[1]].make_context(words[1], words[2:]).params
    if words[1] == "quickstart":
        given["recipe"] = "quickstart"
    if recipe := given.get("recipe"):
        load_recipe(recipe, given.get("overrides") or [])


def test_there_are_examples():
    assert len(EXAMPLES) > 30
