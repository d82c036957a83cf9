"""The cache of corpora: found again, damaged, not writable, wanted by two processes."""

import os
import subprocess
import sys

import pytest
import tiny
from limits import HANG_S

from speft_ds.config.data_config import DataConfig
from speft_ds.config.load_recipe import ROOT
from speft_ds.data.dataset import TokenizedDataset
from speft_ds.errors import UserError
from unit.test_corpus.made import make


def refuse():
    raise AssertionError("tokenised again")


def test_a_second_start_tokenises_nothing(path, model, cache):
    lines = []
    first = make(DataConfig(path=str(path)), model, say=lines.append)
    assert lines == [f"tokenising {path}"]
    second = make(DataConfig(path=str(path)), model, load=refuse, say=lines.append)
    assert list(second) == list(first) and second.facts == first.facts and len(lines) == 1
    assert [file.name for file in cache.glob("*.safetensors")] == [first.path.name]
    assert not list(cache.glob("*.tmp"))


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_a_damaged_corpus_is_made_anew(path, model, damage):
    first = make(DataConfig(path=str(path)), model)
    rows = list(first)
    whole = first.path.read_bytes()
    first.path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "other": b"x" * 1000}[damage])
    with pytest.raises(UserError, match="not readable"):
        TokenizedDataset(first.path)
    second = make(DataConfig(path=str(path)), model)
    assert second.path == first.path and list(second) == rows and second.path.read_bytes() == whole


def test_a_cache_that_cannot_be_written(tmp_path, path, model, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPEFT_DS_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"(?s)cannot write the tokenised rows.*set SPEFT_DS_CACHE"):
        make(DataConfig(path=str(path)), model)


def test_a_full_disk_leaves_nothing_behind(path, model, monkeypatch, cache):
    from speft_ds import io

    def save_file(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(io, "save_file", save_file)
    with pytest.raises(UserError, match=r"(?s)No space left.*set SPEFT_DS_CACHE"):
        make(DataConfig(path=str(path)), model)
    assert [file.suffix for file in cache.iterdir()] in ([], [".lock"])


def test_a_cache_that_somebody_else_filled_need_not_be_writable(path, model, monkeypatch):
    first = make(DataConfig(path=str(path)), model)

    def lock(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("filelock.FileLock", lock)
    assert list(make(DataConfig(path=str(path)), model, load=refuse)) == list(first)


def start(cache, code, *arguments):
    """A process of its own that runs the code, and keeps its rows in this cache."""
    environment = os.environ | {
        "SPEFT_DS_CACHE": str(cache.parent),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


RACE = """
import sys, time
from pathlib import Path
import tiny
from speft_ds.config.load_recipe import ROOT
from speft_ds.data.dataset import prepare
from speft_ds.data.dataset import Request
from speft_ds.config.recipes_package import Data
path, model, folder, me = sys.argv[1:]
tokenizer = tiny.make_tokenizer()
(Path(folder) / me).touch()
while not all((Path(folder) / name).exists() for name in "ab"):
    time.sleep(0.001)
def load():
    print("tokenises")
    time.sleep(0.5)
    return tokenizer
corpus = prepare(Request(Data(path=path), model), load, lambda line: None)
print(sum(sum(row.ids) for row in corpus), len(corpus))
"""


def test_two_processes_that_want_one_corpus_make_it_once(tmp_path, path, model, cache):
    processes = [start(cache, RACE, path, model, tmp_path, name) for name in "ab"]
    outputs = [process.communicate(timeout=HANG_S)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "".join(outputs).count("tokenises") == 1
    rows = tiny.read_rows(path)
    expected = f"{sum(sum(row.ids) for row in rows)} {len(rows)}"
    assert [output.splitlines()[-1] for output in outputs] == [expected] * 2
    assert len(list(cache.glob("*.safetensors"))) == 1 and not list(cache.glob("*.tmp"))


CACHED = """
import sys
from speft_ds.data.dataset import prepare
from speft_ds.data.dataset import Request
from speft_ds.config.recipes_package import Data
corpus = prepare(Request(Data(path=sys.argv[1]), sys.argv[2]), None)
print(len(list(corpus)), sorted({"torch", "transformers", "datasets"} & set(sys.modules)))
"""


def test_a_cached_corpus_is_opened_without_torch(path, model, cache):
    make(DataConfig(path=str(path)), model)
    assert start(cache, CACHED, path, model).communicate(timeout=HANG_S)[0] == "30 []\n"
