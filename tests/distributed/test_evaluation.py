"""lm-eval on the live engine against lm-eval's own HFLM on the plain model, document by document."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from families import make_family
from tiny import VOCABULARY, make_model, make_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from distributed import evaluation_checks, low_bits_checks
from distributed.reference import make_recipe

POSITIONS = 1024
NUM_DOCUMENTS = 13
TASKS = ["long_generate", "long_choice", "long_letters", "long_likelihood", "long_rolling"]
ANSWERS = {
    "long_generate": {
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["</s>", "\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "long_choice": {
        "output_type": "multiple_choice",
        "doc_to_target": 0,
        "doc_to_choice": ["{{response}}", "zebra", "yak 1", "ox"],
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "long_letters": {
        "output_type": "multiple_choice",
        "doc_to_target": 0,
        "doc_to_choice": ["a", "b", "c", "d"],
        "gen_prefix": "It is",
        "metric_list": [{"metric": "acc"}],
    },
    "long_likelihood": {"output_type": "loglikelihood", "metric_list": [{"metric": "acc"}]},
    "long_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_target": "{{prompt}} {{prompt}} {{response}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
}


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """Tasks with prompts of 342 to 700 tokens, examples in a split of their own, and a model for them."""
    folder = tmp_path_factory.mktemp("long")
    words = ["ant", "bear", "cat", "dromedary", "eel"]
    for split, count in (("test", 17), ("train", 9)):
        rows = [
            {
                "prompt": f"say {words[n % 5]} {'please ' * (49 + n * 3)}",
                "response": f"{words[n % 5]} {n % 3}",
            }
            for n in range(count)
        ]
        for row in rows if split == "train" else ():
            row["prompt"] = row["prompt"][:60]  # three of them and a question fit
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir()
    for name, answer in ANSWERS.items():
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {s: str(folder / f"{s}.jsonl") for s in ("test", "train")}},
            "test_split": "test",
            "fewshot_split": "train",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{response}}",
        }
        (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump({**task, **answer}, sort_keys=False))
    config = make_model(folder / "model") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": POSITIONS}))
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A tiny GPT-2, whose linears are Conv1D."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gpt2")
    sizes = {"n_positions": POSITIONS, "n_embd": 36, "n_layer": 2, "n_head": 2, "initializer_range": 0.1}
    GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def recipe_for(tiny, long, folder, **more):
    section = {"tasks": TASKS, "include_path": str(long / "tasks"), "batch_size": 4, "limit": NUM_DOCUMENTS}
    return make_recipe({**tiny, "long": long / "model"}, folder, checkpoint="long", eval={**section, **more})


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_base_in_few_bits_scores_as_its_decoded_weights_do(ranks, tiny, long, tmp_path, world_size):
    recipe = recipe_for(tiny, long, tmp_path, chat_template=True)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"base_format": "nf4"})})
    (got,) = ranks(world_size)(evaluation_checks.check_evaluation, recipe=recipe)[0]
    wanted = ranks(1)(evaluation_checks.check_stock_evaluation, recipe=recipe)[0]
    assert got["samples"] == wanted["samples"] and got["results"] == wanted["results"]
    assert got["document"]["settings"]["mode"] == "sharded"


@pytest.fixture(scope="module")
def stock(ranks, tiny, long, tmp_path_factory):
    """By whether in the chat template: stock scores without and with 3 examples in the prompts."""
    check, folder = evaluation_checks.check_stock_evaluation, tmp_path_factory.mktemp("stock")
    return {
        chat: [
            ranks(1)(check, recipe=recipe_for(tiny, long, folder, chat_template=chat), num_fewshot=shots)[0]
            for shots in (None, 3)
        ]
        for chat in (True, False)
    }


@pytest.mark.parametrize(
    ("world_size", "mode", "chat"),
    [
        (1, "sharded", True),
        (1, "gathered", False),
        (1, "auto", False),
        (2, "gathered", True),
        (2, "sharded", True),
        (2, "sharded", False),
        (4, "auto", True),
    ],
)
def test_scores_are_those_of_stock_lm_eval(ranks, tiny, long, tmp_path, stock, world_size, mode, chat):
    """Every document once, the same prompts and, bit for bit, the same answers, zero-shot and in turns."""
    recipe = recipe_for(tiny, long, tmp_path, mode=mode, manual_fewshot=[3], chat_template=chat)
    results = ranks(world_size)(evaluation_checks.check_evaluation, recipe=recipe)
    assert results[1:] == [None] * (world_size - 1)
    assert [each["document"]["label"] for each in results[0]] == ["before", "before-3shot"]
    for got, wanted in zip(results[0], stock[chat], strict=True):
        assert got["samples"] == wanted["samples"] and got["results"] == wanted["results"]
        assert got["document"]["settings"]["mode"] == ("gathered" if mode == "auto" else mode)
        documents = {task: [number for number, *_ in rows] for task, rows in got["samples"].items()}
        assert documents == {task: list(range(NUM_DOCUMENTS)) for task in TASKS}
    prompts = [got["samples"]["long_choice"][0][1][0][0] for got in results[0]]  # one token a byte
    assert 341 < len(prompts[0]) < len(prompts[1]) < POSITIONS and ("<s>" in prompts[0]) == chat


@pytest.mark.parametrize(
    ("weights", "activations", "model"),
    [("bfp6", "bfp8", "long"), ("mxfp4", None, "gpt2"), (None, "nf4", "gpt2")],
)
def test_scores_in_few_bits_are_those_of_weights_replaced_by_hand(
    ranks, tiny, long, gpt2, tmp_path, weights, activations, model
):
    """Every answer, on one rank and two, sharded and gathered; GPT-2's weights are stored [in, out]."""
    tasks = ["long_generate", "long_choice"]
    more = {"chat_template": False, "tasks": tasks, "include_path": str(long / "tasks"), "batch_size": 4}
    more["limit"] = 3
    paths = {**tiny, "long": long / "model", "gpt2": gpt2}
    recipe = make_recipe(paths, tmp_path, checkpoint=model, eval=more)
    formats = {"weights": weights, "activations": activations}
    (wanted,) = ranks(1)(low_bits_checks.check_stock_low_bits, recipe=recipe, **formats)
    for world_size, mode in ((1, "sharded"), (2, "sharded" if model == "long" else "gathered")):
        recipe = make_recipe(paths, tmp_path, checkpoint=model, eval={**more, "mode": mode})
        results = ranks(world_size)(low_bits_checks.check_low_bits, recipe=recipe, **formats)
        ((got,), *_) = results
        assert got["samples"] == wanted["samples"] and got["results"] == wanted["results"]
        settings = got["document"]["settings"]
        assert {what: settings[what] for what in formats} == formats
        said = " ".join(got["document"]["notes"])
        assert all((name or "") in said for name in formats.values())
        if weights:
            assert ("wte" if model == "gpt2" else "embed_tokens") in said  # what stays as it is


def test_a_base_that_is_stored_in_few_bits_may_have_its_inputs_in_few_bits(ranks, tiny, long, tmp_path):
    more = {"chat_template": False, "tasks": ["long_choice"], "include_path": str(long / "tasks"), "limit": 3}
    paths = {**tiny, "long": long / "model"}
    formats = {"weights": "nf4", "activations": "bfp8"}
    recipe = make_recipe(paths, tmp_path, checkpoint="long", eval=more)
    (wanted,) = ranks(1)(low_bits_checks.check_stock_low_bits, recipe=recipe, **formats)
    recipe = make_recipe(paths, tmp_path, checkpoint="long", eval=more, model={"base_format": "nf4"})
    formats["weights"] = None
    ((got,), _) = ranks(2)(low_bits_checks.check_low_bits, recipe=recipe, **formats)
    assert got["samples"] == wanted["samples"]


@pytest.mark.parametrize(("family", "transposed"), [("mixtral", False), ("gpt_oss", True), ("jetmoe", None)])
def test_experts_are_rounded_along_their_inputs(ranks, tiny, tmp_path, family, transposed):
    """Where transformers says which these are; else they stay as they are, and it is said."""
    tiny = {**tiny, family: make_family(tmp_path / family, family)}
    recipe = make_recipe(tiny, tmp_path, checkpoint=family)
    results = ranks(2)(
        low_bits_checks.check_rounded_weights, recipe=recipe, name="bfp4", transposed=transposed
    )
    for unlike, said in results:
        assert unlike == set()
        assert ("experts" in said) == (transposed is None) and "embed_tokens" in said


def test_the_perplexity_of_a_text_has_more_digits_than_bfloat16(ranks, tiny, tmp_path):
    """Added up in bfloat16, the log-likelihood of these 240 tokens would be a multiple of 8."""
    (tmp_path / "text.txt").write_text(("Of cats and mats, of hats and bats. " * 9)[:240])
    own = {"tasks": [], "forgetting_text": str(tmp_path / "text.txt")}
    recipe = make_recipe(tiny, tmp_path, model={"dtype": "bfloat16"}, eval=own)
    ((got, wanted), _) = ranks(2)(evaluation_checks.check_perplexity, recipe=recipe)
    assert got == pytest.approx(wanted, rel=1e-5)


def test_what_happened_is_counted(ranks, tiny, tmp_path):
    """Prompts that 256 positions do not hold, answers that the limit of tokens ends; from the cache, too."""
    rows = [{"prompt": "x" * length, "response": "y"} for length in (10, 251, 252, 253, 400)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"test": str(tmp_path / "rows.jsonl")}
    task = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
    task |= {"doc_to_text": "{{prompt}}", "doc_to_target": "abcd", "target_delimiter": ""}
    settings = {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}}
    for name, more in (("long_generate", settings), ("long_likelihood", {})):
        own = {"task": name, **task, **ANSWERS[name], **more}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(own))
    section = {"tasks": ["long_generate", "long_likelihood"], "include_path": str(tmp_path), "batch_size": 2}
    recipe = make_recipe(tiny, tmp_path, eval={**section, "chat_template": False})
    base = {"adapter": None, "of": str(tmp_path)}
    for is_cached in (False, True):
        ((scored,), _) = ranks(2)(evaluation_checks.check_evaluation, recipe=recipe, of=base)
        document = scored["document"]
        assert document["cached"] == is_cached
        counted = [note.split(" ")[:4] for note in document["notes"]]
        assert counted == [
            ["long_generate:", "2", "of", "5"],  # 253 and 400: 252 leave room for 4
            ["long_likelihood:", "1", "of", "5"],  # 400: one token more than 256 is predicted, not read
            ["long_generate:", "5", "of", "5"],
        ]


def test_answers_are_exchanged_once_for_all_batches(ranks):
    """Between batches, which are computed two at a time, one number is reduced: whether to stop."""
    for num_batches in (2, 9):
        rounds = -(-num_batches // 2)
        for counts in ranks(2)(evaluation_checks.count_exchanges, num_batches=num_batches):
            assert counts == {"all_reduce": rounds, "all_gather_object": 1}


def test_all_ranks_stop_before_the_same_batch(ranks):
    for counts in ranks(2)(evaluation_checks.count_exchanges, num_batches=9, stops_before=4):
        assert counts == {"all_reduce": 3, "all_gather_object": 1, "stopped after": 2}


def test_answers_that_cannot_be_kept_are_not_lost(ranks, tiny, long, tmp_path):
    recipe = recipe_for(tiny, long, tmp_path, tasks=["long_choice"])
    answers = Path(os.environ["SPEFT_DS_CACHE"]) / "answers"
    if answers.exists():
        answers.rename(tmp_path / "answers")
    answers.write_text("no folder")
    try:
        ((scored,), _) = ranks(2)(evaluation_checks.check_evaluation, recipe=recipe, of={"adapter": None})
    finally:
        answers.unlink()
    (note,) = scored["document"]["notes"]
    assert str(answers) in note and scored["results"]["long_choice"]["acc,none"] >= 0
