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

KINDS = ("json", "jsonl", "csv", "parquet")
COMPRESSIONS = ("", ".gz", ".zst")
ROWS = [
    {"prompt": "one", "response": 'say "two",\nthree'},
    {"prompt": "\u4e16\u754c \U0001f98a", "response": "a\u2028b\u2029c\x85d\x0be"},
    {"prompt": "  ", "response": "tab\tand back\\slash, {braces}"},
]


def write(path, rows, kind):
    """The rows in a file of a kind, by the kind's own writer; compressed as its suffix says."""
    compression = path.suffix if path.suffix in (".gz", ".zst") else ""
    plain = path.with_name(f"plain.{kind}") if compression else path
    if kind == "jsonl":
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        plain.write_text("".join(lines), encoding="utf-8")
    elif kind == "json":
        plain.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), plain)
    else:
        with plain.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    if compression == ".gz":
        path.write_bytes(gzip.compress(plain.read_bytes()))
    elif compression == ".zst":
        with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write(plain.read_bytes())
    return path


def read(path):
    return [row for _, row in iterate_file(path)]


def refused(path):
    with pytest.raises(UserError) as caught:
        list(iterate_file(path))
    return caught.value


def source(path, **data):
    return DataConfig(path=str(path), **data).sources[0]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind, compression):
    path = write(tmp_path / f"rows.{kind}{compression}", ROWS, kind)
    assert read(path) == ROWS
    assert list(iterate_rows(source(path))) == list(iterate_file(path))


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_lists_of_objects_and_missing_values_are_read(tmp_path, kind, compression):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": turns, "label": 3, "x": None}, {"messages": turns[:1], "label": 4, "x": 0.5}]
    assert read(write(tmp_path / f"rows.{kind}{compression}", rows, kind)) == rows


def test_where_a_row_stands(tmp_path):
    text = '{"a": 1}\n\n  \n{"a": 2}\r\n{"a": "x\u2028y"}\n{"a": 3}'
    (tmp_path / "rows.jsonl").write_bytes(text.encode())
    lines = [where for where, _ in iterate_file(tmp_path / "rows.jsonl")]
    assert lines == [f"{tmp_path}/rows.jsonl:{number}" for number in (1, 4, 5, 6)]
    (tmp_path / "rows.csv").write_text('a,b\n1,"x\ny"\n\n2,z\n')
    lines = [where for where, _ in iterate_file(tmp_path / "rows.csv")]
    assert lines == [f"{tmp_path}/rows.csv:{number}" for number in (3, 5)]  # where a row ends
    for kind in ("json", "parquet"):
        path = write(tmp_path / f"rows.{kind}", ROWS, kind)
        assert [where for where, _ in iterate_file(path)] == [f"{path}, row {n}" for n in (1, 2, 3)]


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv"])
@pytest.mark.parametrize("compression", ["", ".gz"])
def test_a_byte_order_mark_is_no_part_of_the_rows(tmp_path, kind, compression):
    write(tmp_path / f"rows.{kind}", ROWS, kind)
    text = b"\xef\xbb\xbf" + (tmp_path / f"rows.{kind}").read_bytes()
    path = tmp_path / f"marked.{kind}{compression}"
    path.write_bytes(gzip.compress(text) if compression else text)
    assert read(path) == ROWS


def test_a_file_of_several_compressed_parts_is_read_to_its_end(tmp_path):
    lines = [json.dumps(row).encode() + b"\n" for row in ROWS]
    (tmp_path / "rows.jsonl.gz").write_bytes(b"".join(gzip.compress(line) for line in lines))
    assert read(tmp_path / "rows.jsonl.gz") == ROWS
    parts = [pyarrow.compress(line, "zstd", asbytes=True) for line in lines]
    (tmp_path / "rows.jsonl.zst").write_bytes(b"".join(parts))
    assert read(tmp_path / "rows.jsonl.zst") == ROWS


def test_a_long_text_in_a_csv_file(tmp_path):
    rows = [{"prompt": "a", "response": "word " * 100_000}]
    assert read(write(tmp_path / "rows.csv", rows, "csv")) == rows


def test_files_without_rows(tmp_path):
    texts = {"a.jsonl": "", "b.jsonl": "\n \n", "c.json": "", "d.json": "[]", "e.csv": "", "f.csv": "a,b\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        assert read(tmp_path / name) == []


# Files that cannot be read


@pytest.mark.parametrize(
    ("name", "text", "what", "where"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": "un', "not JSON", "a.jsonl:2"),
        ("a.jsonl", '{"a": 1}\n{"a": 1} {"a": 2}\n', "not JSON: Extra data", "a.jsonl:2"),
        ("a.jsonl", '[{"a": 1},\n{"a": 2}]', "not JSON", "a.jsonl:1"),
        ("a.jsonl", f'\n{{"a": {"9" * 5000}}}', "not JSON", "a.jsonl:2"),
        ("a.jsonl", "[" * 100_000, "not JSON", "a.jsonl:1"),
        ("a.json", '{"a": 1}\n{"a": 2}\n', "not JSON: Extra data", "a.json"),
        ("a.json", '{"data": [{"a": 1}]}', "holds a list of objects", "a.json"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "more or fewer fields than the header's 2", "a.csv:3"),
        ("a.csv", "a,b\n1,2\n\n1\n", "more or fewer fields than the header's 2", "a.csv:4"),
        ("a.csv", 'a,b\n1,2\n1,"open\n\n', "not CSV: unexpected end of data", "a.csv:3"),
        ("a.csv", 'a,b\n1,"x"y\n', "not CSV", "a.csv:2"),
        ("a.txt", "a", "none of .jsonl, .json, .csv, .parquet", "a.txt"),
        ("a.txt.gz", "a", "none of .jsonl, .json, .csv, .parquet", "a.txt.gz"),
    ],
)
def test_what_is_wrong_and_where(tmp_path, name, text, what, where):
    (tmp_path / name).write_text(text)
    error = refused(tmp_path / name)
    assert what in error.what and error.where == str(tmp_path / where) and error.fix


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv"])
def test_text_that_is_not_utf8_is_refused(tmp_path, kind, compression):
    path = tmp_path / f"rows.{kind}{compression}"
    text = b'[{"a": "caf\xe9"}]' if kind != "csv" else b"a\ncaf\xe9\n"
    if compression:
        text = pyarrow.compress(text, {".gz": "gzip", ".zst": "zstd"}[compression], asbytes=True)
    path.write_bytes(text)
    error = refused(path)
    assert "cannot read the data file" in error.what and "UTF-8" in error.fix and error.where == str(path)


@pytest.mark.parametrize("damage", ["cut", "changed", "other"])
@pytest.mark.parametrize("compression", [".gz", ".zst"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_compressed_file_is_refused(tmp_path, kind, compression, damage):
    path = write(tmp_path / f"rows.{kind}{compression}", ROWS * 50, kind)
    whole = path.read_bytes()
    middle = len(whole) // 2
    changed = bytes(255 - byte for byte in whole[middle : middle + 20])
    damaged = {
        "cut": whole[:middle],
        "changed": whole[:middle] + changed + whole[middle + 20 :],
        "other": b"this is not compressed at all" * 10,
    }
    path.write_bytes(damaged[damage])
    assert str(path) in refused(path).where


@pytest.mark.parametrize("part", [0, 10, 0.5, 0.99])
def test_a_damaged_parquet_file_is_refused(tmp_path, part):
    path = write(tmp_path / "rows.parquet", ROWS, "parquet")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole)) if part < 1 else part])
    error = refused(path)
    assert "not a readable parquet file" in error.what and error.where == str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "a.parquet.zst"])
def test_a_file_that_is_not_there(tmp_path, name):
    error = refused(tmp_path / name)
    assert "cannot read the data file" in error.what and error.where == str(tmp_path / name)


def test_kinds_by_name():
    names = {"a.jsonl": ".jsonl", "a.json.gz": ".json", "a.b.csv.zst": ".csv", "a.txt": None, "a": None}
    assert {name: kind_of(name) for name in names} == names
    assert kind_of("a.gz") is None and kind_of("jsonl") is None


def test_what_can_only_be_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "here").mkdir()
    assert is_hub_dataset("owner/name") and is_hub_dataset("owner/name.v2")
    for path in (
        "owner/here",
        "/owner/name",
        "./owner/name",
        "~/name",
        "name",
        "a/b/c",
        "owner/x.csv.gz",
    ):
        assert not is_hub_dataset(path)


# Folders


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder in which `write` puts files; what `datasets` makes of them is thrown away."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    (tmp_path / "rows").mkdir()
    return tmp_path / "rows"


def rows_of(folder, **data):
    return [row for _, row in iterate_rows(source(folder, **data))]


@pytest.mark.parametrize(
    ("kind", "compression"), [("json", ""), ("jsonl", ".gz"), ("csv", ".gz"), ("parquet", "")]
)
def test_the_splits_of_a_folder(folder, kind, compression):
    write(folder / f"train.{kind}{compression}", ROWS[:1], kind)
    write(folder / f"validation.{kind}{compression}", ROWS[1:2], kind)
    for plain in folder.glob("plain.*"):
        plain.unlink()
    assert rows_of(folder) == ROWS[:1]
    assert rows_of(folder, split="validation") == ROWS[1:2]
    ((where, _),) = iterate_rows(source(folder))
    assert where.startswith(f"{folder}/train.{kind}{compression}")


def test_a_changed_folder_is_read_anew(folder):
    write(folder / "train.jsonl", ROWS[:1], "jsonl")
    assert rows_of(folder) == ROWS[:1]
    write(folder / "train.jsonl", ROWS[1:2], "jsonl")
    assert rows_of(folder) == ROWS[1:2]


@pytest.mark.parametrize("has_readme", [False, True])
def test_the_subsets_of_a_folder(folder, has_readme):
    for subset, row in (("main", ROWS[0]), ("other", ROWS[2])):
        (folder / subset).mkdir()
        write(folder / subset / "train.jsonl", [row], "jsonl")
        write(folder / subset / "test.jsonl", [row, row], "jsonl")
    if has_readme:
        configs = "".join(f"- config_name: {name}\n  data_dir: {name}\n" for name in ("main", "other"))
        (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert rows_of(folder, subset="main") == ROWS[:1]
    assert rows_of(folder, subset="other", split="test") == [ROWS[2]] * 2
    with pytest.raises(UserError, match=r"(?s)'nope' not found.*data.subset and data.split name one part"):
        rows_of(folder, subset="nope")


def test_a_split_that_a_folder_does_not_have(folder):
    write(folder / "train.jsonl", ROWS, "jsonl")
    with pytest.raises(UserError, match="has no split 'test'; it has train"):
        rows_of(folder, split="test")


@pytest.mark.parametrize("name", ["train.csv", "train.jsonl", "train.parquet"])
def test_a_damaged_file_of_a_folder(folder, name):
    (folder / name).write_text('a,b\n1,"2\n')
    with pytest.raises(UserError) as caught:
        rows_of(folder)
    assert str(folder / name) in str(caught.value) and "hf download" not in str(caught.value)


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
    with pytest.raises(UserError, match=r"(?s)offline by choice.*hf download --repo-type dataset owner/name"):
        list(iterate_rows(source("owner/name")))
