"""The card: metadata as the hub's own library reads it, and what it says."""

import pytest
import yaml
from huggingface_hub import ModelCard

from speft_ds.adapter.card import card_text, write_card
from speft_ds.adapter.format import Adapter
from speft_ds.errors import UserError
from unit.adapter.matrices import FACTS, SHAPES, matrices, write

pytestmark = pytest.mark.usefixtures("own_folder")

MASK = {"num_trainable": 12, "num_target_elements": 1760, "density": 12 / 1760}
WHOLE = FACTS | {"shapes": SHAPES, "num_entries": 12, "mask": MASK}
SCORES = [
    {"task": "arc_easy", "metric": "acc", "before": 0.25, "after": 0.51239, "stderr": 0.0103},
    {"task": "odd|task", "metric": "exact_match", "before": None, "after": 1.0, "stderr": None},
]


def metadata(text):
    return ModelCard(text, ignore_metadata_errors=False).data.to_dict()


def test_metadata_as_the_hub_reads_it():
    recipe = {"data": {"path": None, "mixture": [{"path": "a/b"}, {"path": "mine.jsonl"}, {"path": "c/d"}]}}
    assert metadata(card_text(WHOLE | {"recipe": recipe}, SCORES)) == {
        "library_name": "speft_ds",
        "base_model": "owner/name",
        "base_model_relation": "adapter",
        "pipeline_tag": "text-generation",
        "tags": ["sparse-fine-tuning", "speft", "adapter"],
        "datasets": ["a/b", "c/d"],
    }


@pytest.mark.parametrize("base", ["/home/me/models/llama", "./llama", "~/llama", "runs/llama", "a/b/llama"])
def test_a_local_base_is_named_without_its_path(base, tmp_path):
    (tmp_path / "runs" / "llama").mkdir(parents=True)
    text = card_text(WHOLE | {"base": base}, [])
    assert "base_model" not in metadata(text) and base not in text and "sparse fine-tuning of llama" in text


def test_local_data_are_named_without_their_path():
    text = card_text(WHOLE | {"recipe": {"data": {"path": "/home/me/secret/rows.jsonl"}}}, [])
    assert "datasets" not in metadata(text) and "/home" not in text and "| data | rows.jsonl |" in text


def test_the_licence_is_left_to_the_user():
    text = card_text(WHOLE, [])
    assert "license" not in metadata(text) and "\n# license: " in text


def test_what_was_trained_and_how_large_it_is():
    text = card_text(WHOLE, [], num_bytes=84)
    assert "| changed weights | 12 of 1,760 (0.682%) |" in text
    assert "| size | 0.00 MiB, 7.00 bytes an entry |" in text
    assert "| base | owner/name, in float32 |" in text and "| learning rate | 0.001 |" in text
    assert "## Scores" not in text


def test_scores_are_a_table():
    lines = card_text(WHOLE, SCORES).splitlines()
    assert "| arc_easy | acc | 0.2500 | 0.5124 | 0.0103 |" in lines
    assert "| odd\\|task | exact_match | - | 1.0000 | - |" in lines


def test_a_classifier_says_how_it_is_loaded():
    facts = WHOLE | {"task": "sequence_classification", "classes": ["good", "bad"], "pad_token_id": 0}
    text = card_text(facts, [])
    assert 'AutoModelForSequenceClassification.from_pretrained("owner/name", ' in text
    assert "num_labels=2" in text and "| classes | good, bad |" in text
    assert metadata(text)["pipeline_tag"] == "text-classification"


@pytest.mark.parametrize(
    "odd",
    [
        {"recipe": {"data": [], "mask": 3, "name": {"a": 1}}},
        {"history": "all of it"},
        {"history": ["yes", {"of": [1]}, {"command": "x", "of": None}]},
        {"mask": {"density": "high"}},
        {"mask": {"density": 0.5}},
        {"recipe": {"data": {"mixture": 7}}},
        {"base": "a: b\n---\n"},
        {"base": '"; import os #'},
        {"task": "other", "classes": []},
    ],
)
def test_odd_facts_make_a_card_all_the_same(odd):
    text = card_text(WHOLE | odd, [])
    front = text.split("---\n")[1]
    assert yaml.safe_load(front)["library_name"] == "speft_ds" and "## Use" in text


def test_the_code_in_it_is_code():
    text = card_text(WHOLE | {"base": '/models/a "b"'}, [])
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")


def test_a_card_is_written_beside_the_adapter(tmp_path):
    folder = write(tmp_path / "adapter", matrices(0))
    write_card(folder, SCORES)
    text = (folder / "README.md").read_text()
    assert "arc_easy" in text and f"| changed weights | {Adapter.open(folder).num_entries:,}" in text
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "adapter.json", "adapter.safetensors"
    ]  # fmt: skip
    with pytest.raises(UserError):
        write_card(tmp_path, SCORES)
