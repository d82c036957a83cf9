"""The recipes that come with the repository: what they say, what they need."""

import json
import re
from pathlib import Path

import pytest

from speft_ds.config.load_recipe import RECIPES_DIR, list_recipes, load_recipe
from speft_ds.data.dataset_cache import DatasetSpec
from speft_ds.data.formats import Classes, make_example
from speft_ds.data.sources import is_hub_dataset, iterate_rows
from speft_ds.jobs.preflight import check_inputs
from unit.written import problems_of

RECIPES = list_recipes()
# data set -> a row as it stands there, and the prompt that its recipe makes of it
ROWS = {
    "tatsu-lab/alpaca": (
        {"instruction": "Add.", "input": "1, 2", "output": "3", "text": "..."},
        {
            True: "Add.\n\n1, 2",
            False: "Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n",
        },
    ),
    "meta-math/MetaMathQA": (
        {"query": "1 + 2?", "response": "3", "type": "GSM_Rephrased", "original_question": "1 + 2"},
        {False: "Question: 1 + 2?\nAnswer:"},
    ),
    "openai/gsm8k": ({"question": "1 + 2?", "answer": "3"}, {True: "1 + 2?"}),
    "nyu-mll/glue": ({"sentence": "a fine film ", "label": 1, "idx": 0}, {False: "a fine film "}),
    "train.jsonl": ({"prompt": "1 + 2?", "response": "3"}, {True: "1 + 2?"}),
}


@pytest.fixture(autouse=True)
def _nothing_at_hand(tmp_path, monkeypatch):
    """No model and no data on this machine, no network, and a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)


def comments_of(name):
    """The lines of comment that a recipe begins with."""
    lines = (RECIPES_DIR / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]


def ranks_of(name):
    """How many ranks a recipe is made for, as its second line says."""
    return int(re.match(r"# Needs (\d+) (GPUs?|CPU ranks)\b", comments_of(name)[1]).group(1))


def data_set(recipe):
    return recipe.data.path if is_hub_dataset(recipe.data.path) else Path(recipe.data.path).name


@pytest.fixture
def local(tmp_path):
    """A recipe whose model folder, rows and tasks are there; a row has the columns of its data set."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_text("")
    (tmp_path / "cache" / "speft_ds" / "quickstart" / "tasks").mkdir(parents=True)

    def make(name):
        row = ROWS[data_set(load_recipe(name))][0]
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        return load_recipe(name, ["model.name_or_path=./model", "data.path=rows.jsonl", "data.subset=null"])

    return make


# What they say


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_begins_with_what_it_is_for_and_what_it_needs(name):
    purpose, needs = comments_of(name)  # two lines, no more
    assert purpose.startswith("# ") and len(purpose) <= 100 and purpose.endswith(".")
    assert len(needs) <= 120 and needs.endswith(".") and ranks_of(name) >= 1
    recipe = load_recipe(name)
    chosen = (recipe.deepspeed.config, recipe.model.dtype)
    assert chosen == (("zero3_cpu", "auto") if "CPU ranks" in needs else ("zero3_bf16", "bfloat16"))


def test_the_table_names_every_recipe_with_its_model_and_density():
    text = (RECIPES_DIR / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| `.*$", text, re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert sorted(row[0].strip("`") for row in rows) == RECIPES
    for row in rows:
        assert len(row) == 6 and all(row)  # recipe, model, data, density, needs, measured
        recipe = load_recipe(row[0].strip("`"))
        mask = recipe.mask
        density = f"{mask.num_trainable:,} entries" if mask.density is None else f"{mask.density:.1%}"
        if not recipe.method.has_mask:
            density = f"{recipe.method.name}, rank {recipe.method.rank}"
        assert row[1] == Path(recipe.model.name_or_path).name and row[3] == density
        number = ranks_of(recipe.name)
        assert re.match(rf"{number} (GPU|CPU rank){'s' * (number > 1)}\b", row[4])


def test_paper_counts_are_what_lora_of_rank_16_has():
    def lora(hidden, heads, keys, mlp, layers):
        attention = 2 * (hidden + heads) + 2 * (hidden + keys)  # query and output, key and value
        return 16 * layers * (attention + 3 * (hidden + mlp))

    assert load_recipe("qwen2_7b_metamath").mask.num_trainable == lora(3584, 3584, 512, 18944, 28)
    assert load_recipe("gemma2_2b_metamath").mask.num_trainable == lora(2304, 2048, 1024, 9216, 26)


@pytest.mark.parametrize("name", RECIPES)
def test_the_warm_up_is_a_tenth_of_the_steps_or_less(name):
    rows = {"tatsu-lab/alpaca": 52_000 // 4, "meta-math/MetaMathQA": 100_000, "nyu-mll/glue": 67_349}
    recipe = load_recipe(name)
    train = recipe.train
    steps = train.steps or rows[recipe.data.path] * train.epochs / train.global_batch  # Alpaca: packs
    assert 0.02 <= recipe.optimizer.warmup_steps / steps <= 0.1


# What they need


@pytest.mark.parametrize("name", RECIPES)
def test_offline_a_recipe_names_what_is_missing_and_how_to_get_it(name):
    recipe = load_recipe(name)
    named = {"model.name_or_path": recipe.model.name_or_path, "data.path": recipe.data.path}
    named |= {"eval.include_path": recipe.eval.include_path} if recipe.eval.include_path else {}
    problems = {
        re.search(r"\((.*)\)$", problem.where)[1]: problem for problem in problems_of(recipe, ranks_of(name))
    }
    assert problems.keys() == named.keys()
    for key, path in named.items():
        assert re.match(rf"{RECIPES_DIR}/\w+\.yaml:\d+ ", problems[key].where) and path in problems[key].what
        kind = "--repo-type dataset " if key == "data.path" else ""
        way = f"hf download {kind}{path}" if is_hub_dataset(path) else "speft quickstart --prepare-only"
        assert way in problems[key].fix


@pytest.mark.parametrize("name", RECIPES)
def test_with_local_files_a_recipe_is_ready_for_its_ranks(local, name):
    check_inputs(local(name), "train", ranks_of(name))


@pytest.mark.parametrize("name", RECIPES)
def test_rows_become_the_prompt_that_is_meant(local, name):
    recipe = local(name)
    (source,) = recipe.data.sources
    (where, row), *_ = iterate_rows(source)
    classes = Classes.named(recipe.data.labels) if recipe.data.labels else None
    classify = recipe.model.task == "sequence_classification"
    example = make_example(row, where, source, classes, classify)
    prompts = ROWS[data_set(load_recipe(name))][1]
    assert example.turns[0]["content"] == prompts[source.chat_template]
    assert example.is_chat == source.chat_template
    assert example.label == 1 if classify else example.turns[1]["content"] == "3"
    assert DatasetSpec(recipe.data, recipe.model.name_or_path, classify, recipe.seed).path()


def test_rows_without_a_response_are_left_out_where_the_data_set_has_some():
    dropping = {name for name in RECIPES if load_recipe(name).data.empty_rows == "drop"}
    assert dropping == {name for name in RECIPES if "_alpaca" in name}
