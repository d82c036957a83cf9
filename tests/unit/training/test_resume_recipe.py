"""Whether the recipe is still that of the run: every key, and what to type where it is not."""

import copy
import json
import shlex
from pathlib import Path

import pytest

from speft_ds.config.load_recipe import load_recipe
from speft_ds.config.recipe import FIELDS
from speft_ds.errors import UserError
from speft_ds.training.checkpoint.resume import NEEDS_FLAG, SAFE_TO_CHANGE, check_unchanged, fit_micro_batch
from unit.written import load

pytestmark = pytest.mark.usefixtures("own_folder")
WHERE = Path("runs/mine/checkpoints/step_000010")
OTHERS = sorted(FIELDS.keys() - SAFE_TO_CHANGE - NEEDS_FLAG)


def recorded(recipe):
    """As a manifest has it."""
    return json.loads(json.dumps(recipe.model_dump(mode="json", exclude={"name"})))


def with_value(nested, key, *value):
    """The recorded recipe with another value of a key; without one, that of a version that lacked the key."""
    nested = copy.deepcopy(nested)
    *sections, leaf = key.split(".")
    inner = nested
    for section in sections:
        inner = inner[section]
    del inner[leaf]
    if value:
        (inner[leaf],) = value
    return nested


def refusal(before, now, *allowed):
    with pytest.raises(UserError) as caught:
        check_unchanged(before, now, allowed, WHERE)
    return caught.value


def test_the_same_recipe_is_unchanged(tmp_path, capsys):
    recipe = load(tmp_path, "mask: {targets: [q_proj]}", "optimizer.lr=3e-4", "data.select_rows=null")
    check_unchanged(recorded(recipe), recipe, (), WHERE)
    assert capsys.readouterr().out == ""


def test_every_key_is_of_one_kind():
    assert not SAFE_TO_CHANGE & NEEDS_FLAG and FIELDS.keys() >= SAFE_TO_CHANGE | NEEDS_FLAG
    # What learning depends on needs another run.
    for key in ("seed", "model.dtype", "train.global_batch", "train.steps", "optimizer.lr", "mask.density"):
        assert key in OTHERS
    assert not [key for key in OTHERS if key.startswith("eval.")]


@pytest.mark.parametrize("key", sorted(SAFE_TO_CHANGE - {"output_dir"}))
def test_a_free_key_may_change_and_is_noted(tmp_path, capsys, key):
    now = load(tmp_path)
    check_unchanged(with_value(recorded(now), key, "before"), now, (), WHERE)
    out = capsys.readouterr().out
    assert out.startswith(f'note: resuming with another {key}: "before" in the run, ') and "now" in out


def test_another_run_folder_goes_without_saying(tmp_path, capsys):
    now = load(tmp_path)
    check_unchanged(with_value(recorded(now), "output_dir", "elsewhere"), now, (), WHERE)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("key", sorted(NEEDS_FLAG))
def test_a_harmless_key_changes_only_with_consent(tmp_path, capsys, key):
    now = load(tmp_path)
    before = with_value(recorded(now), key, "before")
    for allowed in ((), ("model.dtype=float32",), (f"{key}s=1",)):
        error = refusal(before, now, *allowed)
        words = shlex.split(error.fix)
        assert words[words.index("--resume-with") + 1].startswith(f"{key}=") and error.where == str(WHERE)
    check_unchanged(before, now, (f"{key}=as it is now",), WHERE)
    assert f"another {key}: " in capsys.readouterr().out


@pytest.mark.parametrize("key", OTHERS)
def test_any_other_key_is_refused_even_with_consent(tmp_path, key):
    now = load(tmp_path, "", "data.date=2026-01-31")  # null keeps what is recorded
    before = with_value(recorded(now), key, "before")
    for allowed in ((), (f"{key}=as it is now",)):
        error = refusal(before, now, *allowed)
        assert error.what.startswith("the recipe is not that of the run any more: 1 key(s) differ\n")
        assert f'\n    {key}: "before" in the run, ' in error.what
        assert "--resume-with" not in error.fix and "another output_dir" in error.fix


def test_all_changes_are_listed_at_once(tmp_path):
    before = recorded(load(tmp_path))
    now = load(tmp_path, "", "seed=7", "optimizer.lr=0.5", "data.path=b.jsonl", "train.keep_last=9")
    error = refusal(before, now)
    assert error.what.splitlines()[0].endswith("3 key(s) differ")
    assert error.what.splitlines()[1:] == [
        '    data.path: "rows.jsonl" in the run, "b.jsonl" now',
        "    optimizer.lr: 0.001 in the run, 0.5 now",
        f"    seed: {before['seed']} in the run, 7 now",
    ]
    assert "--resume-with" not in error.fix  # consent would not be enough


def test_what_consent_was_given_to_is_not_listed(tmp_path):
    before = recorded(load(tmp_path))
    now = load(tmp_path, "", "seed=7", "data.path=b.jsonl")
    assert "data.path" not in refusal(before, now, "data.path=b.jsonl").what


CHANGES = {
    "numbers": ["optimizer.lr=3e-05", "seed=7", "optimizer.eps=1e-12"],
    "nothing": ["optimizer.clip_norm=null", "eval.before=false"],
    "a list": ["optimizer.betas=[0.5, 0.25]"],
    "names with signs": ["mask.targets=['*v_proj', \"q proj\"]"],
    "a path with a space": ["data.path=my rows.jsonl"],
    "a path with a quote": ['data.path="it\'s.jsonl"'],
    "a path like a number": ["data.path='17'"],
    "a path with a dollar": ["data.path=$HOME.jsonl"],
    "a list of mappings": ["data.mixture=[{path: a.jsonl, weight: 2}, {path: b.jsonl, weight: 1.5}]"],
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_an_error_says_to_type_is_the_recipe_of_the_run(tmp_path, name):
    """Those who type it have the run's recipe again."""
    was, now = load(tmp_path, "", *CHANGES[name]), load(tmp_path)
    fix = refusal(recorded(was), now).fix
    back = shlex.split(fix.removeprefix("as it was: ").partition("; ")[0])
    assert recorded(load_recipe("mine.yaml", back)) == recorded(was)
    assert "$HOME" not in fix or "'" in fix or "\\$" in fix  # not for the shell to expand


@pytest.mark.parametrize(
    "change", ["data.path=my rows.jsonl", "eval.tasks=[a, b]", "data.path='17'", "eval.limit=5"]
)
def test_what_an_error_says_to_consent_with_is_the_recipe_of_now(tmp_path, change):
    before, now = recorded(load(tmp_path)), load(tmp_path, "", change)
    words = shlex.split(refusal(before, now).fix.partition("if that is meant: ")[2])
    assert words[0] == "--resume-with" and len(words) == 2
    again = load_recipe("mine.yaml", words[1:])
    assert recorded(again) == recorded(now)
    check_unchanged(before, again, words[1:], WHERE)


# Recipes of other versions


@pytest.mark.parametrize("key", ["train.max_nonfinite", "optimizer.warmup_steps", "mask.layer_gate"])
def test_a_key_that_an_older_version_did_not_have_was_its_default(tmp_path, key):
    """`resume` reads the run's own recipe.yaml, which lacks it, too: nothing that is typed would help."""
    recipe = load(tmp_path)
    check_unchanged(with_value(recorded(recipe), key), recipe, (), WHERE)


def test_a_key_that_an_older_version_did_not_have_may_not_be_used(tmp_path):
    now = load(tmp_path, "train: {steps: 9}", "optimizer.warmup_steps=3")
    error = refusal(with_value(recorded(now), "optimizer.warmup_steps"), now)
    assert "\n    optimizer.warmup_steps: 0 in the run, 3 now" in error.what
    assert "as it was: optimizer.warmup_steps=0" in error.fix


def test_a_key_that_this_version_does_not_have_does_not_matter(tmp_path):
    recipe = load(tmp_path)
    check_unchanged(recorded(recipe) | {"later": {"key": 1}}, recipe, (), WHERE)


# The micro-batch of another number of ranks


def test_another_micro_batch_is_noted_and_is_no_change_of_the_recipe(tmp_path, capsys):
    recipe = load(tmp_path, "", "train.global_batch=16", "train.micro_batch=4")
    fitted = fit_micro_batch(recipe, 8)
    assert capsys.readouterr().out == "note: for 8 rank(s) train.micro_batch=2 (it was 4)\n"
    check_unchanged(recorded(recipe), fitted, (), WHERE)
    assert fitted.where("train.micro_batch") == recipe.where("train.micro_batch")
    capsys.readouterr()
    assert fit_micro_batch(recipe, 4) is recipe and capsys.readouterr().out == ""
