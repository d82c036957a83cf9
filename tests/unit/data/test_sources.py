"""What a path of a recipe stands for: files, patterns, folders and their splits, saved data sets, the hub."""

import json

import pytest

from speft_ds.data.sources import (
    files_without_split,
    iterate_rows,
    keys_without_effect,
)
from unit.data.made import ROWS, pairs, refusal, source
from unit.data.made import write as write_jsonl
from unit.data.made import write_kind as write

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


def test_a_folder_of_several_kinds_is_refused_with_names(folder):
    for name, kind in (("a.jsonl", "jsonl"), ("b.csv", "csv"), ("c.csv", "csv")):
        write(folder / name, ROWS[:1], kind)
    with refusal(folder, "data.path=", "data.mixture", what="a.jsonl") as caught:
        rows_of(folder)
    assert "b.csv" in caught.value.what and "c.csv" in caught.value.what
    # What `datasets` reads as one kind is read in full.
    (folder / "a.jsonl").unlink()
    (folder / "d.tsv").write_text("prompt\tresponse\nx\ty\n")
    assert rows_of(folder) == [ROWS[0], ROWS[0], {"prompt": "x", "response": "y"}]


def test_a_readme_says_which_files_of_several_kinds_are_data(folder):
    write(folder / "rows.csv", ROWS[:1], "csv")
    write(folder / "statistics.json", ROWS[1:2], "json")
    configs = [{"config_name": "default", "data_files": "*.csv"}]
    (folder / "README.md").write_text(f"---\n{json.dumps({'configs': configs})}\n---\ndata_files\n")
    assert rows_of(folder) == ROWS[:1]
    assert files_without_split(source(folder)) == [folder / "statistics.json"]
    (folder / "README.md").write_text("---\n{}\n---\ndata_files\n")
    with refusal(folder, "data.mixture", what="statistics.json"):
        rows_of(folder)


def test_a_file_that_is_in_no_split_is_named(folder):
    for name in ("train.jsonl", "test.jsonl"):
        write_jsonl(folder / name, pairs("a"))
    assert files_without_split(source(folder)) == []
    for name in ("more.jsonl", ".hidden.jsonl", "__old__/train.jsonl", "config.json", "notes.txt"):
        write_jsonl(folder / name, pairs("b"))
    assert files_without_split(source(folder)) == [folder / "more.jsonl"]
    assert rows_of(folder) == pairs("a")


def test_an_empty_part_of_a_folder_has_no_rows(folder):
    (folder / "a.jsonl").write_text("")
    write_jsonl(folder / "b.jsonl", pairs("b"))
    (folder / "c.jsonl").write_text("\n")
    assert rows_of(folder) == pairs("b")


def test_a_pattern_stands_for_all_files_that_fit(folder, monkeypatch):
    for name in ("b/2.jsonl", "b/1.jsonl", "a/1.jsonl", "a[1].jsonl"):
        write_jsonl(folder / name, pairs(name))
    assert [row["response"] for row in rows_of(f"{folder}/*/*.jsonl")] == [
        "a/1.jsonl",
        "b/1.jsonl",
        "b/2.jsonl",
    ]
    assert len(rows_of(f"{folder}/**/1.jsonl")) == 2
    assert [row["response"] for row in rows_of(folder / "a[1].jsonl")] == ["a[1].jsonl"]  # the name of a file
    (folder / "b" / "readme.txt").write_text("")
    with refusal(f"{folder}/b/*", "convert", what="readme.txt"):
        rows_of(f"{folder}/b/*")
    with refusal(f"{folder}/*.csv"):
        rows_of(f"{folder}/*.csv")
    monkeypatch.chdir(folder)
    assert rows_of("b/?.jsonl") == pairs("b/1.jsonl", "b/2.jsonl")  # nothing of the hub


def saved(rows):
    import datasets

    return datasets.Dataset.from_list(rows)


def test_a_data_set_that_save_to_disk_wrote(folder):
    import datasets

    saved(ROWS).filter(lambda row: row["prompt"] != "long").save_to_disk(folder / "one")
    assert rows_of(folder / "one") == ROWS[:3]
    datasets.DatasetDict(train=saved(ROWS[:1]), test=saved(ROWS[1:2])).save_to_disk(folder / "several")
    assert rows_of(folder / "several") == ROWS[:1]
    assert rows_of(folder / "several", split="test") == ROWS[1:2]
    with refusal(folder / "several", "test", what="tset"):
        rows_of(folder / "several", split="tset")
    (part,) = (folder / "several" / "test").glob("*.arrow")
    part.write_bytes(b"damaged")
    with refusal(folder / "several", "save_to_disk"):
        rows_of(folder / "several", split="test")


def test_the_keys_that_choose_a_part_where_there_is_none(folder):
    import datasets

    everything = {"subset": "a", "split": "test", "revision": "main"}
    saved(ROWS).save_to_disk(folder / "one")
    datasets.DatasetDict(test=saved(ROWS)).save_to_disk(folder / "several")
    (folder / "plain").mkdir()
    expected = {
        "rows.jsonl": ["subset", "split", "revision"],
        "*.jsonl": ["subset", "split", "revision"],
        "one": ["subset", "split", "revision"],
        "several": ["subset", "revision"],
        "plain": ["revision"],
    }
    assert {name: keys_without_effect(source(folder / name, **everything)) for name in expected} == expected
    assert keys_without_effect(source("owner/name", **everything)) == []
    assert keys_without_effect(source(folder / "rows.jsonl")) == []
