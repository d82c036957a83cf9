"""The quickstart's data, lm-eval task and model checks. Nothing here goes online or loads the real model."""

import json
import subprocess
import sys

import pytest

from speft_ds.config.load_recipe import ROOT
from speft_ds.errors import UserError
from speft_ds.io import sha256_of
from speft_ds.tools import quickstart
from speft_ds.tools.inbox_data import KEYS, MONTHS, REQUESTS, TASK_NAME, write_data, write_task
from speft_ds.tools.quickstart import NAME, default_cache_dir, is_ready, prepare, tensors_sha256


def read_rows(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


@pytest.fixture
def fake_model(tmp_path):
    """A cache folder whose model passes for complete."""
    folder = tmp_path / NAME
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    quickstart.write_marker(folder)
    return tmp_path


# Data and task


def test_data_has_pinned_bytes(tmp_path):
    """Scores of the quickstart can be compared only while its data stay the same."""
    train, heldout = write_data(tmp_path)
    assert sha256_of(train) == "8a9ef6ccea2c285144ea2a4a4a0655028a9316cbb98247587d9dd7eb2e8186d1"
    assert sha256_of(heldout) == "a914e997df7fcce076523b12fba4d029e3e710c6cea55de80eec23cd1bddb7bd"


def test_rows_are_different_records_that_follow_from_the_message(tmp_path):
    train, heldout = map(read_rows, write_data(tmp_path))
    assert (len(train), len(heldout)) == (1024, 128)
    for column in ("prompt", "response"):
        assert not {row[column] for row in train} & {row[column] for row in heldout}
    for row in train + heldout:
        record = json.loads(row["response"])
        assert row["response"] == json.dumps(record) and "\n" not in row["response"]
        assert tuple(record) == KEYS
        assert record["type"] in REQUESTS and 1 <= record["count"] <= 12
        assert record["name"] in row["prompt"] and record["item"] in row["prompt"]
        month, day = map(int, record["date"].split("-"))
        assert MONTHS[month - 1] in row["prompt"] and str(day) in row["prompt"]
        assert not any(f'"{key}"' in row["prompt"] for key in KEYS), "the prompt gives the schema away"


def test_task_loads_in_lm_eval_with_all_heldout_rows(tmp_path, monkeypatch):
    import datasets
    from lm_eval import tasks

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    train, heldout = write_data(tmp_path / "with 'odd\" name")
    folder = write_task(tmp_path / "tasks", train, heldout).parent

    manager = tasks.TaskManager(include_path=str(folder), include_defaults=False)
    task = manager.load([TASK_NAME])["tasks"][TASK_NAME]
    docs, rows = list(task.test_docs()), read_rows(heldout)
    assert len(docs) == 128
    assert [task.doc_to_text(doc) for doc in docs] == [row["prompt"] for row in rows]
    assert [task.doc_to_target(doc) for doc in docs] == [row["response"] for row in rows]
    assert [task.doc_to_text(doc) for doc in task.fewshot_docs()] == [r["prompt"] for r in read_rows(train)]
    assert task.config.num_fewshot is None  # else lm-eval would not take another number
    assert task.process_results(docs[0], [rows[0]["response"]]) == {"exact_match": 1.0}
    assert task.process_results(docs[0], [rows[1]["response"]]) == {"exact_match": 0.0}
    # as strings and not as parsed objects: a record with other spacing is not strict
    assert task.process_results(docs[0], [rows[0]["response"].replace(": ", ":")]) == {"exact_match": 0.0}


# Model


def test_tampered_download_leaves_nothing_behind(tmp_path, monkeypatch):
    def fetch(folder):
        path = folder / "model.gguf"
        path.write_bytes(b"GGUF but not ours")
        return path

    monkeypatch.setattr(quickstart, "fetch_gguf", fetch)
    with pytest.raises(UserError, match=quickstart.GGUF_SHA256) as caught:
        quickstart.prepare_model(tmp_path / "cache")
    assert caught.value.where == "model.gguf" and caught.value.fix
    assert list((tmp_path / "cache").iterdir()) == []


def test_failed_download_says_what_to_do(tmp_path, monkeypatch):
    failure = subprocess.CompletedProcess([], 1, "", "WARNING: retry\nERROR: No matching distribution")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failure)
    with pytest.raises(UserError, match="No matching distribution") as caught:
        quickstart.fetch_gguf(tmp_path)
    assert quickstart.REQUIREMENT in caught.value.where and "online" in caught.value.fix


def test_tensors_hash_sees_values_and_names_but_not_dtype():
    import torch

    linear = torch.nn.Linear(4, 3).to(torch.bfloat16)
    digest = tensors_sha256(linear)
    assert tensors_sha256(linear.float()) == digest
    assert tensors_sha256(torch.nn.Sequential(linear)) != digest
    with torch.no_grad():
        linear.weight[0, 0] += 1
    assert tensors_sha256(linear) != digest


def test_marker_notices_changed_missing_and_outdated_files(fake_model, monkeypatch):
    folder = fake_model / NAME
    assert is_ready(fake_model)
    monkeypatch.setitem(quickstart.VERSION, "gguf_sha256", "of another version")
    assert not is_ready(fake_model)
    monkeypatch.undo()
    assert is_ready(fake_model)
    (folder / "model.safetensors").write_bytes(b"weighty")
    assert not is_ready(fake_model)
    (folder / "model.safetensors").unlink()
    assert not is_ready(fake_model)
    (folder / quickstart.MARKER).write_text('{"files"')
    assert not is_ready(fake_model)
    assert not is_ready(fake_model / "nothing here")


def test_prepare_makes_the_layout_once(fake_model, capsys):
    assert prepare(fake_model) == fake_model
    folder = fake_model / "quickstart"
    made = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert made == ["heldout.jsonl", f"tasks/{TASK_NAME}.yaml", "train.jsonl"]
    assert len(capsys.readouterr().out.splitlines()) == 3

    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    (folder / "train.jsonl").write_text("cut off")
    prepare(fake_model)
    assert len(read_rows(folder / "train.jsonl")) == 1024
    untouched = [folder / "heldout.jsonl", folder / "tasks" / f"{TASK_NAME}.yaml"]
    assert all(path.stat().st_mtime_ns == times[path] for path in untouched)


def test_prepare_imports_no_torch_when_all_is_there(fake_model):
    code = "import sys; from speft_ds.tools.quickstart import prepare; prepare(sys.argv[1])"
    code += "; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code, str(fake_model)], check=True, cwd=ROOT)


def test_cache_folder_honours_xdg(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "speft_ds"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "speft_ds"
