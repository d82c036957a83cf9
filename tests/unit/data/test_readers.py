"""Rows as they stand in files and folders: the same in every kind of file, and each bad one is named."""

import csv
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from speft_ds.config.data_config import DataConfig
from speft_ds.data.readers import is_hub_dataset, iterate_file, iterate_rows, kind_of
from speft_ds.errors import UserError
from unit.data.made import refusal
from unit.data.made import write as write_jsonl

KINDS = ("json", "jsonl", "csv", "parquet")
COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda text: pyarrow.compress(text, "zstd", asbytes=True),
}
ROWS = [
    {"prompt": "one", "response": 'say "two",\nthree'},
    {"prompt": "\u4e16\u754c \U0001f98a", "response": "a\u2028b\u2029c\x85d\x0be"},
    {"prompt": "  ", "response": "tab\tand back\\slash, {braces}"},
    {"prompt": "long", "response": "word " * 40_000},
]


def write(path, rows, kind):
    """The rows in a file of a kind, by the kind's own writer; compressed as its suffix says."""
    plain = path.parent.parent / f"plain.{kind}"
    if kind == "jsonl":
        write_jsonl(plain, rows)
    elif kind == "json":
        plain.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), plain)
    else:
        with plain.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    path.write_bytes(COMPRESS[path.suffix if path.suffix in COMPRESS else ""](plain.read_bytes()))
    return path


def read(path):
    return [row for _, row in iterate_file(path)]


def source(path, **data):
    return DataConfig(path=str(path), **data).sources[0]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of rows; what `datasets` makes of it is thrown away."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    (tmp_path / "rows").mkdir()
    return tmp_path / "rows"


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_rows(folder, kind, compression):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    nested = [{**row, "turns": turns[n:], "label": n, "x": 0.5 if n else None} for n, row in enumerate(ROWS)]
    rows = ROWS if kind == "csv" else nested
    path = write(folder / f"rows.{kind}{compression}", rows, kind)
    assert read(path) == rows
    assert list(iterate_rows(source(path))) == list(iterate_file(path))


def test_where_a_row_stands(folder):
    def places(path):
        return [where.removeprefix(str(path)) for where, _ in iterate_file(path)]

    (folder / "a.jsonl").write_bytes('{"a": 1}\n\n  \n{"a": 2}\r\n{"a": "x\u2028y"}\n{"a": 3}'.encode())
    assert places(folder / "a.jsonl") == [":1", ":4", ":5", ":6"]
    (folder / "a.csv").write_text('a,b\n1,"x\ny"\n\n2,z\n')
    assert places(folder / "a.csv") == [":3", ":5"]  # where a row ends
    for kind in ("json", "parquet"):
        assert places(write(folder / f"rows.{kind}", ROWS[:2], kind)) == [", row 1", ", row 2"]


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv"])
@pytest.mark.parametrize("compression", COMPRESS)
def test_a_byte_order_mark_and_several_compressed_parts_are_read_over(folder, kind, compression):
    text = b"\xef\xbb\xbf" + write(folder / f"rows.{kind}", ROWS, kind).read_bytes()
    path = folder / f"marked.{kind}{compression}"
    path.write_bytes(COMPRESS[compression](text[:50]) + COMPRESS[compression](text[50:]))
    assert read(path) == ROWS


def test_files_without_rows(folder):
    texts = {"a.jsonl": "", "b.jsonl": "\n \n", "c.json": "", "d.json": "[]", "e.csv": "", "f.csv": "a,b\n"}
    for name, text in texts.items():
        (folder / name).write_text(text)
        assert read(folder / name) == []


# Files that cannot be read


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": "un', "a.jsonl:2"),
        ("a.jsonl", '{"a": 1}\n{"a": 1} {"a": 2}\n', "a.jsonl:2"),
        ("a.jsonl", '[{"a": 1},\n{"a": 2}]', "a.jsonl:1"),
        ("a.jsonl", f'\n{{"a": {"9" * 5000}}}', "a.jsonl:2"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1"),
        ("a.json", '{"a": 1}\n{"a": 2}\n', "a.json"),
        ("a.json", '{"data": [{"a": 1}]}', "a.json"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "a.csv:3"),
        ("a.csv", "a,b\n1,2\n\n1\n", "a.csv:4"),
        ("a.csv", 'a,b\n1,2\n1,"open\n\n', "a.csv:3"),
        ("a.csv", 'a,b\n1,"x"y\n', "a.csv:2"),
        ("a.txt", "a", "a.txt"),
        ("a.txt.gz", "a", "a.txt.gz"),
        *((f"none.{kind}", None, f"none.{kind}") for kind in (*KINDS, "jsonl.gz", "parquet.zst")),
    ],
)
def test_what_cannot_be_read_is_named_by_its_line(folder, name, text, where):
    if text is not None:
        (folder / name).write_text(text)
    with refusal(folder / where):
        read(folder / name)


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv"])
def test_text_that_is_not_utf8_is_refused(folder, kind, compression):
    path = folder / f"rows.{kind}{compression}"
    path.write_bytes(COMPRESS[compression](b'[{"a": "caf\xe9"}]' if kind != "csv" else b"a\ncaf\xe9\n"))
    with refusal(path, "UTF-8"):
        read(path)


DAMAGES = {
    "empty": lambda content: b"",
    "start": lambda content: content[:10],
    "half": lambda content: content[: len(content) // 2],
    "without its end": lambda content: content[:-3],
    "changed": lambda content: content[: len(content) // 2] + b"\0" * 20 + content[len(content) // 2 + 20 :],
    "other": lambda content: b"this is not compressed at all" * 10,
}
CASES = [(kind, how, damage) for kind in KINDS for how in (".gz", ".zst") for damage in list(DAMAGES)[1:]]


@pytest.mark.parametrize(
    ("kind", "compression", "damage"), [*CASES, *(("parquet", "", damage) for damage in DAMAGES)]
)
def test_a_damaged_file_is_refused(folder, kind, compression, damage):
    path = write(folder / f"rows.{kind}{compression}", ROWS[:3] * 50, kind)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(UserError) as caught:
        read(path)
    assert caught.value.where.startswith(str(path)) and caught.value.fix  # or a line of it


def test_what_a_name_says(folder, monkeypatch):
    names = {"a.jsonl": ".jsonl", "a.json.gz": ".json", "a.b.csv.zst": ".csv"}
    names |= dict.fromkeys(["a.txt", "a", "a.gz", "jsonl"])
    assert {name: kind_of(name) for name in names} == names
    monkeypatch.chdir(folder)
    (folder / "owner" / "here").mkdir(parents=True)
    assert is_hub_dataset("owner/name") and is_hub_dataset("owner/name.v2")
    here = ["owner/here", "/owner/name", "./owner/name", "~/name", "name", "a/b/c", "owner/x.csv.gz"]
    assert not any(map(is_hub_dataset, here))


# Folders


def rows_of(folder, **data):
    return [row for _, row in iterate_rows(source(folder, **data))]


@pytest.mark.parametrize(
    ("kind", "compression"), [("json", ""), ("jsonl", ".gz"), ("csv", ".gz"), ("parquet", "")]
)
def test_the_splits_of_a_folder_are_read_anew(folder, kind, compression):
    write(folder / f"train.{kind}{compression}", ROWS[:1], kind)
    write(folder / f"validation.{kind}{compression}", ROWS[1:2], kind)
    assert rows_of(folder) == ROWS[:1]
    assert rows_of(folder, split="validation") == ROWS[1:2]
    ((where, _),) = iterate_rows(source(folder))
    assert where.startswith(f"{folder}/train.{kind}{compression}")
    write(folder / f"train.{kind}{compression}", ROWS[1:2], kind)
    assert rows_of(folder) == ROWS[1:2]
    with refusal(folder, "train"):
        rows_of(folder, split="trian")


@pytest.mark.parametrize("has_readme", [False, True])
def test_the_subsets_of_a_folder(folder, has_readme):
    for subset, row in (("main", ROWS[0]), ("other", ROWS[2])):
        (folder / subset).mkdir()
        write(folder / subset / "train.jsonl", [row], "jsonl")
        write(folder / subset / "test.jsonl", [row, row], "jsonl")
    if has_readme:
        configs = [{"config_name": name, "data_dir": name} for name in ("main", "other")]
        (folder / "README.md").write_text(f"---\n{json.dumps({'configs': configs})}\n---\n")
    assert rows_of(folder, subset="main") == ROWS[:1]
    assert rows_of(folder, subset="other", split="test") == [ROWS[2]] * 2
    with refusal(folder, "data.subset", "data.split"):
        rows_of(folder, subset="nope")


def test_numbers_in_a_csv_of_a_folder_stay_as_they_are_written(folder):
    (folder / "train.csv").write_text("prompt,response\n018,NA\n")
    assert rows_of(folder) == [{"prompt": "018", "response": "NA"}]


def test_a_folder_named_like_a_hub_id_is_not_looked_for_there(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (folder / "set").mkdir()
    write(folder / "set" / "train.jsonl", ROWS[:1], "jsonl")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert rows_of("rows/set") == ROWS[:1]


def test_a_hub_data_set_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    with refusal("owner/name", "hf download --repo-type dataset owner/name", what="HF_HUB_OFFLINE"):
        list(iterate_rows(source("owner/name")))
