"""New tokens: their rows of the embedding and the head against plain autograd; saved, applied and merged."""

import pytest
import torch
from families import make_family
from pydantic import ValidationError
from tiny import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from distributed.checkpoint_checks import assert_resumed_is_uninterrupted, run_piece
from distributed.reference import make_recipe, start
from distributed.token_checks import check_adapter, check_against_autograd, check_merged
from speft_ds.adapter.apply import apply_adapter, remove_adapter, switch_adapter
from speft_ds.adapter.compose import compose
from speft_ds.adapter.compress import compress
from speft_ds.adapter.export import export_peft
from speft_ds.adapter.format import Adapter
from speft_ds.adapter.merge import merge
from speft_ds.data.dataset_cache import DatasetSpec
from speft_ds.data.tokenize import recipe_tokenizer
from speft_ds.errors import UserError
from speft_ds.model.new_tokens import padded_size

TOKENS = ["please", "dromedary", "bear"]  # words of the rows, which are bytes to the base
NAMES = {"tied": {"model.embed_tokens.weight"}, "untied": {"model.embed_tokens.weight", "lm_head.weight"}}
PERIODIC = {"schedule": "periodic", "update_every": 2}
DROP_GROW = {"schedule": "drop_grow", "update_every": 2, "growth_steps": 1}
TOPK = {"schedule": "grad_topk", "topk_fraction": 0.5}


@pytest.fixture
def recipe(tiny, tmp_path):
    def make(output_dir="run", checkpoint="untied", tokens=TOKENS, **sections):
        # A larger eps: a gradient near 0 would have AdamW make a step of its rounding.
        sections["optimizer"] = {"eps": 1e-5, "weight_decay": 0.1, **sections.get("optimizer", {})}
        sections["model"] = {"add_tokens": tokens, **sections.get("model", {})}
        return make_recipe(tiny, tmp_path / output_dir, checkpoint, **sections)

    return make


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("checkpoint", NAMES)
def test_rows_are_trained_as_by_autograd(ranks, recipe, checkpoint, world_size):
    run = ranks(world_size)(check_against_autograd, recipe=recipe(checkpoint=checkpoint))[0]
    assert run["sizes"] == (260, 263) and run["ids"] == [260, 261, 262]
    assert run["targets"] == NAMES[checkpoint]
    assert all(rows == run["ids"] for rows in run["rows"].values())
    assert run["rows_with_them"] > 0
    assert run["selected"] > 0 and run["mask"].isdisjoint(run["targets"])


@pytest.mark.parametrize(("tokens", "num_rows"), [(TOKENS, 264), ([*TOKENS, "say", "cat"], 272)])
def test_padding_of_the_vocabulary_is_used_and_kept(ranks, recipe, tmp_path, tokens, num_rows):
    padded = make_model(tmp_path / "padded", vocab_size=264)
    given = recipe(tokens=tokens, model={"name_or_path": str(padded)})
    run = ranks(2)(check_against_autograd, recipe=given)[0]
    assert run["sizes"] == (264, num_rows)
    assert run["ids"] == list(range(260, 260 + len(tokens)))
    assert all(rows == run["ids"] for rows in run["rows"].values())


@pytest.mark.parametrize("family", ["gemma2", "phi"])
def test_scaled_embeddings_capped_logits_and_biased_heads(ranks, recipe, tmp_path, family):
    base = make_family(tmp_path / "base", family, vocab_size=260)
    given = recipe(model={"name_or_path": str(base)})
    run = ranks(2)(check_against_autograd, recipe=given)[0]
    assert run["sizes"] == (260, 263) and all(rows == run["ids"] for rows in run["rows"].values())
    assert len(run["targets"]) == (1 if family == "gemma2" else 2)
    ranks(2)(check_adapter, recipe=recipe("saved", model={"name_or_path": str(base), "dtype": "bfloat16"}))
    merge(None, tmp_path / "saved", tmp_path / "merged")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.vocab_size == 263


def test_padded_size():
    assert padded_size(num_rows=100, num_tokens=100, num_wanted=101) == 101
    assert padded_size(num_rows=100, num_tokens=98, num_wanted=100) == 100
    assert padded_size(num_rows=100, num_tokens=98, num_wanted=101) == 104
    assert padded_size(num_rows=1024, num_tokens=1000, num_wanted=1025) == 1280


CASES = {
    "tied": {"checkpoint": "tied"},
    "untied": {},
    "periodic": {"mask": PERIODIC},
    "drop_grow": {"mask": DROP_GROW},
    "grad_topk": {"mask": TOPK},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_live_is_applied_is_merged(ranks, recipe, name, dtype, tiny, tmp_path):
    given = recipe(**CASES[name], model={"dtype": dtype})
    checkpoint = CASES[name].get("checkpoint", "untied")
    run = ranks(2)(check_adapter, recipe=given)[0]
    assert run["moved"] == NAMES[checkpoint] and bool(run["changes"]) == (name in ("periodic", "drop_grow"))
    base = AutoModelForCausalLM.from_pretrained(tiny[checkpoint], dtype=getattr(torch, dtype))
    apply_adapter(base, f"{given.output_dir}/adapter")
    merge(None, given.output_dir, tmp_path / "merged", max_shard_size="60KB")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=getattr(torch, dtype))
    for (key, one), other in zip(base.named_parameters(), merged.parameters(), strict=True):
        assert torch.equal(one, other), key
    assert merged.config.vocab_size == 263
    for folder in (tmp_path / "merged", f"{given.output_dir}/adapter/tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer("please bear", add_special_tokens=False)["input_ids"][::2] == [260, 262]


@pytest.mark.parametrize("begin", ["zero", "exact"])
def test_beside_a_base_in_few_bits(ranks, recipe, tmp_path, begin):
    given = recipe(model={"base_format": "nf4", "dtype": "bfloat16"}, mask={"start": begin})
    ranks(2)(check_merged, recipe=given, folder=tmp_path / "merged")


def test_other_adapters_of_the_base_and_what_is_made_of_them(ranks, recipe, tiny, tmp_path):
    """One with new tokens and one without take turns on a model; derived ones keep the tokens."""
    for folder, tokens in (("with", TOKENS), ("without", None)):
        ranks(1)(run_piece, recipe=recipe(folder, tokens=tokens), stop=2)
    folders = [tmp_path / name / "adapter" for name in ("with", "without")]
    model = AutoModelForCausalLM.from_pretrained(tiny["untied"])
    before = {key: weight.clone() for key, weight in model.named_parameters()}
    found = {}
    for folder in (*folders, *folders[::-1]):
        name = folder.parent.name
        if name not in found:
            apply_adapter(model, folder, name)
        switch_adapter(model, name)
        weights = {key: weight.clone() for key, weight in model.named_parameters()}
        assert len(weights["lm_head.weight"]) == (263 if name == "with" else 260)
        for key, weight in found.setdefault(name, weights).items():
            assert torch.equal(weights[key], weight), key
    remove_adapter(model)
    assert all(torch.equal(weight, before[key]) for key, weight in model.named_parameters())

    compress(folders[0], tmp_path / "small", "topk", keep=0.5)
    compose([folders[0], tmp_path / "small"], tmp_path / "sum")
    for name in ("small", "sum"):
        assert Adapter.open(tmp_path / name).vocabulary == (260, 263)
        assert len(AutoTokenizer.from_pretrained(tmp_path / name / "tokenizer")) == 263
    with pytest.raises(UserError):
        compose(folders, tmp_path / "mixed")
    with pytest.raises(UserError):
        export_peft(folders[0], tmp_path / "peft")


@pytest.mark.parametrize("mask", [{}, PERIODIC, DROP_GROW], ids=["static", "periodic", "drop_grow"])
def test_resumed_is_uninterrupted(ranks, recipe, mask):
    assert_resumed_is_uninterrupted(
        ranks, lambda folder: recipe(folder, mask=mask, train={"steps": 8}), stop=5
    )


def test_any_number_of_ranks_goes_on(ranks, recipe):
    whole = ranks(2)(run_piece, recipe=recipe("whole"), stop=5)[0]
    checkpoint, losses = None, []
    for world_size, stop in ((1, 2), (2, 3), (4, 5)):
        arguments = {"recipe": recipe(f"to {stop}"), "stop": stop, "checkpoint": checkpoint}
        piece = ranks(world_size)(run_piece, **arguments)[0]
        checkpoint, losses = piece["checkpoint"], losses + piece["losses"]
    assert losses == pytest.approx(whole["losses"], abs=1e-5)


def test_refused(ranks, recipe, tmp_path):
    for tokens in (["please", "please"], [""], []):
        with pytest.raises(ValidationError):
            recipe(tokens=tokens)
    for sections in (
        {"method": {"name": "full"}},
        {"model": {"task": "sequence_classification"}, "data": {"format": "classification"}},
    ):
        with pytest.raises(ValidationError):
            recipe(**sections)
    for known in ("a", "</s>"):
        with pytest.raises(UserError) as error:
            recipe_tokenizer(recipe(tokens=["please", known]))
        assert "model.add_tokens" in error.value.where
    for mask in ({"dense": ["embed_tokens"]}, {"targets": ["lm_head", "q_proj"]}):
        assert "model.add_tokens" in ranks(1)(refusal, recipe=recipe(mask=mask))[0]


def refusal(recipe):
    """Where the error says that the recipe is wrong."""
    with pytest.raises(UserError) as error:
        start(recipe)
    return error.value.where


def test_rows_in_the_cache_have_their_tokens(recipe):
    paths = {DatasetSpec.from_recipe(recipe(tokens=tokens)).path() for tokens in (None, TOKENS, TOKENS[:2])}
    assert len(paths) == 3
