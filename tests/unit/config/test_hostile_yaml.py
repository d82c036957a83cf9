"""YAML and `key=value` from strangers, a thousand of a kind: read or refused within the limits."""

import random
from pathlib import Path

import pytest
import yaml

from speft_ds.config import limited_yaml
from speft_ds.config.load_recipe import _read_overrides, load_recipe, resolved_yaml
from speft_ds.report.run import read_run
from unit.hostile import (
    NUM_HOSTILE,
    mangled,
    no_hang,
    only_opens,
    refusal,
)

pytestmark = pytest.mark.usefixtures("own_folder")


# YAML

RECIPE = """\
# of a test
model: {name_or_path: owner/name, dtype: float32}
data: &data
  path: rows.jsonl
  labels: null
mask:
  density: 0.01
  layers: [0, 1]
optimizer: {lr: 1.0e-3}
train: {steps: 10, global_batch: 8}
eval:
  tasks: [arc_easy, "b"]
seed: 3
"""
PIECES = [
    *(
        "*data",
        "&data ",
        "&a [*a]",
        "*a",
        "<<: *data",
        "{<<: *data}",
        "&a ",
        "- ",
        "? ",
        ": ",
        "\n",
        "\t",
        "#",
    ),
    *(
        "!!python/object/apply:os.system ['touch hacked']",
        "!!binary eA==",
        "!!set {a}",
        "!!timestamp 1",
        "!!int x",
    ),
    *(
        "!!float ''",
        "!x ",
        "!!str 3",
        "!!omap [a: 1]",
        "!!pairs [a: 1]",
        "!function utils.x",
        "%YAML 9.9\n",
        "---\n",
    ),
    *(
        "[" * 60,
        "{a: " * 60,
        "[" * 5000,
        "- " * 5000,
        "'" * 3,
        '"',
        "|\n",
        ">\n",
        "`",
        "@",
        "\0",
        "\x1b[2J",
        "\ud7ff",
    ),
    *(
        "1:" * 200 + "1",
        "0x" + "f" * 5000,
        "9" * 5000,
        "1e999",
        ".nan",
        "-.inf",
        "~",
        "0o8",
        "0b2",
        "=",
        "<<",
        "1_0",
    ),
    *(
        '"\\ud800"',
        '"\\x1b[31m"',
        "2026-01-31",
        "{[a]: b}",
        "? [a]\n: b",
        "{1: 2}",
        "{null: 1}",
        "extends: ./x.yaml\n",
    ),
    "extends: ../../../etc/passwd\n",
    "model: ",
    "seed: ",
    "output_dir: ",
    "name: x\n",
    "x" * 3000,
    "👩‍🔬",
    "".join(f"k{n}: &k{n} [{', '.join([f'*k{n - 1}'] * 9) if n else '1'}]\n" for n in range(12)),
    "".join(f"k{n}: &k{n} [{f'*k{n - 1}' if n else '1'}]\n" for n in range(200)),
]


def test_yaml_of_recipes(tmp_path):
    """Loaded to a recipe that loads again, or all its problems; of a file that extends it, too."""
    chance, num_loaded = random.Random(2), 0
    Path("theirs.yaml").write_text("extends: ./mine.yaml\nseed: 4\n")
    for number in range(NUM_HOSTILE):
        text = RECIPE if number == 0 else mangled(RECIPE, chance, PIECES)
        Path("mine.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
        with no_hang(), only_opens(tmp_path):
            error = refusal(lambda: load_recipe("mine.yaml"))
            if number % 5 == 0:
                refusal(lambda: load_recipe("theirs.yaml"))
        assert number or error is None
        if error is None:
            num_loaded += 1
            recipe = load_recipe("mine.yaml")
            Path("again.yaml").write_text(resolved_yaml(recipe))
            again = load_recipe("again.yaml")
            assert resolved_yaml(again) == resolved_yaml(recipe)
    assert 1 < num_loaded < NUM_HOSTILE
    assert not Path("hacked").exists()


def test_key_value_of_the_command_line():
    chance, texts, num_refused = random.Random(3), [], 0
    for _ in range(NUM_HOSTILE):
        texts.append(f"mask.density={mangled('0.1', chance, PIECES)}")
        with no_hang():
            problems = _read_overrides(texts[-1:]).problems
        assert all(str(problem).encode() and problem.fix for problem in problems)
        num_refused += bool(problems)
    assert 0 < num_refused < NUM_HOSTILE
    for text in texts[::20]:
        with no_hang():
            refusal(lambda text=text: load_recipe("quickstart", [text]))


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]",
        "a: &a {b: *a}",
        "a: &a [1]\nb: &a [*a]",
        "[" * 51 + "]" * 51,
        "- " * 60 + "x",
        PIECES[-1],
        PIECES[-2],
        "a: !!python/name:os.system",
        "a: !x 1",
        "a: 0x" + "f" * 200,
        "a: " + "1:" * 100 + "1",
        "x: 1\n" * 20_000,
        "# " + "x" * limited_yaml.MAX_BYTES,
    ],
)
def test_limits_of_yaml(tmp_path, text):
    """Of a recipe, of the recipe.yaml of a run, and of what is copied."""
    Path("mine.yaml").write_text(text)
    with no_hang():
        error = refusal(lambda: load_recipe("mine.yaml"))
        assert error is not None and "mine.yaml" in error.problems[0].where
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(text)
    with no_hang():
        assert any("recipe.yaml" in problem for problem in read_run(run).problems)


def test_aliases_and_merges_within_the_limits():
    text = "a: &a {x: 1, y: [2]}\nb: *a\nc: {<<: *a, x: 3}\nd: &s 4\ne: [*s, *s]\n"
    assert limited_yaml.load(text) == yaml.safe_load(text)
    assert limited_yaml.load("a: 2026-01-31\nb: !!str 5") == {"a": "2026-01-31", "b": "5"}
    assert limited_yaml.load("") is None
    nested = "[" * 49 + "]" * 49
    assert limited_yaml.load(nested) == yaml.safe_load(nested)
