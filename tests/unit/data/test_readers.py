"""Rows as they stand in files and folders: the same in every kind of file, and each bad one is named."""

import json
import os

import pyarrow
import pyarrow.parquet
import pytest

from speft_ds.data.readers import iterate_file, kind_of
from speft_ds.data.sources import is_hub_dataset, iterate_rows
from speft_ds.errors import UserError
from unit.data.made import COMPRESS, ROWS, refusal, source
from unit.data.made import write_kind as write

KINDS = ("json", "jsonl", "csv", "parquet")


def read(path):
    return [row for _, row in iterate_file(path)]


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


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_what_is_nested_too_deeply_is_named(folder, kind):
    (folder / f"a.{kind}").write_text('[{"a": ' + "[" * 150 + "1" + "]" * 150 + "}]")
    if kind == "json":
        assert len(read(folder / "a.json")) == 1
    for deep in (250, 100_000):
        (folder / f"a.{kind}").write_text('[{"a": ' + "[" * deep + "1" + "]" * deep + "}]")
        with refusal(folder / f"a.{kind}" if kind == "json" else f"{folder}/a.jsonl:1", what="deep"):
            read(folder / f"a.{kind}")


def test_a_pipe_is_no_file(folder):
    os.mkfifo(folder / "a.jsonl")
    with refusal(folder / "a.jsonl"):
        read(folder / "a.jsonl")


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
    if kind == "csv":
        text, line = b"a\ncaf\xc3\xa9\ncaf\xe9\n", 3
    else:
        text, line = b'[{"a":\n"caf\xe9"}]', 2 - (kind == "jsonl")
        text = text.replace(b"\n", b"") if kind == "jsonl" else text
    path.write_bytes(COMPRESS[compression](text))
    with refusal(f"{path}:{line}", "UTF-8", what="0xe9"):
        read(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "tsv"])
def test_text_in_wide_characters_is_refused(folder, kind, encoding):
    path = folder / f"rows.{kind}"
    path.write_bytes((',"'[kind[0] == "j"] + "\u4e16 prompt,response\na,b\n").encode(encoding))
    with refusal(f"{path}:1", "UTF-8", what="UTF-16"):
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


# What stands between fields, names of columns, numbers and classes


@pytest.mark.parametrize(
    ("name", "text", "rows"),
    [
        ("a.csv", "p;r\na, b;c\n", [{"p": "a, b", "r": "c"}]),
        ("a.csv", 'p\tr\n"a\tb"\tc;d,e\n', [{"p": "a\tb", "r": "c;d,e"}]),
        ("a.tsv", "p, q\tr\n1\t2\n", [{"p, q": "1", "r": "2"}]),
        ("a.tsv", "p\na, b\n", [{"p": "a, b"}]),
        ("a.csv", 'p,"r;s;t"\na;b,c\n', [{"p": "a;b", "r;s;t": "c"}]),
        ("a.csv", "text\na;b\n", [{"text": "a;b"}]),
        ("a.csv", 'p, r\na, "b, c"\n', [{"p": "a", "r": "b, c"}]),
        ("a.csv", " p ,r\n a, b\n", [{"p": " a", "r": " b"}]),
        ("a.csv", '"p\nq";r\n1;2\n', None),  # a name of two lines: not looked into
        ("a.csv", "p,r,,\n1,2,,\n", [{"p": "1", "r": "2", "": ""}]),  # as spreadsheets write empty columns
    ],
)
def test_what_stands_between_the_fields_of_a_table(folder, name, text, rows):
    (folder / name).write_text(text)
    if rows is None:
        with pytest.raises(UserError):
            read(folder / name)
    else:
        assert read(folder / name) == rows


def test_two_columns_of_one_name_are_refused(folder):
    (folder / "a.csv").write_text("p,r, r\n1,2,3\n")
    (folder / "a.jsonl").write_text('{"p": 1}\n{"p": [{"r": 1, "r": 2}]}\n')
    (folder / "a.json").write_text('[{"p": 1, "p": 2}]')
    table = pyarrow.table([pyarrow.array([1])] * 3, names=["p", "r", "r"])
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    for where in ("a.csv:1", "a.jsonl:2", "a.json", "a.parquet"):
        with refusal(folder / where, "rename", what="'p'" if where == "a.json" else "'r'"):
            read(folder / where.partition(":")[0])


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_a_number_of_a_json_file_keeps_its_text(folder, kind):
    texts = ["1.50", "1e3", "-0.10", "2.0", "7", "12345678901234567890123", "0.1000000000000000055", "1E400"]
    path = folder / f"a.{kind}"
    path.write_text("[" * (kind == "json") + f'{{"a": [{", ".join(texts)}]}}' + "]" * (kind == "json"))
    (row,) = read(path)
    assert [str(number) for number in row["a"]] == texts
    assert row["a"] == json.loads(f"[{', '.join(texts)}]")


def test_the_classes_of_a_parquet_file_have_their_names(folder, monkeypatch):
    import datasets

    label = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    rows.to_parquet(folder / "a.parquet")
    rows.save_to_disk(folder / "saved")
    for found in (read(folder / "a.parquet"), [row for _, row in iterate_rows(source(folder / "saved"))]):
        assert [row["label"] for row in found] == [1, 0, None]
        assert [str(row["label"]) for row in found[:2]] == ["good", "bad"]
