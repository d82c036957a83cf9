"""Corpora: rows read, tokenised, selected and packed once, and found again in the cache."""

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiny

from speft_ds.data.corpus import Corpus
from speft_ds.data.prepare import prepare
from speft_ds.data.request import Request
from speft_ds.data.rows import Row
from speft_ds.errors import UserError
from speft_ds.schema import Columns, Data, Source
from unit.test_order import randperm
from unit.test_packing import naive

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("SPEFT_DS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rows"


@pytest.fixture
def model(tmp_path):
    tiny.make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    return str(tmp_path / "model")


@pytest.fixture
def path(tmp_path):
    return tiny.make_data(tmp_path / "data", num_rows=30)


def make(data, model, load=tiny.make_tokenizer, say=lambda line: None, **options):
    return prepare(Request(data, model, **options), load, say)


def plain(path, **data):
    """A data section without a chat template: one token a byte, and one for the end."""
    return Data(path=str(path), chat_template=False, **data)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(*responses, prompt="p"):
    return [{"prompt": prompt, "response": response} for response in responses]


def refuse():
    raise AssertionError("tokenised again")


def shown(corpus):
    """The rows as text, the start of what is learnt marked."""
    tokenizer = tiny.make_tokenizer()
    texts = []
    for row in corpus:
        edges = [0, *(edge for span in row.spans for edge in span), len(row.ids)]
        texts.append("|".join(tokenizer.decode(row.ids[a:b]) for a, b in pairwise(edges)))
    return texts


# What is in it


def test_rows_are_those_tokenised_by_hand(path, model):
    corpus = make(Data(path=str(path)), model)
    rows = tiny.read_rows(path)
    assert list(corpus) == rows and len(corpus) == corpus.num_rows == 30
    assert list(corpus.rows()) == rows and [corpus[n] for n in (17, 3, 29)] == [rows[n] for n in (17, 3, 29)]
    assert corpus.lengths.tolist() == corpus.sequence_lengths().tolist() == [len(row.ids) for row in rows]
    assert corpus.num_learnt.tolist() == [row.num_labels for row in rows]
    assert corpus.sizes == corpus.row_sizes == (30,) and not corpus.is_packed
    for number in (30, -1):
        with pytest.raises(IndexError):
            corpus[number]


def test_packs_hold_every_row_once(path, model):
    corpus = make(Data(path=str(path), packing=True, max_length=64), model)
    rows = tiny.read_rows(path)
    packs = naive([len(row.ids) for row in rows], 64)
    assert corpus.is_packed and len(corpus) == len(packs) < 30 and corpus.num_rows == 30
    assert corpus.sizes == (len(packs),) and corpus.row_sizes == (30,)
    for pack, numbers in zip(corpus, packs, strict=True):
        starts = [sum(len(rows[n].ids) for n in numbers[:i]) for i in range(len(numbers))]
        assert pack.starts == starts
        assert pack.ids == [token for n in numbers for token in rows[n].ids]
        spans = [
            (start + a, start + b) for start, n in zip(starts, numbers, strict=True) for a, b in rows[n].spans
        ]
        assert pack.spans == spans
    assert corpus.sequence_lengths().tolist() == [len(pack.ids) for pack in corpus]
    assert list(corpus.rows()) == rows  # each by itself, for calibration


def test_a_mixture_keeps_its_sources_apart(tmp_path, path, model):
    other = write(
        tmp_path / "other.jsonl", [{"q": "a", "a": "b"}, {"q": "c", "a": "d"}, {"q": "e", "a": " "}]
    )
    columns = Columns(prompt="q", response="a")
    mixture = [Source(path=str(path)), Source(path=str(other), columns=columns, chat_template=False)]
    corpus = make(Data(mixture=mixture, empty_rows="drop"), model)
    assert corpus.sizes == corpus.row_sizes == (30, 2)
    assert list(corpus)[:30] == tiny.read_rows(path) and shown(corpus)[30:] == ["a|b</s>|", "c|d</s>|"]
    assert [counts["rows"] for counts in corpus.facts["sources"]] == [30, 3]
    assert [counts["empty, left out"] for counts in corpus.facts["sources"]] == [0, 1]
    packed = make(Data(mixture=mixture, empty_rows="drop", packing=True, max_length=64), model)
    assert packed.row_sizes == (30, 2) and packed.sizes[1] == 1 and sum(packed.sizes) == len(packed)
    assert packed[len(packed) - 1].starts == [0, 3]  # no pack has rows of two sources


def test_rows_to_classify(tmp_path, model):
    path = write(
        tmp_path / "rows.jsonl", [{"text": t, "label": label} for t, label in zip("abc", "yny", strict=True)]
    )
    data = plain(path, format="classification")
    corpus = make(data, model, classify=True)
    assert [row.label for row in corpus] == [1, 0, 1] and corpus.facts["classes"] == ["n", "y"]
    assert [row.spans for row in corpus] == [[], [], []] and corpus[0].num_labels == 1
    assert shown(make(data, model)) == ["a|y</s>|", "b|n</s>|", "c|y</s>|"]  # for a language model
    named = make(data.model_copy(update={"labels": ["y", "n"]}), model, classify=True)
    assert [row.label for row in named] == [0, 1, 0]


def test_classes_are_found_over_all_sources_whatever_their_columns(tmp_path, model):
    one = write(tmp_path / "one.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": None}])
    two = write(tmp_path / "two.jsonl", [{"text": "c", "kind": "w", "label": 5}])
    mixture = [Source(path=str(one)), Source(path=str(two), columns=Columns(label="kind"))]
    data = Data(mixture=mixture, format="classification", empty_rows="drop")
    corpus = make(data, model, classify=True)
    assert corpus.facts["classes"] == ["w", "x"] and [row.label for row in corpus] == [1, 0]
    with pytest.raises(UserError, match=r"(?s)the row has no label.*one.jsonl:2"):
        make(data.model_copy(update={"empty_rows": "refuse"}), model, classify=True)


def test_what_became_of_the_rows_is_counted(tmp_path, model):
    rows = [*pairs("yes", "", "y" * 100), {"prompt": "p" * 100, "response": "no"}]
    data = plain(write(tmp_path / "rows.jsonl", rows), empty_rows="drop", max_length=40)
    zero = {
        "truncated prompt": 0,
        "truncated response": 0,
        "not selected": 0,
        "nothing to learn, left out": 0,
    }
    corpus = make(data, model)
    assert corpus.facts["sources"] == [{"rows": 4, "empty, left out": 1, "too long, left out": 2, **zero}]
    corpus = make(data.model_copy(update={"long_rows": "truncate_prompt"}), model)
    assert corpus.facts["sources"][0]["truncated prompt"] == 1 and len(corpus) == 2
    corpus = make(data.model_copy(update={"long_rows": "truncate_response"}), model)
    assert corpus.facts["sources"][0]["truncated response"] == 1 and len(corpus) == 2
    assert shown(corpus) == ["p|yes</s>|", "p|" + "y" * 39 + "|"]


def test_its_first_rows_are_kept_as_text(path, model):
    samples = make(Data(path=str(path)), model).facts["samples"]
    assert samples[1] == [["<s>say bear please </s><s>", False], ["bear 1</s>", True]] and len(samples) == 3


def test_no_row_left(tmp_path, model):
    path = write(tmp_path / "rows.jsonl", [*pairs("", "y" * 100)])
    data = plain(path, empty_rows="drop", max_length=40)
    with pytest.raises(UserError) as caught:
        make(data, model, where=lambda number: f"mine.yaml:{number}")
    assert caught.value.what == "of 2 rows none is left: 1 empty, left out, 1 too long, left out"
    assert caught.value.where == "mine.yaml:0" and "data.max_length" in caught.value.fix
    with pytest.raises(UserError, match="has no rows"):
        make(plain(write(tmp_path / "none.jsonl", [])), model)
    with pytest.raises(UserError, match=r"(?s)empty 'response'.*rows.jsonl:1.*data.empty_rows=drop"):
        make(plain(path), model)


def test_more_rows_than_are_tokenised_at_once(tmp_path, model, monkeypatch):
    path = write(tmp_path / "rows.jsonl", pairs(*(f"row {n}" for n in range(25))))
    whole = make(plain(path), model)
    monkeypatch.setattr("speft_ds.data.prepare.BATCH", 4)
    parts = make(plain(path, max_length=100), model)
    assert parts.path != whole.path and list(parts) == list(whole) and len(parts) == 25


# Selection


def test_the_longest_responses_are_taken_in_the_order_of_the_file(tmp_path, model):
    path = write(
        tmp_path / "rows.jsonl", [*pairs("aa", "b", "cccc", "dd", "ee"), *pairs("f", prompt="p" * 50)]
    )
    corpus = make(plain(path, select="longest", select_rows=3), model)
    assert shown(corpus) == ["p|aa</s>|", "p|cccc</s>|", "p|dd</s>|"]  # of equal ones the first
    assert corpus.facts["sources"][0]["not selected"] == 3
    assert len(make(plain(path, select="longest", select_rows=6), model)) == 6
    with pytest.raises(UserError, match=r"(?s)select_rows=7 is more than the 6 rows.*data.select_rows=6, or"):
        make(plain(path, select="longest", select_rows=7), model)


def test_random_rows_depend_on_the_seed_alone(path, model):
    data, rows = Data(path=str(path), select="random", select_rows=7), tiny.read_rows(path)
    for seed in (0, 1):
        expected = sorted(randperm(30, seed, "select", 0)[:7])
        assert list(make(data, model, seed=seed)) == [rows[n] for n in expected]
    assert Request(data, model, seed=0).key() != Request(data, model, seed=1).key()
    everything = Data(path=str(path))
    assert Request(everything, model, seed=0).key() == Request(everything, model, seed=1).key()


def test_the_selection_is_over_all_sources_together(tmp_path, model):
    paths = [
        write(tmp_path / f"{n}.jsonl", pairs(*texts)) for n, texts in enumerate((("aaa", "b"), ("cc", "d")))
    ]
    mixture = [Source(path=str(path)) for path in paths]
    data = Data(mixture=mixture, chat_template=False, select="longest", select_rows=2, packing=True)
    corpus = make(data, model)
    assert [shown([row]) for row in corpus.rows()] == [["p|aaa</s>|"], ["p|cc</s>|"]]
    assert corpus.row_sizes == (1, 1) and corpus.sizes == (1, 1)
    data = data.model_copy(update={"select_rows": 1})
    with pytest.raises(UserError, match="of 2 rows none is left: 2 not selected"):
        make(data, model)


def test_ifd_chooses_by_prompt_and_response(tmp_path, model, monkeypatch):
    from speft_ds.data import ifd

    talk = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    turns = [{"role": role, "content": text} for role, text in talk]
    path = write(
        tmp_path / "rows.jsonl", [{"messages": turns}, {"messages": turns[1:3]}, {"messages": turns[3:]}]
    )
    seen = []

    def scores(texts, scorer):
        seen.append((texts, scorer))
        return [0.5, 2.0, 0.9]

    monkeypatch.setattr(ifd, "ifd_scores", scores)
    data = Data(path=str(path), format="messages", select="ifd", select_rows=1, scorer=str(model))
    corpus = make(data, model)
    assert seen == [([("s\na\nb\nc\n", "d"), ("a\n", "b"), ("c\n", "d")], str(model))]
    assert shown(corpus) == ["<s>c</s><s>|d</s>|"] and corpus.facts["sources"][0]["not selected"] == 2


# The cache


def test_a_second_start_tokenises_nothing(path, model, cache):
    lines = []
    first = make(Data(path=str(path)), model, say=lines.append)
    assert lines == [f"tokenising {path}"]
    second = make(Data(path=str(path)), model, load=refuse, say=lines.append)
    assert list(second) == list(first) and second.facts == first.facts and len(lines) == 1
    assert [file.name for file in cache.glob("*.safetensors")] == [first.path.name]
    assert not list(cache.glob("*.tmp"))


def keys(data, model, **options):
    return Request(data, model, **options).key()


def test_the_key_does_not_depend_on_the_path(tmp_path, path, model):
    copy = tmp_path / "elsewhere" / "copy.jsonl"
    copy.parent.mkdir()
    copy.write_bytes(path.read_bytes())
    assert keys(Data(path=str(path)), model) == keys(Data(path=str(copy)), model)
    mixed = [Data(mixture=[Source(path=str(p), weight=w)]) for p, w in ((path, 1.0), (copy, 2.0))]
    assert keys(mixed[0], model) == keys(mixed[1], model)  # nor on how often the rows are drawn
    (tmp_path / "model").rename(tmp_path / "moved")
    before = keys(Data(path=str(path)), str(tmp_path / "moved"))
    (tmp_path / "moved").rename(tmp_path / "model")
    assert before == keys(Data(path=str(path)), model)


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 512},
        {"template": "{prompt}!"},
        {"chat_template": False},
        {"columns": Columns(prompt="response")},
        {"long_rows": "truncate_prompt"},
        {"empty_rows": "drop"},
        {"packing": True},
        {"select": "longest", "select_rows": 3},
        {"format": "text"},
    ],
)
def test_whatever_shapes_the_rows_changes_the_key(path, model, change):
    data = Data(path=str(path))
    assert keys(data.model_copy(update=change), model) != keys(data, model)


def test_the_bytes_of_data_and_tokenizer_change_the_key(path, model):
    data, seen = Data(path=str(path)), set()
    seen.add(keys(data, model))
    seen.add(keys(data, model, classify=True))
    path.write_text(path.read_text().replace("ant", "ANT"))
    seen.add(keys(data, model))
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "config.json",
        "tokenizer.model",
    ):
        file = Path(model) / name
        file.write_text((file.read_text() if file.exists() else "") + " ")
        seen.add(keys(data, model))
    assert len(seen) == 8
    (Path(model) / "model.safetensors").write_text("weights")
    assert keys(data, model) in seen


def test_the_files_of_a_folder_change_the_key(tmp_path, model):
    folder = tmp_path / ".cache" / "set"  # where data sets are often kept
    write(folder / "train.jsonl", pairs("a"))
    seen = {keys(Data(path=str(folder)), model)}
    write(folder / "train.jsonl", pairs("b"))
    seen.add(keys(Data(path=str(folder)), model))
    write(folder / "test.jsonl", pairs("c"))
    seen.add(keys(Data(path=str(folder)), model))
    (folder / "test.jsonl").rename(folder / "other.jsonl")
    seen.add(keys(Data(path=str(folder)), model))
    assert len(seen) == 4
    write(folder / ".cache" / "huggingface" / "download.lock", [])  # what `hf download` leaves
    assert keys(Data(path=str(folder)), model) in seen


def test_data_that_is_not_there_is_named(tmp_path, model):
    with pytest.raises(UserError, match=r"(?s)cannot read .*nowhere.jsonl"):
        keys(plain(tmp_path / "nowhere.jsonl"), model)


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_a_damaged_corpus_is_made_anew(path, model, damage):
    first = make(Data(path=str(path)), model)
    rows = list(first)
    whole = first.path.read_bytes()
    first.path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "other": b"x" * 1000}[damage])
    with pytest.raises(UserError, match="not readable"):
        Corpus(first.path)
    second = make(Data(path=str(path)), model)
    assert second.path == first.path and list(second) == rows and second.path.read_bytes() == whole


def test_a_cache_that_cannot_be_written(tmp_path, path, model, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPEFT_DS_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"(?s)cannot write the tokenised rows.*set SPEFT_DS_CACHE"):
        make(Data(path=str(path)), model)


def test_a_full_disk_leaves_nothing_behind(path, model, monkeypatch, cache):
    from speft_ds import tensor_files

    def save_file(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_files, "save_file", save_file)
    with pytest.raises(UserError, match=r"(?s)No space left.*set SPEFT_DS_CACHE"):
        make(Data(path=str(path)), model)
    assert [file.suffix for file in cache.iterdir()] in ([], [".lock"])


def test_a_cache_that_somebody_else_filled_need_not_be_writable(path, model, monkeypatch):
    first = make(Data(path=str(path)), model)

    def lock(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("filelock.FileLock", lock)
    assert list(make(Data(path=str(path)), model, load=refuse)) == list(first)


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
from speft_ds.data.prepare import prepare
from speft_ds.data.request import Request
from speft_ds.schema import Data
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
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "".join(outputs).count("tokenises") == 1
    rows = tiny.read_rows(path)
    expected = f"{sum(sum(row.ids) for row in rows)} {len(rows)}"
    assert [output.splitlines()[-1] for output in outputs] == [expected] * 2
    assert len(list(cache.glob("*.safetensors"))) == 1 and not list(cache.glob("*.tmp"))


CACHED = """
import sys
from speft_ds.data.prepare import prepare
from speft_ds.data.request import Request
from speft_ds.schema import Data
corpus = prepare(Request(Data(path=sys.argv[1]), sys.argv[2]), None)
print(len(list(corpus)), sorted({"torch", "transformers", "datasets"} & set(sys.modules)))
"""


def test_a_cached_corpus_is_opened_without_torch(path, model, cache):
    make(Data(path=str(path)), model)
    assert start(cache, CACHED, path, model).communicate(timeout=120)[0] == "30 []\n"


def test_ids_are_read_row_by_row_from_the_file(path, model):
    corpus = make(Data(path=str(path)), model)
    held = [value for value in vars(corpus).values() if isinstance(value, np.ndarray)]
    assert sum(array.size for array in held) < sum(corpus.lengths)  # edges and spans, not the ids
    assert isinstance(corpus[3], Row) and all(type(token) is int for token in corpus[3].ids)


def test_a_text_of_one_token_has_nothing_to_learn(tmp_path, model):
    path = write(tmp_path / "rows.jsonl", [{"text": "</s>"}, {"text": "ab"}])
    corpus = make(plain(path, format="text"), model)
    assert shown(corpus) == ["a|b</s>|"]
    assert corpus.facts["sources"][0]["nothing to learn, left out"] == 1


@pytest.mark.parametrize("name", ["merges.txt", "sentencepiece.bpe.model", "chat_template.jinja"])
def test_any_file_of_a_tokenizer_or_a_scorer_is_in_the_key(tmp_path, model, name):
    data = plain(write(tmp_path / "rows.jsonl", [{"prompt": "a", "response": "b"}]))
    shutil.copytree(model, tmp_path / "scorer")
    other = data.model_copy(update={"select": "ifd", "select_rows": 1, "scorer": str(tmp_path / "scorer")})
    before = Request(data, model).key(), Request(other, model).key()
    (tmp_path / "scorer" / name).write_text("changed")
    assert Request(data, model).key() == before[0] and Request(other, model).key() != before[1]
    (Path(model) / name).write_text("changed")
    assert Request(data, model).key() != before[0]
