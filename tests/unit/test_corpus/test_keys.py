"""What changes the key that a corpus is kept under, and what does not."""

import shutil
from pathlib import Path

import pytest
from speft_ds.data.dataset_cache import DatasetSpec

from speft_ds.config.data_config import Columns, DataConfig, Source
from speft_ds.errors import UserError
from unit.test_corpus.made import pairs, plain, write


def keys(data, model, **options):
    return DatasetSpec(data, model, **options).key()


def test_the_key_does_not_depend_on_the_path(tmp_path, path, model):
    copy = tmp_path / "elsewhere" / "copy.jsonl"
    copy.parent.mkdir()
    copy.write_bytes(path.read_bytes())
    assert keys(DataConfig(path=str(path)), model) == keys(DataConfig(path=str(copy)), model)
    mixed = [DataConfig(mixture=[Source(path=str(p), weight=w)]) for p, w in ((path, 1.0), (copy, 2.0))]
    assert keys(mixed[0], model) == keys(mixed[1], model)  # nor on how often the rows are drawn
    (tmp_path / "model").rename(tmp_path / "moved")
    before = keys(DataConfig(path=str(path)), str(tmp_path / "moved"))
    (tmp_path / "moved").rename(tmp_path / "model")
    assert before == keys(DataConfig(path=str(path)), model)


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
    data = DataConfig(path=str(path))
    assert keys(data.model_copy(update=change), model) != keys(data, model)


def test_the_bytes_of_data_and_tokenizer_change_the_key(path, model):
    data, seen = DataConfig(path=str(path)), set()
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
    seen = {keys(DataConfig(path=str(folder)), model)}
    write(folder / "train.jsonl", pairs("b"))
    seen.add(keys(DataConfig(path=str(folder)), model))
    write(folder / "test.jsonl", pairs("c"))
    seen.add(keys(DataConfig(path=str(folder)), model))
    (folder / "test.jsonl").rename(folder / "other.jsonl")
    seen.add(keys(DataConfig(path=str(folder)), model))
    assert len(seen) == 4
    write(folder / ".cache" / "huggingface" / "download.lock", [])  # what `hf download` leaves
    assert keys(DataConfig(path=str(folder)), model) in seen


def test_data_that_is_not_there_is_named(tmp_path, model):
    with pytest.raises(UserError, match=r"(?s)cannot read .*nowhere.jsonl"):
        keys(plain(tmp_path / "nowhere.jsonl"), model)


@pytest.mark.parametrize("name", ["merges.txt", "sentencepiece.bpe.model", "chat_template.jinja"])
def test_any_file_of_a_tokenizer_or_a_scorer_is_in_the_key(tmp_path, model, name):
    data = plain(write(tmp_path / "rows.jsonl", [{"prompt": "a", "response": "b"}]))
    shutil.copytree(model, tmp_path / "scorer")
    other = data.model_copy(update={"select": "ifd", "select_rows": 1, "scorer": str(tmp_path / "scorer")})
    before = DatasetSpec(data, model).key(), DatasetSpec(other, model).key()
    (tmp_path / "scorer" / name).write_text("changed")
    assert DatasetSpec(data, model).key() == before[0] and DatasetSpec(other, model).key() != before[1]
    (Path(model) / name).write_text("changed")
    assert DatasetSpec(data, model).key() != before[0]
