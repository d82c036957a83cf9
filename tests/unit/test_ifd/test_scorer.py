"""The scorer: what cannot be loaded, pickled weights, models of the hub."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from speft_ds.data.ifd import ifd_scores
from speft_ds.errors import UserError
from unit.test_ifd.made import PAIRS


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
