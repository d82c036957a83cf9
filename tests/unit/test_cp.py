"""`speft cp`: copies of recipes, and what they extend."""

import os
import re
from pathlib import Path

import pytest

from speft_ds.cli.commands.copy_recipe import copy_recipe
from speft_ds.config.load_recipe import RECIPES_DIR, load_recipe
from speft_ds.errors import UserError
from unit.commands import run, speft
from unit.written import MINIMAL

pytestmark = pytest.mark.usefixtures("own_folder")


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
