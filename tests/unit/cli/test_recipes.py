"""`speft ls`, `speft show` and `speft cp`."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml

from speft_ds.cli.commands import recipes
from speft_ds.cli.commands.recipes import about, annotated_yaml, cp
from speft_ds.config.load_recipe import RECIPES_DIR, list_recipes, load_recipe, resolved_yaml
from speft_ds.errors import UserError
from unit.commands import run, speft
from unit.written import MINIMAL, load

pytestmark = pytest.mark.usefixtures("own_folder")


# ls


@pytest.mark.parametrize("width", [80, 200])
def test_ls_lists_every_recipe(width):
    done = speft("ls", COLUMNS=str(width))
    assert done.returncode == 0
    words = " ".join(done.stdout.split())
    assert all(name in words for name in list_recipes())
    assert "SmolLM2-135M-Instruct" in words and "0.500%" in words and "quickstart/train.jsonl" in words
    assert all(len(line) <= width for line in done.stdout.splitlines())
    assert "…" not in words  # nothing is cut


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (
            f"# Good\n# Needs 2.5 GPUs; more\n{MINIMAL}mask: {{num_trainable: 7000}}\n",
            ["Good", "name on rows.jsonl; 7,000 weights", "needs 2.5 GPUs"],
        ),
        (MINIMAL, ["name on rows.jsonl"]),
        ("# What\n# Needs [1] GPU. More.\nseed: [red]\n", ["What", "does not load", "needs [1] GPU"]),
    ],
)
def test_what_ls_says_of_a_recipe(tmp_path, monkeypatch, text, lines):
    (tmp_path / "mine.yaml").write_text(text)
    for module in ("config.load_recipe", "cli.commands.recipes"):
        monkeypatch.setattr(f"speft_ds.{module}.RECIPES_DIR", tmp_path)
    said = about("mine").plain.splitlines()
    assert len(said) == len(lines) and all(map(str.startswith, said, lines))


# show


@pytest.mark.parametrize("option", [[], ["--plain"]])
def test_show_prints_the_resolved_recipe(option):
    overrides = ["mask.density=0.01", "mask.targets=[a, b]"]
    done = speft("show", "quickstart", *overrides, *option)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout) == yaml.safe_load(resolved_yaml(load_recipe("quickstart", overrides)))
    assert ("#" in done.stdout) == (not option)


def test_show_says_where_values_come_from(tmp_path):
    (tmp_path / "base.yaml").write_text(MINIMAL + "seed: 3\noptimizer: {lr: 1e-4}\n")
    (tmp_path / "mine.yaml").write_text("extends: ./base.yaml\nseed: 4\n")
    text = annotated_yaml(load_recipe("mine.yaml", ["mask.num_trainable=5"]))
    found = dict(re.findall(r"^ *(\w+): .*  # (.*)$", text, re.MULTILINE))
    assert found["name_or_path"] == "base.yaml:2" and found["lr"] == "base.yaml:6"
    assert found["seed"] == "mine.yaml:2" and found["num_trainable"] == "command line"
    assert found["density"] == "not used: another key takes its place"
    assert found["output_dir"] == found["epochs"] == "default"
    assert len({line.index("  # ") for line in text.splitlines() if "  # " in line}) == 1  # aligned


LONG = "a {prompt}\n\n# no comment: 'x' \"y\" \\ é\u2028 " + "z" * 200
MIXTURE = "{path: a.jsonl, weight: 2, columns: {prompt: q, input: null}}, {path: b.jsonl, weight: 1}"


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("", []),
        (
            f"mask: {{targets: [{json.dumps(LONG)}, 'null', '1e3', '~', '- a']}}\noptimizer: {{eps: 1e-12}}",
            [],
        ),
        ("output_dir: 'a: b #c'\nmask: {layers: [0, 3]}", []),
        ("", ["data.path=null", f"data.mixture=[{MIXTURE}]"]),
    ],
)
def test_annotated_recipes_load_again_as_the_same(tmp_path, text, overrides):
    recipe = load(tmp_path, text, *overrides)
    written = annotated_yaml(recipe)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "mine.yaml").write_text(written)
    assert load_recipe("again/mine.yaml").model_dump() == recipe.model_dump()
    assert all(re.match(r" *\w+:( |$)", line) for line in written.splitlines())  # each value has one line


@pytest.mark.parametrize(
    "value",
    ["a\n\U0001f44d\x1b", "\u202e", "\U000e0001: #\n", ["a\u2028", 1.5, None], {"k\x85": True}, "\x7f'\"\\"],
)
def test_values_on_one_line_are_printable(value):
    written = recipes.in_line(value)
    assert written.isprintable() and yaml.safe_load(written) == value


# cp


def test_cp_copies_with_comments_and_says_what_next(tmp_path):
    done = speft("cp", "smollm2_135m_alpaca", "new folder/mine.yaml")
    assert done.returncode == 0, done.stderr
    new = tmp_path / "new folder" / "mine.yaml"
    assert new.read_text() == (RECIPES_DIR / "smollm2_135m_alpaca.yaml").read_text()
    for next_one in ("edit ", "speft validate ", "speft train "):
        assert f"{next_one}'new folder/mine.yaml'" in done.stdout


@pytest.mark.parametrize("name", list_recipes())
def test_a_copy_has_all_but_tasks_that_score_the_data_of_the_original(tmp_path, name):
    cp(name, tmp_path / "mine.yaml")
    original, copy = (load_recipe(path, ["output_dir=x"]) for path in (name, "mine.yaml"))
    both = [recipe.model_dump(exclude={"name"}) for recipe in (original, copy)]
    own_tasks = original.eval.include_path is not None
    assert own_tasks == (name == "quickstart") and copy.eval.include_path is None
    if own_tasks:
        assert copy.eval == type(copy.eval)() and both[0].pop("eval") != both[1].pop("eval")
        text = (RECIPES_DIR / f"{name}.yaml").read_text()
        assert text.startswith((tmp_path / "mine.yaml").read_text())  # with its comments
    assert both[0] == both[1]


def test_a_copy_of_ones_own_recipe_keeps_its_tasks(tmp_path):
    (tmp_path / "mine.yaml").write_text(MINIMAL + "eval: {include_path: tasks}\n")
    cp("./mine.yaml", tmp_path / "copy.yaml")
    assert (tmp_path / "copy.yaml").read_text() == (tmp_path / "mine.yaml").read_text()


def test_cp_keeps_a_file_that_is_there(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.yaml").write_text("mine")
    assert run(monkeypatch, "cp", "quickstart", "mine.yaml") == 2
    assert "--force" in capsys.readouterr().err and (tmp_path / "mine.yaml").read_text() == "mine"
    assert run(monkeypatch, "cp", "quickstart", "mine.yaml", "--force") == 0
    assert load_recipe("mine.yaml").train.steps == load_recipe("quickstart").train.steps


@pytest.mark.parametrize(
    ("recipe", "target", "said"),
    [
        ("nowhere.yaml", "mine.yaml", "nowhere.yaml"),
        ("quickstart", "mine", "name it mine.yaml"),
        ("quickstart", "file/mine.yaml", "cannot copy"),
    ],
)
def test_copies_that_cannot_be_made(tmp_path, recipe, target, said):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=re.escape(said)):
        cp(recipe, Path(target))


def test_cp_into_a_folder(tmp_path):
    cp("quickstart", tmp_path)
    assert (tmp_path / "quickstart.yaml").is_file()


OURS = RECIPES_DIR / "quickstart.yaml"


@pytest.mark.parametrize(
    ("base", "target", "written"),
    [
        ("./base.yaml", "deep/er/copy.yaml", "../../mine/base.yaml"),
        ("base.yaml  # why", "copy.yaml", "mine/base.yaml  # why"),
        ("'../up.yaml'", "copy.yaml", "up.yaml"),
        ("quickstart", "copy.yaml", "quickstart"),
        (str(OURS), "copy.yaml", str(OURS)),
        ("RELATIVE", "copy.yaml", "quickstart"),
    ],
)
def test_a_copy_extends_what_the_original_does(tmp_path, base, target, written):
    (tmp_path / "mine").mkdir()
    for file in ("mine/base.yaml", "up.yaml"):
        (tmp_path / file).write_text(MINIMAL)
    base = base.replace("RELATIVE", os.path.relpath(OURS, tmp_path / "mine"))
    text = "# comment\nextends: {}\nseed: 3  # seed\n"
    (tmp_path / "mine" / "child.yaml").write_text(text.format(base))
    cp("mine/child.yaml", Path(target))
    assert Path(target).read_text() == text.format(written)
    original = load_recipe("mine/child.yaml", ["output_dir=x"]).model_dump(exclude={"name"})
    assert load_recipe(target, ["output_dir=x"]).model_dump(exclude={"name"}) == original


def test_ctrl_c_ends_quietly(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes, "list_recipes", interrupted)
    assert run(monkeypatch, "ls") == 130
    assert capsys.readouterr() == ("", "")
