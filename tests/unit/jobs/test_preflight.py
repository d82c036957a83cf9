"""The checks before torch is imported, as far as each job needs them (one by one: `test_bad_inputs`)."""

from typing import get_args

import pytest

from speft_ds.config.load_recipe import load_recipe
from speft_ds.config.mask_config import ScoredOnRows, ScoredOnWeights, mask_file
from speft_ds.jobs import preflight
from speft_ds.jobs.preflight import check_inputs
from unit.written import problems_of

MISSING = {  # a word that is wrong -> the jobs that look at it
    "model.name_or_path=./nowhere": {"train", "score", "evaluate"},
    "deepspeed.config=nowhere": {"train", "score", "evaluate"},
    "mask.load=nowhere": {"train", "score"},
    "data.path=nowhere.jsonl": {"train", "score"},
    "mask.calibration_path=nowhere.jsonl": {"train", "score"},
    "data.max_length=9999": {"train", "score"},
    "eval.include_path=nowhere": {"train", "evaluate"},
    "eval.data_dir=nowhere": {"train", "evaluate"},
    "eval.validation=nowhere.jsonl": {"train"},
    "train.micro_batch=16": {"train"},
}


@pytest.mark.parametrize("job", ["train", "score", "evaluate"])
@pytest.mark.parametrize("word", MISSING)
def test_a_job_checks_what_it_needs(ready, tmp_path, word, job):
    (tmp_path / "model" / "config.json").write_text('{"max_position_embeddings": 2048}')
    check_inputs(ready(), job, 2)
    if job not in MISSING[word]:
        return check_inputs(ready(word), job, 2)
    (problem,) = problems_of(ready(word), 2, job)
    batch = "train.global_batch (default)"
    assert problem.where == (batch if "batch" in word else f"command line: {word}") and problem.fix


def test_low_rank_needs_peft(ready, monkeypatch):
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    (problem,) = problems_of(ready("method.name=dora"), job="train")
    assert problem.where == "command line: method.name=dora" and "pip install" in problem.fix
    check_inputs(ready("method.name=dora"), "evaluate", 2)


def test_all_problems_at_once(ready):
    words = ["eval.include_path=x", "data.path=x.jsonl", "deepspeed.config=z", "model.name_or_path=./x"]
    assert len(problems_of(ready(*words), 3)) == 5  # and the batch


def test_a_finished_mask_is_not_scored(ready, tmp_path):
    (tmp_path / "m.safetensors").write_text("")
    (problem,) = problems_of(ready("mask.load=m.safetensors"), job="score")
    assert problem.where == "command line: mask.load=m.safetensors" and problem.fix == "mask.load=null"


@pytest.mark.parametrize("xdg", [None, "elsewhere"])
def test_what_the_quickstart_prepares_is_named(ready, tmp_path, monkeypatch, xdg):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if xdg:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / xdg))
    problems = problems_of(load_recipe("quickstart"), 2)
    assert len(problems) == 3 and all("speft quickstart --prepare-only" in p.fix for p in problems)


@pytest.mark.parametrize("key", ["model.name_or_path", "data.path"])
def test_what_is_on_the_hub_needs_a_cache_or_a_network(ready, tmp_path, monkeypatch, key):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    recipe = ready(f"{key}=owner/name")
    (problem,) = problems_of(recipe)
    assert problem.where == f"command line: {key}=owner/name" and "hf download" in problem.fix
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in problems_of(recipe)[0].what
    kind = "models" if key.startswith("model") else "datasets"
    repo = tmp_path / "hf" / "hub" / f"{kind}--owner--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    (repo / "snapshots" / "abc").mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        (repo / "snapshots" / "abc" / file).write_text("{}")
    check_inputs(recipe, "train", 1)


@pytest.mark.parametrize(("ranks", "ways"), [(8, ["32", "1, 2"]), (3, ["12 or 24"])])
def test_a_batch_that_the_ranks_cannot_share(ready, ranks, ways):
    (problem,) = problems_of(ready(), ranks)
    assert all(way in problem.fix for way in ways) and ("micro_batch" in problem.fix) == (ranks == 8)


# The rows that scores are computed from


@pytest.mark.parametrize("salience", get_args(ScoredOnRows))
def test_a_metric_that_needs_data_with_no_data(ready, salience):
    few_bits = ["model.base_format=nf4"] if salience == "quant_error" else []
    recipe = ready("data.path=null", f"mask.salience={salience}", "model.dtype=float32", *few_bits)
    (problem,) = problems_of(recipe, job="score")
    assert problem.where == f"command line: mask.salience={salience}"
    assert all(way in problem.fix for way in ("mask.calibration_path", *get_args(ScoredOnWeights)))


@pytest.mark.parametrize("salience", get_args(ScoredOnWeights))
def test_a_data_free_metric_is_scored_without_data(ready, salience):
    for data in ("data.path=null", "data.path=nowhere.jsonl"):
        check_inputs(ready(data, f"mask.salience={salience}"), "score", 1)


def test_scoring_checks_the_rows_that_it_reads(ready, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    for data in ("data.path=null", "data.path=nowhere.jsonl"):
        check_inputs(ready(data, "mask.calibration_path=other.jsonl"), "score", 1)
    check_inputs(ready("mask.calibration_path=nowhere.jsonl", "mask.salience=magnitude"), "train", 1)


def test_columns_of_a_calibration_file_that_stands_alone(ready, tmp_path):
    (tmp_path / "c.jsonl").write_text('{"promt": 1, "response": 2}')
    (problem,) = problems_of(ready("data.path=null", "mask.calibration_path=c.jsonl"), job="score")
    assert "data.columns.prompt=promt" in problem.fix


@pytest.mark.parametrize("load", ["kept/mask.safetensors", "kept", "kept/"])
def test_a_saved_mask_is_a_file_or_its_folder(ready, tmp_path, load):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "mask.safetensors").write_text("")
    check_inputs(ready(f"mask.load={load}"), "train", 1)
    assert str(mask_file(load)) == "kept/mask.safetensors"


def test_a_loaded_mask_needs_no_calibration_rows(ready, tmp_path):
    (tmp_path / "m.safetensors").write_text("")
    missing = ["mask.load=m.safetensors", "mask.calibration_path=nowhere.jsonl"]
    check_inputs(ready(*missing), "train", 1)
    (problem,) = problems_of(ready(*missing, "mask.schedule=periodic"))  # rescoring reads it
    assert problem.where == "command line: mask.calibration_path=nowhere.jsonl"


# Training rows in folders and mixtures


def test_a_folder_of_rows(ready, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.csv").write_text("prompt,response\na,b\n")
    (tmp_path / "folder" / "test.csv").write_text("question,answer\na,b\n")
    check_inputs(ready("data.path=folder"), "train", 1)
    (first,) = problems_of(ready("data.path=folder", "data.split=test"))
    assert first.where.endswith("test.csv:2") and "question, answer" in first.fix
    (problem,) = problems_of(ready("data.path=folder", "data.split=tset"))
    assert problem.where == "command line: data.path=folder" and "test" in problem.fix


def test_a_subset_of_a_folder_is_what_is_checked(ready, tmp_path):
    for name, header in (("cola", "sentence,label"), ("rte", "prompt,response")):
        (tmp_path / "glue" / name).mkdir(parents=True)
        (tmp_path / "glue" / name / "train.csv").write_text(f"{header}\na,b\n")
    check_inputs(ready("data.path=glue", "data.subset=rte"), "train", 1)
    assert len(problems_of(ready("data.path=glue", "data.subset=cola"))) == 1
    assert "nosuch" in problems_of(ready("data.path=glue", "data.subset=nosuch"))[0].what


def test_every_source_of_a_mixture_is_checked(ready, tmp_path):
    ready()
    (tmp_path / "mine2.yaml").write_text(
        "model: {name_or_path: ./model}\n"
        "data:\n  mixture:\n    - path: rows.jsonl\n      weight: 3\n    - path: nowhere.jsonl\n"
        "      weight: 2\n    - path: rows.jsonl\n      weight: 1\n      format: text\n"
    )
    missing, column = problems_of(load_recipe("mine2.yaml"))
    assert missing.where == "mine2.yaml:6 (data.mixture[1].path)"
    assert column.where == "rows.jsonl:1" and "data.columns.text" in column.what


def test_only_the_first_rows_are_read(ready, tmp_path):
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "a", "response": "b"}\n' * 5 + "broken")
    check_inputs(ready(), "train", 1)  # the rest is read, and checked, when it is tokenised
