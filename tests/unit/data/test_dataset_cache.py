"""Datasets on disk: their key; found again, damaged, not writable, wanted by two processes."""

import os
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
import tiny

from speft_ds.config.data_config import Columns, DataConfig, Source
from speft_ds.config.load_recipe import ROOT
from speft_ds.data.dataset import TokenizedDataset
from speft_ds.data.dataset_cache import DatasetSpec
from unit.data.made import make, pairs, refusal, without_chat, write


def refuse():
    raise AssertionError("tokenised again")


def test_a_second_start_tokenises_nothing(path, model, cache):
    lines = []
    first = make(DataConfig(path=str(path)), model, log=lines.append)
    assert len(lines) == 1 and str(path) in lines[0]
    second = make(DataConfig(path=str(path)), model, load=refuse, log=lines.append)
    assert list(second) == list(first) and second.facts == first.facts and len(lines) == 1
    assert [file.name for file in (cache / "rows").glob("*.safetensors")] == [first.path.name]
    assert not list(cache.rglob("*.tmp"))


def test_what_takes_long_says_how_long_it_will_take(path, model, monkeypatch):
    monkeypatch.setattr("speft_ds.data.dataset_cache.PART_S", 0.0)
    lines = []
    made = make(DataConfig(path=str(path)), model, log=lines.append)
    (told,) = [line for line in lines if " left" in line]
    assert f"1 of {made.num_rows}" in told and str(path) in told


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_a_damaged_dataset_is_made_again(path, model, damage):
    first = make(DataConfig(path=str(path)), model)
    rows = list(first)
    complete = first.path.read_bytes()
    damaged = {"cut": complete[: len(complete) // 2], "empty": b"", "other": b"x" * 1000}[damage]
    first.path.write_bytes(damaged)
    with refusal(first.path, f"rm {first.path}"):
        TokenizedDataset(first.path)
    second = make(DataConfig(path=str(path)), model)
    assert second.path == first.path and list(second) == rows and second.path.read_bytes() == complete


def test_a_full_disk_leaves_nothing_behind(path, model, monkeypatch, cache):
    def save_file(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", save_file)
    with refusal(cache / "rows", "SPEFT_DS_CACHE", what="No space left"):
        make(DataConfig(path=str(path)), model)
    assert [file.suffix for file in (cache / "rows").iterdir()] in ([], [".lock"])


def test_a_cache_that_somebody_else_filled_need_not_be_writable(path, model, monkeypatch):
    first = make(DataConfig(path=str(path)), model)

    def lock(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("filelock.FileLock", lock)
    assert list(make(DataConfig(path=str(path)), model, load=refuse)) == list(first)


def start(cache, code, *arguments):
    """A process of its own that runs the code, and keeps its rows in this cache."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"SPEFT_DS_CACHE": str(cache), "PYTHONPATH": paths}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


RACE = """
import sys, time
from pathlib import Path
import tiny
from speft_ds.data.dataset_cache import DatasetSpec, prepare
from speft_ds.config.data_config import DataConfig
path, model, folder, me = sys.argv[1:]
tokenizer = tiny.make_tokenizer()
(Path(folder) / me).touch()
while not all((Path(folder) / name).exists() for name in "ab"):
    time.sleep(0.001)
def load():
    print("tokenises")
    time.sleep(0.5)
    return tokenizer
dataset = prepare(DatasetSpec(DataConfig(path=path), model), load, lambda line: None)
print(sum(sum(row.ids) for row in dataset), len(dataset))
"""
CACHED = """
import sys
from speft_ds.data.dataset_cache import DatasetSpec, prepare
from speft_ds.config.data_config import DataConfig
dataset = prepare(DatasetSpec(DataConfig(path=sys.argv[1]), sys.argv[2]), None)
print(len(list(dataset)), sorted({"torch", "transformers", "datasets"} & set(sys.modules)))
"""


def test_two_processes_that_want_one_dataset_make_it_once(tmp_path, path, model, cache):
    processes = [start(cache, RACE, path, model, tmp_path, name) for name in "ab"]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "".join(outputs).count("tokenises") == 1
    rows = tiny.read_rows(path)
    expected = f"{sum(sum(row.ids) for row in rows)} {len(rows)}"
    assert [output.splitlines()[-1] for output in outputs] == [expected] * 2
    assert len(list(cache.rglob("*.safetensors"))) == 1 and not list(cache.rglob("*.tmp"))
    # Another one, once it is cached, imports no torch.
    assert start(cache, CACHED, path, model).communicate(timeout=300)[0] == "30 []\n"


# The key


def key(data, model, **options):
    return DatasetSpec(data, model, **options).path().stem


def test_the_key_does_not_depend_on_paths_or_weights(tmp_path, path, model):
    copy = shutil.copy(path, tmp_path / "copy.jsonl")
    before = key(DataConfig(path=str(path)), model)
    assert before == key(DataConfig(path=str(copy)), model)
    mixed = [DataConfig(mixture=[Source(path=str(p), weight=w)]) for p, w in ((path, 1.0), (copy, 2.0))]
    assert key(mixed[0], model) == key(mixed[1], model)
    (tmp_path / "model").rename(tmp_path / "moved")
    assert before == key(DataConfig(path=str(path)), str(tmp_path / "moved"))


def changed(data, **changes):
    return data.model_copy(update=changes)


def test_whatever_shapes_the_rows_changes_the_key(path, model, monkeypatch):
    data = DataConfig(path=str(path))
    longest, scored = (changed(data, select=how, select_rows=3) for how in ("longest", "ifd"))
    keys = [
        key(data, model),
        key(changed(data, max_length=512), model),
        key(changed(data, template="{prompt}!"), model),
        key(changed(data, chat_template=False), model),
        key(changed(data, columns=Columns(prompt="response")), model),
        key(changed(data, long_rows="truncate_prompt"), model),
        key(changed(data, empty_rows="drop"), model),
        key(changed(data, packing=True), model),
        key(changed(data, format="text"), model),
        key(changed(data, turns="each"), model),
        key(changed(data, system=""), model),
        key(changed(data, chat_template_kwargs={"enable_thinking": False}), model),
        key(data, model, classify=True),
        key(longest, model),
        key(changed(longest, select_rows=4), model),
        *(key(changed(longest, select="random"), model, seed=seed) for seed in (0, 1)),
        key(changed(scored, scorer=model), model),
    ]
    assert len(set(keys)) == len(keys)
    assert key(changed(data, date="2026-01-31"), model) == keys[0]  # no template writes it
    assert key(data, model, seed=1) == keys[0]  # the seed is that of a random selection
    monkeypatch.setattr("speft_ds.data.select.IFD_VERSION", 99)
    assert key(data, model) == keys[0] and key(changed(scored, scorer=model), model) not in keys


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_date_that_the_template_writes_is_of_the_key(path, model, name):
    data = DataConfig(path=str(path))
    file = Path(model) / name
    file.write_text(file.read_text() + "{# strftime_now('%Y') #}" if file.is_file() else "{# strftime_now #}")
    days = [key(changed(data, date=day), model) for day in ("2026-01-31", "2026-02-01")]
    today = key(changed(data, date=date.today().isoformat()), model)
    assert len({*days, today}) == 3 and key(data, model) == today


def test_the_bytes_of_data_tokenizer_and_scorer_change_the_key(tmp_path, path, model):
    scorer = shutil.copytree(model, tmp_path / "scorer")
    data = DataConfig(path=str(path))
    scored = changed(data, select="ifd", select_rows=1, scorer=str(scorer))
    keys = [key(data, model)]
    path.write_text(path.read_text().replace("ant", "ANT"))
    keys += [key(data, model), key(scored, model)]
    names = ["tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"]
    for name in [*names, "tokenizer.model", "sentencepiece.bpe.model", "merges.txt"]:
        for folder, section in ((scorer, scored), (model, data)):
            with (Path(folder) / name).open("a") as file:
                file.write(" ")
            keys.append(key(section, model))
    assert len(set(keys)) == len(keys)
    (Path(model) / "model.safetensors").write_text("weights")
    assert key(data, model) == keys[-1]
    (scorer / "model.safetensors").write_text("weights")
    assert key(scored, model) not in keys


def test_the_files_of_a_folder_change_the_key(tmp_path, model):
    folder = tmp_path / ".cache" / "set"  # where data sets are often kept
    data, seen = DataConfig(path=str(folder)), set()
    for name, response in (("train", "a"), ("train", "b"), ("test", "c")):
        write(folder / f"{name}.jsonl", pairs(response))
        seen.add(key(data, model))
    (folder / "test.jsonl").rename(folder / "other.jsonl")
    seen.add(key(data, model))
    assert len(seen) == 4
    write(folder / ".cache" / "huggingface" / "download.lock", [])  # what `hf download` leaves
    assert key(data, model) in seen


def test_data_that_is_not_there_is_named(tmp_path, model):
    with refusal(tmp_path / "nowhere.jsonl", what="nowhere.jsonl"):
        key(without_chat(tmp_path / "nowhere.jsonl"), model)
