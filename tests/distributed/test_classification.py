"""Sequence classification: the mask is trained sparsely, the new head whole."""

from pathlib import Path

import pytest
import tiny as small
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    OPTConfig,
    OPTForCausalLM,
)

from distributed.checkpoint_checks import assert_resumed_is_uninterrupted
from distributed.reference import DenseRun, assert_as_dense, make_recipe, rows_of, start, whole_weights
from speft_ds.adapter.apply import apply_adapter
from speft_ds.comm import collectives
from speft_ds.errors import UserError

DATA = {"format": "classification", "columns": {"text": "sentence"}, "labels": ["bad", "good"]}
HEAD = "score.weight"


def plain_classifier(trainer):
    model, num_labels = trainer.recipe.model, len(trainer.context.data.classes)
    return AutoModelForSequenceClassification.from_pretrained(
        model.name_or_path, dtype=getattr(torch, model.dtype), num_labels=num_labels
    ).eval()


def row_logits(model, ids):
    """[classes] logits of one row by itself, unpadded: at its last token."""
    hidden = model.model(torch.tensor([ids])).last_hidden_state
    return model.score(hidden[0, -1])


def check_dense_reference(recipe):
    """A run equals autograd with the gradient masked to the mask and the whole head, row by row."""
    trainer = start(recipe)
    before = whole_weights(trainer.engine.module)
    lines = [trainer.train_step(step) for step in range(recipe.train.steps)]
    trained = whole_weights(trainer.engine.module)
    model, accuracies = plain_classifier(trainer), []
    with torch.no_grad():
        model.score.weight.copy_(before[HEAD])
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]), name

    def loss_of(step):
        rows = rows_of(trainer, step)
        logits = torch.stack([row_logits(model, row.ids) for row in rows])
        labels = torch.tensor([row.label for row in rows])
        accuracies.append((logits.argmax(-1) == labels).float().mean().item())
        return torch.nn.functional.cross_entropy(logits, labels)

    picked = {**trainer.mask.index, HEAD: torch.arange(before[HEAD].numel())}
    if assert_as_dense(trainer, lines, lambda trainer: DenseRun(trainer, model, loss_of, picked, [HEAD])):
        assert [line["accuracy"] for line in lines] == accuracies, accuracies
    assert not torch.equal(trained[HEAD], before[HEAD]), "the head stayed"
    others = [name for name in before if name not in picked]
    assert others and all(torch.equal(trained[name], before[name]) for name in others), "others moved"


def check_run(recipe):
    """Losses, head and logits of a run; base + adapter = the trained weights, bit for bit."""
    trainer = start(recipe)
    first = whole_weights(trainer.engine.module)[HEAD]
    losses = [trainer.train_step(step)["loss"] for step in range(recipe.train.steps)]
    trainer.save()
    collectives.barrier()
    trained = whole_weights(trainer.engine.module)
    model = apply_adapter(plain_classifier(trainer), trainer.folder / "adapter")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trained[name]), name
    classes = dict(enumerate(trainer.context.data.classes))
    assert model.config.id2label == classes, model.config.id2label
    return {
        "losses": losses,
        "start": first,
        "head": trained[HEAD],
        "fingerprint": trainer.context.fingerprint,
        "sha256": trainer.mask.sha256,
        "moved": int((trained[HEAD] != first).sum()),
        "changes": len(trainer.schedule.changes),
    }


def make_rows(folder: Path) -> Path:
    """Rows of two classes and unequal length, as CSV."""
    path = folder / "reviews.csv"
    good, bad = ["fine", "lovely", "a joy to see"], ["dull", "a bore", "bad and much too long"]
    lines = [f"{text} {i},{int(text in good)}\n" for i in range(8) for text in (*good, *bad)]
    path.write_text("sentence,label\n" + "".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make_rows(tmp_path_factory.mktemp("reviews"))


@pytest.fixture
def recipe(tiny, rows, tmp_path):
    def make(output_dir="run", checkpoint="untied", data=None, **sections):
        given = {"data": {**DATA, "path": str(rows), **(data or {})}, **sections}
        model = {"task": "sequence_classification", **sections.get("model", {})}
        return make_recipe(tiny, tmp_path / output_dir, checkpoint, **{**given, "model": model})

    return make


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_it_equals_dense_autograd(ranks, recipe, world_size):
    ranks(world_size)(check_dense_reference, recipe=recipe())


def test_ranks_and_splits_are_not_inputs(ranks, recipe):
    runs = [ranks(1)(check_run, recipe=recipe("one", train={"micro_batch": 8}))[0]]
    runs += ranks(2)(check_run, recipe=recipe("two", train={"micro_batch": 1}))
    runs += ranks(4)(check_run, recipe=recipe("four"))
    for run in runs[1:]:
        assert run["losses"] == pytest.approx(runs[0]["losses"], abs=1e-6)
        assert torch.equal(run["start"], runs[0]["start"])
        assert torch.allclose(run["head"], runs[0]["head"], atol=1e-6)
        assert (run["sha256"], run["fingerprint"]) == (runs[0]["sha256"], runs[0]["fingerprint"])


SCHEDULES = {
    "drop_grow ag": {"schedule": "drop_grow", "update_every": 2, "growth_steps": 2},
    "drop_grow ma": {"schedule": "drop_grow", "update_every": 2, "growth": "sft_ma"},
    "periodic": {"schedule": "periodic", "update_every": 2},
    "grad_topk": {"schedule": "grad_topk", "topk_fraction": 0.3},
    "half": {"layer_gate": "half", "gate_every": 1},
    "fisher": {"salience": "fisher"},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_keeps_training_the_whole_head(ranks, recipe, name):
    run = ranks(2)(check_run, recipe=recipe(mask=SCHEDULES[name]))[0]
    assert run["moved"] == run["head"].numel()
    assert run["changes"] == (2 if "update_every" in SCHEDULES[name] else 0)


def test_bfloat16(ranks, recipe):
    run = ranks(2)(check_run, recipe=recipe(model={"dtype": "bfloat16"}))[0]
    assert run["head"].dtype == torch.bfloat16 and run["moved"] > 0


def test_an_adapter_with_a_head_needs_a_classifier(ranks, recipe, tiny):
    done = recipe("saved")
    ranks(1)(check_run, recipe=done)
    folder = f"{done.output_dir}/adapter"
    with pytest.raises(UserError, match=r"a classifier's(.|\n)*AutoModelForSequenceClassification"):
        apply_adapter(AutoModelForCausalLM.from_pretrained(tiny["untied"]), folder)
    three = AutoModelForSequenceClassification.from_pretrained(tiny["untied"], num_labels=3)
    before = {name: parameter.clone() for name, parameter in three.named_parameters()}
    with pytest.raises(UserError, match=r"head score.weight of shape \(2, 35\)(.|\n)*num_labels=2"):
        apply_adapter(three, folder)
    assert all(torch.equal(parameter, before[name]) for name, parameter in three.named_parameters())


def test_an_opt_model(ranks, recipe, tmp_path):
    """Its head is as wide as its embeddings, not as its layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 20, "ffn_dim": 48, "num_hidden_layers": 2}
    config = OPTConfig(
        vocab_size=260, num_attention_heads=4, max_position_embeddings=128, dropout=0.0, **sizes
    )
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    small.make_tokenizer().save_pretrained(tmp_path / "opt")
    model = {"name_or_path": str(tmp_path / "opt")}
    run = ranks(2)(check_run, recipe=recipe(model=model))[0]
    assert run["head"].shape == (2, 20) and run["moved"] == 40


@pytest.mark.parametrize("schedule", ["drop_grow ag", "periodic"])
def test_resumed_is_uninterrupted(ranks, recipe, schedule):
    def recipe_of(folder):
        return recipe(folder, mask=SCHEDULES[schedule], train={"steps": 8})

    assert_resumed_is_uninterrupted(ranks, recipe_of, stop=5)


def test_a_calibration_file_does_not_number_the_classes_anew(ranks, recipe, tmp_path):
    for name, labels in (("train", "abc"), ("calibration", "bc")):
        rows = "".join(f"{label} word {i},{label}\n" for i in range(8) for label in labels)
        (tmp_path / f"{name}.csv").write_text(f"sentence,label\n{rows}")
    data = {"path": str(tmp_path / "train.csv"), "labels": None}
    mask = {"calibration_path": str(tmp_path / "calibration.csv")}
    run = ranks(2)(check_run, recipe=recipe(data=data, mask=mask))[0]
    assert run["head"].shape == (3, 35)


def test_an_applied_adapter_classifies_padded_rows(ranks, recipe, tiny):
    """As transformers does it: rows that end with an EOS, padded by the tokenizer."""
    done = recipe("saved")
    ranks(1)(check_run, recipe=done)
    model = AutoModelForSequenceClassification.from_pretrained(tiny["untied"], num_labels=2).eval()
    apply_adapter(model, f"{done.output_dir}/adapter")
    tokenizer = AutoTokenizer.from_pretrained(tiny["untied"])
    texts = [f"<s>{text}</s>{tokenizer.eos_token}" for text in ("fine", "bad and much too long", "a bore")]
    batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    logits = model(input_ids=batch["input_ids"]).logits
    for text, padded in zip(texts, logits, strict=True):
        alone = row_logits(model, tokenizer(text, add_special_tokens=False)["input_ids"])
        assert torch.allclose(padded, alone, atol=1e-5)
