"""Checks of model, data, batch, run folder and DeepSpeed configuration before torch is imported."""

import json

import pytest

from speft_ds.ds_config import load_ds_config
from speft_ds.errors import RecipeError, UserError
from speft_ds.preflight import check_inputs, check_output_dir, mask_file
from speft_ds.recipe import DS_CONFIGS_DIR, load_recipe
from speft_ds.schema import NEEDS_DATA
from unit.written import load


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def ready(tmp_path):
    """A recipe whose inputs are all there."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_text("")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n\n' * 3)

    def make(*overrides):
        return load(tmp_path, "", "model.name_or_path=./model", *overrides)

    return make


def problems_of(recipe, world_size=1, needs_training_rows=True):
    with pytest.raises(RecipeError) as caught:
        check_inputs(recipe, world_size, needs_training_rows)
    return str(caught.value)


def test_good_inputs_pass(ready, tmp_path):
    check_inputs(ready(), 2)
    (tmp_path / "rows.json").write_text('[{"prompt": "a", "response": "b"}]')
    check_inputs(ready("data.path=rows.json"), 1)


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "nowhere", "a/b/c"])
def test_a_missing_model_folder(ready, name):
    shown = problems_of(ready(f"model.name_or_path={name}"))
    assert f"no model folder {name}" in shown and "model.name_or_path=/the/right/path" in shown


@pytest.mark.parametrize("xdg", [None, "elsewhere"])
def test_what_the_quickstart_prepares_is_named(ready, tmp_path, monkeypatch, xdg):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if xdg:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / xdg))
    with pytest.raises(RecipeError) as caught:
        check_inputs(load_recipe("quickstart"), 2)
    fixes = [p.fix for p in caught.value.problems]
    assert fixes == ["run `speft quickstart --prepare-only`, which makes it"] * 3


def test_a_model_folder_without_a_config(ready, tmp_path):
    (tmp_path / "model" / "config.json").unlink()
    assert "the model folder ./model has no config.json" in problems_of(ready())


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("rows.txt", "a", ["none of .jsonl, .json, .csv, .parquet"]),
        ("rows.jsonl", None, ["no data file rows.jsonl", "mine.yaml:4 (data.path)"]),
        ("rows.jsonl", "", ["rows.jsonl has no rows"]),
        ("rows.jsonl", "\n \n", ["rows.jsonl has no rows"]),
        ("rows.json", "[]", ["rows.json has no rows"]),
        ("rows.json", "", ["rows.json has no rows"]),
        ("rows.json", '{"prompt": 1}', ["holds a list of objects"]),
        ("rows.json", '{"prompt": 1}\n{"prompt": 1}', ["not JSON", ".jsonl holds one JSON object a line"]),
        ("rows.jsonl", "\n{nope}\n", ["not JSON", "rows.jsonl:2"]),
        ("rows.jsonl", "[1]\n", ["a row is not a JSON object", "rows.jsonl:1"]),
        ("rows.jsonl", b"\xff\xff", ["cannot read the data file"]),
        (
            "rows.jsonl",
            '{"promt": 1, "output": 2}',
            [
                "did you mean data.columns.prompt=promt?",
                "type data.columns.response=COLUMN, one of: promt, output",
            ],
        ),
    ],
)
def test_bad_data_files(ready, tmp_path, name, content, expected):
    (tmp_path / "rows.jsonl").unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    shown = problems_of(ready() if name == "rows.jsonl" else ready(f"data.path={name}"))
    for part in expected:
        assert part in shown


def test_training_rows_are_needed(ready):
    shown = problems_of(ready("data.path=null"))
    assert "1 problem\n" in shown and "data.path is missing" in shown
    assert "command line: data.path=null" in shown and "data.path=/the/right/path" in shown
    shown = problems_of(ready("data.path=null", "mask.salience=random"))
    assert "data.path is missing" in shown


# What the mask is made from


@pytest.mark.parametrize("salience", sorted(NEEDS_DATA))
def test_a_metric_that_needs_data_with_no_data(ready, salience):
    recipe = ready("data.path=null", f"mask.salience={salience}", "model.dtype=float32")
    shown = problems_of(recipe, needs_training_rows=False)
    assert f"mask.salience={salience} needs calibration data" in shown
    assert f"command line: mask.salience={salience}" in shown
    assert "set data.path or mask.calibration_path" in shown
    assert "a metric without data: magnitude, low_magnitude, synflow, random, lift" in shown


@pytest.mark.parametrize("salience", ["magnitude", "low_magnitude", "synflow", "random", "lift"])
def test_a_data_free_metric_is_scored_without_data(ready, salience):
    for data in ("data.path=null", "data.path=nowhere.jsonl"):
        check_inputs(ready(data, f"mask.salience={salience}"), 1, needs_training_rows=False)


def test_scoring_checks_neither_batch_nor_tasks(ready):
    check_inputs(ready("eval.include_path=nowhere"), 3, needs_training_rows=False)
    shown = problems_of(ready("model.name_or_path=./nowhere", "deepspeed.config=x"), 3, False)
    assert "no model folder ./nowhere" in shown and "no DeepSpeed config x" in shown


def test_scoring_checks_the_rows_that_it_reads(ready, tmp_path):
    shown = problems_of(ready("data.path=nowhere.jsonl"), needs_training_rows=False)
    assert "no data file nowhere.jsonl" in shown and "data.path=/the/right/path" in shown
    (tmp_path / "other.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    recipe = ready("data.path=nowhere.jsonl", "mask.calibration_path=other.jsonl")
    check_inputs(recipe, 1, needs_training_rows=False)
    check_inputs(ready("data.path=null", "mask.calibration_path=other.jsonl"), 1, needs_training_rows=False)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "c.txt",
            "a",
            ["none of .jsonl, .json, .csv, .parquet", "command line: mask.calibration_path=c.txt"],
        ),
        ("c.jsonl", None, ["no data file c.jsonl", "type mask.calibration_path=/the/right/path"]),
        ("c.jsonl", "", ["c.jsonl has no rows", "type mask.calibration_path=/the/right/path"]),
        ("c.jsonl", "\n{nope}\n", ["not JSON", "c.jsonl:2"]),
        ("c.jsonl", "[1]\n", ["a row is not a JSON object", "c.jsonl:1"]),
        (
            "c.jsonl",
            '{"promt": 1, "response": 2}',
            ["c.jsonl:1", "no column 'prompt'", "rename this file's (promt, response)"],
        ),
    ],
)
def test_bad_calibration_files(ready, tmp_path, name, content, expected):
    if content is not None:
        (tmp_path / name).write_text(content)
    recipe = ready(f"mask.calibration_path={name}")
    for shown in (problems_of(recipe), problems_of(recipe, needs_training_rows=False)):
        assert "1 problem\n" in shown
        for part in expected:
            assert part in shown
    check_inputs(ready(f"mask.calibration_path={name}", "mask.salience=magnitude"), 1)  # it is not read


def test_columns_of_a_calibration_file_that_stands_alone(ready, tmp_path):
    (tmp_path / "c.jsonl").write_text('{"promt": 1, "response": 2}')
    recipe = ready("data.path=null", "mask.calibration_path=c.jsonl")
    assert "did you mean data.columns.prompt=promt?" in problems_of(recipe, needs_training_rows=False)


@pytest.mark.parametrize("load", ["kept/mask.safetensors", "kept", "kept/"])
def test_a_saved_mask_is_a_file_or_its_folder(ready, tmp_path, load):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "mask.safetensors").write_text("")
    check_inputs(ready(f"mask.load={load}"), 1)
    assert str(mask_file(load)) == "kept/mask.safetensors"


@pytest.mark.parametrize(
    ("load", "what"),
    [
        ("nowhere.safetensors", "no mask file nowhere.safetensors"),
        ("nowhere", "no mask file nowhere"),
        ("rows.jsonl", "the mask file rows.jsonl is not a .safetensors file"),
        ("model", "no mask file model/mask.safetensors"),
    ],
)
def test_bad_mask_files(ready, load, what):
    shown = problems_of(ready(f"mask.load={load}"))
    assert what in shown and f"command line: mask.load={load}" in shown and "`speft score RECIPE`" in shown


def test_a_loaded_mask_needs_no_calibration_rows(ready, tmp_path):
    (tmp_path / "m.safetensors").write_text("")
    missing = ["mask.load=m.safetensors", "mask.calibration_path=nowhere.jsonl"]
    check_inputs(ready(*missing), 1)
    shown = problems_of(ready(*missing, "mask.schedule=periodic"))
    assert "no data file nowhere.jsonl" in shown  # rescoring reads it


def test_a_folder_of_rows(ready, tmp_path):
    (tmp_path / "folder").mkdir()
    assert "the folder folder has no file of rows" in problems_of(ready("data.path=folder"))
    (tmp_path / "folder" / "train.csv").write_text("prompt,response\na,b\n")
    (tmp_path / "folder" / "test.csv").write_text("question,answer\na,b\n")
    check_inputs(ready("data.path=folder"), 1)
    shown = problems_of(ready("data.path=folder", "data.split=test"))
    assert "test.csv:2" in shown and "data.columns.prompt=COLUMN, one of: question, answer" in shown
    shown = problems_of(ready("data.path=folder", "data.split=tset"))
    assert "has no split 'tset'; it has train, test" in shown and "did you mean test?" in shown
    assert "command line: data.path=folder" in shown


def test_a_subset_of_a_folder_is_what_is_checked(ready, tmp_path):
    for name, header in (("cola", "sentence,label"), ("rte", "prompt,response")):
        (tmp_path / "glue" / name).mkdir(parents=True)
        (tmp_path / "glue" / name / "train.csv").write_text(f"{header}\na,b\n")
    check_inputs(ready("data.path=glue", "data.subset=rte"), 1)
    assert "no column 'prompt'" in problems_of(ready("data.path=glue", "data.subset=cola"))
    assert "'nosuch' not found" in problems_of(ready("data.path=glue", "data.subset=nosuch"))


def test_every_source_of_a_mixture_is_checked(ready, tmp_path):
    (tmp_path / "mine2.yaml").write_text(
        "model: {name_or_path: ./model}\n"
        "data:\n  mixture:\n    - path: rows.jsonl\n    - path: nowhere.jsonl\n      weight: 2\n"
        "    - path: rows.jsonl\n      weight: 1\n      format: text\n"
    )
    with pytest.raises(RecipeError, match=r"(?s)a weight to some of its sources only.*mine2.yaml:3"):
        load_recipe("mine2.yaml")
    text = (tmp_path / "mine2.yaml").read_text().replace("- path: rows", "- weight: 3\n      path: rows", 1)
    (tmp_path / "mine2.yaml").write_text(text)
    shown = problems_of(load_recipe("mine2.yaml"))
    assert "no data file nowhere.jsonl\n      where: mine2.yaml:6 (data.mixture[1].path)" in shown
    assert "no column 'text', named by data.columns.text" in shown


@pytest.mark.parametrize("key", ["model.name_or_path", "data.path"])
def test_what_is_on_the_hub_needs_a_cache_or_a_network(ready, tmp_path, monkeypatch, key):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    recipe = ready(f"{key}=owner/name")
    shown = problems_of(recipe)
    assert "owner/name is not in the hub's cache, and cannot be fetched: no answer from http" in shown
    assert f"command line: {key}=owner/name" in shown and "hf download" in shown
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "offline by choice" in problems_of(recipe)
    kind = "models" if key.startswith("model") else "datasets"
    repo = tmp_path / "hf" / "hub" / f"{kind}--owner--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    (repo / "snapshots" / "abc").mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        (repo / "snapshots" / "abc" / file).write_text("{}")
    check_inputs(recipe, 1)


def test_only_the_first_rows_are_read(ready, tmp_path):
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "a", "response": "b"}\n' * 5 + "broken")
    check_inputs(ready(), 1)  # the rest is read, and checked, when it is tokenised


def test_a_batch_that_the_ranks_cannot_share(ready):
    shown = problems_of(ready(), 8)
    assert "train.global_batch=16 is not divisible by train.micro_batch=4 x 8 ranks" in shown
    assert "train.global_batch=32, or train.micro_batch= one of 1, 2" in shown
    shown = problems_of(ready(), 3)
    assert "fix: train.global_batch=12 or 24\n" in shown + "\n"


def test_a_missing_task_folder_and_all_problems_at_once(ready):
    overrides = ["eval.include_path=tasks", "data.path=x.jsonl", "deepspeed.config=z"]
    recipe = ready(*overrides, "model.name_or_path=./x")
    shown = problems_of(recipe, 3)
    assert "5 problems" in shown and "no task folder tasks" in shown
    assert "command line: eval.include_path=tasks" in shown


def test_a_run_folder_that_is_not_empty(ready, tmp_path):
    recipe = ready("output_dir=run")
    check_output_dir(recipe)
    (tmp_path / "run").mkdir()
    check_output_dir(recipe)
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"run is not empty(.|\n)*output_dir=run-2(.|\n)*rm -r run"):
        check_output_dir(recipe)


# DeepSpeed


def test_ds_config_is_merged_with_what_the_recipe_owns(ready):
    config = load_ds_config(ready("train.global_batch=32", "model.dtype=float32"), 2)
    assert config["train_batch_size"] == 32
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 4
    assert config["bf16"] == {"enabled": False}
    assert config["steps_per_print"] >= 10**9
    file = json.loads((DS_CONFIGS_DIR / "zero3_bf16.json").read_text())
    assert config["zero_optimization"] == file["zero_optimization"]
    with pytest.raises(RecipeError, match="not divisible"):
        load_ds_config(ready(), 3)


def test_the_given_configs_differ_in_overlap_alone():
    gpu, cpu = (
        json.loads((DS_CONFIGS_DIR / f"{name}.json").read_text())["zero_optimization"]
        for name in ("zero3_bf16", "zero3_cpu")
    )
    assert (gpu.pop("overlap_comm"), cpu.pop("overlap_comm")) == (True, False)
    assert gpu == cpu and not any(isinstance(value, float) for value in gpu.values())


def test_steps_per_print_may_be_given(ready, tmp_path):
    (tmp_path / "ds.json").write_text('{"steps_per_print": 5, "zero_optimization": {"stage": 3}}')
    assert load_ds_config(ready("deepspeed.config=ds.json"), 1)["steps_per_print"] == 5


OWNED = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch",
    "optimizer": "optimizer.name",
    "scheduler": "optimizer.schedule",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "gradient_clipping": "optimizer.clip_norm",
}


@pytest.mark.parametrize("key", OWNED)
def test_keys_that_recipes_own_are_refused(ready, tmp_path, key):
    (tmp_path / "ds.json").write_text(json.dumps({key: 1, "zero_optimization": {"stage": 3}}))
    with pytest.raises(UserError) as caught:
        load_ds_config(ready("deepspeed.config=ds.json"), 1)
    assert f"the recipe owns {key}" in str(caught.value) and OWNED[key] in str(caught.value)
    assert f"`{key}`" in (DS_CONFIGS_DIR / "README.md").read_text()


@pytest.mark.parametrize(
    ("zero", "what"),
    [
        (None, "only ZeRO stage 3"),
        ({}, "only ZeRO stage 3"),
        ({"stage": 2}, "only ZeRO stage 3"),
        ({"stage": 3, "zero_quantized_weights": True}, "zero_quantized_weights: true is not supported yet"),
        ({"stage": 3, "zero_quantized_nontrainable_weights": True}, "nontrainable_weights: true is not"),
        ({"stage": 3, "zero_hpz_partition_size": 8}, "zero_hpz_partition_size: 8 is not supported yet"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, "offload_param: .* is not supported yet"),
    ],
)
def test_zero_settings_that_are_refused(ready, tmp_path, zero, what):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    with pytest.raises(RecipeError, match=what):
        load_ds_config(ready("deepspeed.config=ds.json"), 1)


def test_zero_settings_that_are_fine(ready, tmp_path):
    zero = {"stage": 3, "zero_hpz_partition_size": 1, "zero_quantized_weights": False}
    zero["offload_param"] = {"device": "cpu"}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    load_ds_config(ready("deepspeed.config=ds.json"), 1)


@pytest.mark.parametrize(
    ("content", "what"), [("{,}", "not readable as JSON"), ("[]", "is one JSON object"), ("\xff", "JSON")]
)
def test_ds_configs_that_cannot_be_read(ready, tmp_path, content, what):
    (tmp_path / "ds.json").write_text(content, encoding="latin-1")
    assert what in problems_of(ready("deepspeed.config=ds.json"))


def test_unknown_ds_configs(ready):
    shown = problems_of(ready("deepspeed.config=zero3_bf61"))
    assert "no DeepSpeed config zero3_bf61" in shown and "did you mean zero3_bf16" in shown
    assert "no DeepSpeed config nowhere.json" in problems_of(ready("deepspeed.config=nowhere.json"))


def test_rows_longer_than_the_model_has_positions(ready, tmp_path):
    (tmp_path / "model" / "config.json").write_text('{"max_position_embeddings": 512}')
    check_inputs(ready("data.max_length=512"), 1)
    shown = problems_of(ready("data.max_length=513"))
    assert "data.max_length=513 is more than the 512 positions of the model" in shown
    (tmp_path / "model" / "config.json").write_text("{")
    assert "config.json" in problems_of(ready())


def test_a_scorer_that_is_not_there(ready):
    shown = problems_of(ready("data.select=ifd", "data.select_rows=1", "data.scorer=/nowhere/small"))
    assert "no model folder /nowhere/small" in shown and "type data.scorer=/the/right/path" in shown
