"""IFD scores against a reference that has no batches, no padding and no cut logits; cache; choice of rows."""

import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny as tiny_model
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from speft_ds.data import ifd
from speft_ds.data.ifd import choose, cut, ifd_scores
from speft_ds.errors import UserError

PAIRS = [
    ("say cat ", "cat 1"),
    ("", "a response without any prompt"),
    ("x", "y"),
    ("please " * 20, "e"),
    ("a", "long " * 30),
    ("héllo wörld ", "ünïcode ✓ done"),
    ("say eel please ", "eel 4, and then a few words more"),
    ("<s>a prompt that brings its own first token ", "fox 2"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for each test, and the CPU's fp32 on any machine."""
    monkeypatch.setenv("SPEFT_DS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is so small that threads would mostly wait for each other
    yield tmp_path / "cache" / "ifd"
    torch.set_num_threads(num_threads)


@pytest.fixture
def scorer(tiny, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny["untied"], tmp_path / "scorer"))


@pytest.fixture
def loads(monkeypatch):
    """Counts the models that are loaded."""
    counted, original = [], AutoModelForCausalLM.from_pretrained

    def counting(*args, **options):
        counted.append(args)
        return original(*args, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counting)
    return counted


def mean_loss(model, ids, num_labels):
    """Of the last `num_labels` tokens of one row: every logit, nothing padded."""
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    losses = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    return losses[-num_labels:].mean()


@torch.no_grad()
def reference(folder, id_pairs, first):
    """IFD of each (prompt ids, response ids)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    scores = []
    for prompt, response in id_pairs:
        with_prompt = mean_loss(model, [first, *prompt, *response], len(response))
        alone = mean_loss(model, [first, *response], len(response))
        scores.append(float(with_prompt.exp() / alone.exp()))
    return scores


def token_ids(folder, pairs):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tuple(tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair) for pair in pairs]


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_scores_equal_the_reference(tiny):
    ids = token_ids(tiny["untied"], PAIRS)
    assert ids[-1][0][0] == 256  # this prompt's own BOS is not doubled
    ids[-1] = (ids[-1][0][1:], ids[-1][1])
    scores = ifd_scores(PAIRS, tiny["untied"])
    assert scores == pytest.approx(reference(tiny["untied"], ids, first=256), rel=1e-5)
    assert scores[1] == 1.0  # no prompt, no help
    assert len({round(score, 4) for score in scores}) == len(PAIRS)


def test_other_rows_of_a_batch_do_not_matter(tiny, monkeypatch):
    together = ifd_scores(PAIRS, str(tiny["tied"]))
    monkeypatch.setattr(ifd, "_read_cache", lambda *_: None)
    assert ifd_scores(PAIRS[::-1], tiny["tied"])[::-1] == pytest.approx(together, rel=1e-5)
    monkeypatch.setitem(ifd.BATCH_TOKENS, "cpu", 1)  # row by row
    assert ifd_scores(PAIRS, tiny["tied"]) == pytest.approx(together, rel=1e-5)


def test_batches_are_longest_first_and_bounded():
    rows = [ifd.Row([0] * length, [(1, length)]) for length in (3, 9, 4, 2, 9, 50)]
    batches = list(ifd._batches(rows, 20))
    assert batches == [[5], [1, 4], [2, 0, 3]]


def test_a_model_without_logits_to_keep(tiny, monkeypatch):
    expected = ifd_scores(PAIRS, tiny["untied"])
    original = LlamaForCausalLM.forward

    def forward(self, input_ids, use_cache):
        return original(self, input_ids=input_ids, use_cache=use_cache)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    monkeypatch.setattr(ifd, "_read_cache", lambda *_: None)
    assert ifd_scores(PAIRS, tiny["untied"]) == pytest.approx(expected, rel=1e-5)


def test_long_texts_are_cut_to_the_context(tiny):
    prompt, response = "".join(map(chr, range(33, 113))) * 8, "the quick brown fox " * 30
    pairs = [(prompt, "short ones"), ("short", response), (prompt, response)]
    (p, short_r), (short_p, r), _ = token_ids(tiny["untied"], pairs)
    # 256 tokens, one of them BOS: the prompt loses its middle, the response its end.
    ids = [(p[:123] + p[-122:], short_r), (short_p, r[:250]), (p[:64] + p[-64:], r[:127])]
    assert all(len(prompt_ids) + len(response_ids) == 255 for prompt_ids, response_ids in ids)
    expected = reference(tiny["untied"], ids, first=256)
    assert ifd_scores(pairs, tiny["untied"]) == pytest.approx(expected, rel=1e-5)


def test_a_long_context_is_cut_to_the_limit(tiny, monkeypatch):
    monkeypatch.setattr(ifd, "MAX_TOKENS", 32)
    pair = ("p" * 5, "".join(map(chr, range(40, 120))))
    ((p, r),) = token_ids(tiny["untied"], [pair])
    expected = reference(tiny["untied"], [(p, r[:26])], first=256)
    assert ifd_scores([pair], tiny["untied"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("room", [2, 3, 4, 7, 8, 17])
def test_cut(room):
    for num_prompt, num_response in itertools.product(range(9), range(1, 9)):
        prompt, response = list(range(num_prompt)), list(range(100, 100 + num_response))
        short_prompt, short_response = cut(prompt, response, room)
        assert len(short_prompt) + len(short_response) == min(room, num_prompt + num_response)
        assert short_response and short_response == response[: len(short_response)]
        assert len(short_response) >= min(num_response, room // 2)
        half = len(short_prompt) // 2
        assert short_prompt[:half] == prompt[:half]
        assert not half or short_prompt[-half:] == prompt[-half:]


def test_without_bos_the_first_token_is_eos(scorer):
    tokenizer = tiny_model.make_tokenizer()
    tokenizer.bos_token = None
    tokenizer.save_pretrained(scorer)
    expected = reference(scorer, token_ids(scorer, PAIRS[:4]), first=257)
    assert ifd_scores(PAIRS[:4], scorer) == pytest.approx(expected, rel=1e-5)


def test_neither_bos_nor_eos(scorer):
    tokenizer = tiny_model.make_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(scorer)
    with pytest.raises(UserError, match="neither a BOS nor an EOS") as caught:
        ifd_scores(PAIRS, scorer)
    assert caught.value.where == "data.scorer" and caught.value.fix


def test_a_second_call_reads_the_cache(tiny, cache, loads):
    scores = ifd_scores(PAIRS, tiny["untied"])
    assert len(loads) == 1
    assert ifd_scores(list(map(list, PAIRS)), str(tiny["untied"])) == scores
    assert len(loads) == 1
    assert [path.suffix for path in cache.iterdir()] == [".json"]


def test_the_key_is_the_content(tiny, scorer, cache, loads):
    original = ifd_scores(PAIRS, tiny["untied"])
    assert ifd_scores(PAIRS, scorer) == original and len(loads) == 1  # a copy elsewhere

    def other_head(weights):
        weights["lm_head.weight"][0, 0] += 1

    stamp = (scorer / "model.safetensors").stat().st_mtime_ns
    size = (scorer / "model.safetensors").stat().st_size
    edit_weights(scorer, other_head)
    os.utime(scorer / "model.safetensors", ns=(stamp, stamp))
    assert (scorer / "model.safetensors").stat().st_size == size
    assert ifd_scores(PAIRS, scorer) != original and len(loads) == 2

    for number, name in enumerate(["config.json", "tokenizer_config.json"], 3):
        document = json.loads((scorer / name).read_text())
        (scorer / name).write_text(json.dumps(document | {"note": "changed"}))
        ifd_scores(PAIRS, scorer)
        assert len(loads) == number
    other_pairs = [PAIRS[::-1], PAIRS[1:], [*PAIRS[1:], ("say cat c", "at 1")]]
    for number, pairs in enumerate(other_pairs, 5):
        ifd_scores(pairs, scorer)
        assert len(loads) == number
    assert len(list(cache.iterdir())) == 7


def test_every_shard_is_in_the_key(tiny, scorer, loads):
    whole = ifd_scores(PAIRS, scorer)
    AutoModelForCausalLM.from_pretrained(scorer).save_pretrained(scorer, max_shard_size="40KB")
    (scorer / "model.safetensors").unlink()
    shards = sorted(scorer.glob("model-*.safetensors"))
    assert len(shards) > 1
    loads.clear()
    assert ifd_scores(PAIRS, scorer) == pytest.approx(whole, rel=1e-6) and len(loads) == 1
    weights = load_file(shards[-1])
    next(iter(weights.values())).view(-1)[0] += 0.5
    save_file(weights, shards[-1], {"format": "pt"})
    ifd_scores(PAIRS, scorer)
    assert len(loads) == 2


@pytest.mark.parametrize("damage", ["cut", "digit", "empty", "list", "other rows", "not utf-8", "folder"])
def test_a_damaged_file_is_not_trusted(tiny, cache, loads, damage):
    scores = ifd_scores(PAIRS[:3], tiny["untied"])
    (path,) = cache.iterdir()
    text = path.read_text()
    shorter = {"scores": [0.5], "sha256": ifd._hash_json([0.5])}
    damaged = {
        "cut": text[: len(text) // 2],
        "digit": text.replace(repr(scores[0]), repr(scores[0] + 1e-9)),
        "empty": "",
        "list": "[1, 2]",
        "other rows": json.dumps(shorter),
        "not utf-8": None,
        "folder": None,
    }[damage]
    if damage == "folder":
        path.unlink()
        path.mkdir()
        with pytest.warns(UserWarning, match="not kept"):
            assert ifd_scores(PAIRS[:3], tiny["untied"]) == scores
        assert list(cache.iterdir()) == [path]
        return
    assert damaged != text
    path.write_bytes(b"\xff\xfe" if damaged is None else damaged.encode())
    assert ifd_scores(PAIRS[:3], tiny["untied"]) == scores and len(loads) == 2
    assert path.read_text() == text and list(cache.iterdir()) == [path]


def test_a_full_disk_does_not_cost_the_scores(tiny, cache, monkeypatch):
    def full(path, document):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ifd, "write_json", full)
    with pytest.warns(UserWarning, match="No space left"):
        scores = ifd_scores(PAIRS[:2], tiny["untied"])
    assert len(scores) == 2 and not cache.exists()


RACER = """
import sys, time
from pathlib import Path
from speft_ds.data import ifd

folder, arrived, value = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])

def read_together(path, num_rows, read=ifd._read_cache):
    scores = read(path, num_rows)
    (arrived / sys.argv[3]).touch()
    while len(list(arrived.iterdir())) < 2:
        time.sleep(0.005)
    return scores

ifd._read_cache = read_together
ifd._load, ifd._score = lambda *_: (None, None), lambda pairs, *_: [value] * len(pairs)
assert ifd.ifd_scores([("a", "b")] * 2000, folder) == [value] * 2000
"""


def test_two_processes_race(tiny, tmp_path, cache, loads):
    """Both find nothing, both compute and write. They write different scores here, to be told apart."""
    (tmp_path / "arrived").mkdir()
    command = [sys.executable, "-c", RACER, str(tiny["untied"]), str(tmp_path / "arrived")]
    root = Path(ifd.__file__).parents[1]
    racers = [subprocess.Popen([*command, value], cwd=root) for value in ("0.25", "0.75")]
    assert [racer.wait(120) for racer in racers] == [0, 0]
    assert len(list(cache.iterdir())) == 1  # nothing temporary is left
    scores = ifd_scores([("a", "b")] * 2000, tiny["untied"])
    assert set(scores) in ({0.25}, {0.75}) and len(scores) == 2000 and not loads


def test_a_reader_never_sees_half_a_file(tmp_path):
    path, scores = tmp_path / "key.json", [random.random() for _ in range(2000)]
    ifd._write_cache(path, scores)
    writers = [
        threading.Thread(target=lambda: [ifd._write_cache(path, scores) for _ in range(10)]) for _ in range(4)
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert ifd._read_cache(path, 2000) == scores
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("seed", range(4))
def test_choice_equals_a_naive_sort(seed):
    draw = random.Random(seed)
    scores = [draw.choice([0.1, 0.5, 0.5, 0.9, draw.uniform(0, 2), 1.0, 1.5]) for _ in range(30)]
    for k in range(32):
        left, naive = dict(enumerate(scores)), []
        while left and len(naive) < k:
            best = min(left, key=lambda number: (-left[number], number))
            if left.pop(best) < 1:
                naive.append(best)
            # those of 1 or more come first and are passed over
        assert choose(scores, k) == sorted(naive)


def test_choice_leaves_out_rows_that_do_not_follow_from_their_prompt():
    assert choose([1.0, 0.2, 3.0, 0.9, 0.2], 2) == [1, 3]
    assert choose([1.0, 0.2, 3.0], 2) == [1]
    assert choose([1.0], 1) == [] and choose([], 3) == []


def test_no_rows(tiny):
    assert ifd_scores([], tiny["untied"]) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_without_a_finite_loss_is_named(scorer, value):
    z = AutoTokenizer.from_pretrained(scorer)("z")["input_ids"][0]

    def poison(weights):
        weights["model.embed_tokens.weight"][z] = value

    edit_weights(scorer, poison)
    assert len(ifd_scores(PAIRS, scorer)) == len(PAIRS)  # padding and other rows are not touched
    with pytest.raises(UserError, match="row 2: the scorer's loss on it is nan") as caught:
        ifd_scores([("say a", "a b c d e f"), ("say z", "ok"), ("x", "y")], scorer)
    assert caught.value.where == "data.scorer" and caught.value.fix


def test_a_ratio_beyond_float_is_limited(tiny, monkeypatch):
    losses = iter([[2000.0, 0.0], [1.0, 2000.0]])
    monkeypatch.setattr(ifd, "_mean_losses", lambda *_: next(losses))
    scores = ifd_scores(PAIRS[:2], tiny["untied"])
    assert scores[0] > 1e300 and scores[1] == 0.0
    assert ifd_scores(PAIRS[:2], tiny["untied"]) == scores  # and comes back from the cache


def test_an_empty_response_is_named(tiny):
    with pytest.raises(UserError, match="row 2: the response has no tokens"):
        ifd_scores([("a", "b"), ("a", "")], tiny["untied"])


def _edit_config(folder, **values):
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | values))


DAMAGES = {
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "cut weights": lambda folder: os.truncate(folder / "model.safetensors", 30_000),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "bad config": lambda folder: (folder / "config.json").write_text("{"),
    "other config": lambda folder: _edit_config(folder, hidden_size=40),
    "a layer missing": lambda folder: _edit_config(folder, num_hidden_layers=3),
    "unknown model": lambda folder: _edit_config(folder, model_type="nonsense"),
    "bad tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "dangling link": lambda folder: (folder / "more.safetensors").symlink_to(folder / "nowhere"),
    "no folder": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_scorer_that_cannot_be_loaded(scorer, damage):
    DAMAGES[damage](scorer)
    with pytest.raises(UserError, match="cannot load the scorer") as caught:
        ifd_scores(PAIRS, scorer)
    assert caught.value.where == "data.scorer" and caught.value.fix and str(scorer) in caught.value.what


def test_pickled_weights(tiny, scorer, loads):
    weights = load_file(scorer / "model.safetensors")
    (scorer / "model.safetensors").unlink()
    torch.save(weights, scorer / "pytorch_model.bin")
    assert ifd_scores(PAIRS, scorer) == pytest.approx(ifd_scores(PAIRS, tiny["untied"]), rel=1e-6)
    weights["lm_head.weight"][0, 0] += 1
    torch.save(weights, scorer / "pytorch_model.bin")
    ifd_scores(PAIRS, scorer)
    assert len(loads) == 3


@pytest.mark.parametrize("pickled", [False, True])
def test_a_model_of_the_hub_is_downloaded(tiny, scorer, monkeypatch, pickled):
    asked = []

    def download(name, allow_patterns, ignore_patterns):
        asked.append((name, "*.safetensors" in allow_patterns, "*.bin" in allow_patterns))
        return str(scorer)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    if pickled:
        torch.save(load_file(scorer / "model.safetensors"), scorer / "pytorch_model.bin")
        (scorer / "model.safetensors").unlink()
    assert ifd_scores(PAIRS, "some/model") == pytest.approx(ifd_scores(PAIRS, tiny["untied"]), rel=1e-6)
    only_safe = [("some/model", True, False)]
    assert asked == ([*only_safe, ("some/model", False, True)] if pickled else only_safe)


def test_a_hub_out_of_reach(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(name, **options):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match="cannot load the scorer some/model: no connection") as caught:
        ifd_scores(PAIRS, "some/model")
    assert caught.value.where == "data.scorer" and caught.value.fix
