"""The cache of IFD scores: its key, damage, and several processes at once."""

import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from limits import HANG_S
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from speft_ds.data import ifd
from speft_ds.data.ifd import ifd_scores
from unit.test_ifd.made import PAIRS, edit_weights


def test_a_second_call_reads_the_cache(tiny, cache, loads):
    scores = ifd_scores(PAIRS, tiny["untied"])
    assert len(loads) == 1
    assert ifd_scores(list(map(list, PAIRS)), str(tiny["untied"])) == scores
    assert len(loads) == 1
    assert [path.suffix for path in cache.iterdir()] == [".json"]


def test_the_key_is_the_content(tiny, scorer, cache, loads):
    original = ifd_scores(PAIRS, tiny["untied"])
    assert ifd_scores(PAIRS, scorer) == original and len(loads) == 1  # a copy elsewhere

    def other_head(weights):
        weights["lm_head.weight"][0, 0] += 1

    stamp = (scorer / "model.safetensors").stat().st_mtime_ns
    size = (scorer / "model.safetensors").stat().st_size
    edit_weights(scorer, other_head)
    os.utime(scorer / "model.safetensors", ns=(stamp, stamp))
    assert (scorer / "model.safetensors").stat().st_size == size
    assert ifd_scores(PAIRS, scorer) != original and len(loads) == 2

    for number, name in enumerate(["config.json", "tokenizer_config.json"], 3):
        document = json.loads((scorer / name).read_text())
        (scorer / name).write_text(json.dumps(document | {"note": "changed"}))
        ifd_scores(PAIRS, scorer)
        assert len(loads) == number
    other_pairs = [PAIRS[::-1], PAIRS[1:], [*PAIRS[1:], ("say cat c", "at 1")]]
    for number, pairs in enumerate(other_pairs, 5):
        ifd_scores(pairs, scorer)
        assert len(loads) == number
    assert len(list(cache.iterdir())) == 7


def test_every_shard_is_in_the_key(tiny, scorer, loads):
    whole = ifd_scores(PAIRS, scorer)
    AutoModelForCausalLM.from_pretrained(scorer).save_pretrained(scorer, max_shard_size="40KB")
    (scorer / "model.safetensors").unlink()
    shards = sorted(scorer.glob("model-*.safetensors"))
    assert len(shards) > 1
    loads.clear()
    assert ifd_scores(PAIRS, scorer) == pytest.approx(whole, rel=1e-6) and len(loads) == 1
    weights = load_file(shards[-1])
    next(iter(weights.values())).view(-1)[0] += 0.5
    save_file(weights, shards[-1], {"format": "pt"})
    ifd_scores(PAIRS, scorer)
    assert len(loads) == 2


@pytest.mark.parametrize("damage", ["cut", "digit", "empty", "list", "other rows", "not utf-8", "folder"])
def test_a_damaged_file_is_not_trusted(tiny, cache, loads, damage):
    scores = ifd_scores(PAIRS[:3], tiny["untied"])
    (path,) = cache.iterdir()
    text = path.read_text()
    shorter = {"scores": [0.5], "sha256": ifd._hash_json([0.5])}
    damaged = {
        "cut": text[: len(text) // 2],
        "digit": text.replace(repr(scores[0]), repr(scores[0] + 1e-9)),
        "empty": "",
        "list": "[1, 2]",
        "other rows": json.dumps(shorter),
        "not utf-8": None,
        "folder": None,
    }[damage]
    if damage == "folder":
        path.unlink()
        path.mkdir()
        with pytest.warns(UserWarning, match="not kept"):
            assert ifd_scores(PAIRS[:3], tiny["untied"]) == scores
        assert list(cache.iterdir()) == [path]
        return
    assert damaged != text
    path.write_bytes(b"\xff\xfe" if damaged is None else damaged.encode())
    assert ifd_scores(PAIRS[:3], tiny["untied"]) == scores and len(loads) == 2
    assert path.read_text() == text and list(cache.iterdir()) == [path]


def test_a_full_disk_does_not_cost_the_scores(tiny, cache, monkeypatch):
    def full(path, document):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ifd, "write_json", full)
    with pytest.warns(UserWarning, match="No space left"):
        scores = ifd_scores(PAIRS[:2], tiny["untied"])
    assert len(scores) == 2 and not cache.exists()


RACER = """
import sys, time
from pathlib import Path
from speft_ds.data import ifd

folder, arrived, value = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])

def read_together(path, num_rows, read=ifd._read_cache):
    scores = read(path, num_rows)
    (arrived / sys.argv[3]).touch()
    while len(list(arrived.iterdir())) < 2:
        time.sleep(0.005)
    return scores

ifd._read_cache = read_together
ifd._load, ifd._score = lambda *_: (None, None), lambda pairs, *_: [value] * len(pairs)
assert ifd.ifd_scores([("a", "b")] * 2000, folder) == [value] * 2000
"""


def test_two_processes_race(tiny, tmp_path, cache, loads):
    """Both find nothing, both compute and write. They write different scores here, to be told apart."""
    (tmp_path / "arrived").mkdir()
    command = [sys.executable, "-c", RACER, str(tiny["untied"]), str(tmp_path / "arrived")]
    root = Path(ifd.__file__).parents[1]
    racers = [subprocess.Popen([*command, value], cwd=root) for value in ("0.25", "0.75")]
    assert [racer.wait(HANG_S) for racer in racers] == [0, 0]
    assert len(list(cache.iterdir())) == 1  # nothing temporary is left
    scores = ifd_scores([("a", "b")] * 2000, tiny["untied"])
    assert set(scores) in ({0.25}, {0.75}) and len(scores) == 2000 and not loads


def test_a_reader_never_sees_half_a_file(tmp_path):
    path, scores = tmp_path / "key.json", [random.random() for _ in range(2000)]
    ifd._write_cache(path, scores)
    writers = [
        threading.Thread(target=lambda: [ifd._write_cache(path, scores) for _ in range(10)]) for _ in range(4)
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert ifd._read_cache(path, 2000) == scores
    assert list(tmp_path.iterdir()) == [path]
