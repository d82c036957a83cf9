"""Merging, against dense sums of whole matrices: the files, what transformers loads, what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from speft_ds import apply_adapter
from speft_ds.adapter import merge as module
from speft_ds.adapter.format import Adapter
from speft_ds.adapter.merge import merge, parse_size
from speft_ds.errors import UserError
from unit.adapter.samples import assert_same, load, make_adapter, trained, values


def tensors(folder):
    return {
        key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpoint", ["untied", "tied"])
def test_a_merged_checkpoint_is_the_trained_model(tiny, tmp_path, checkpoint, dtype):
    base = tiny[checkpoint]
    adapter = make_adapter(tmp_path / "a", base, dtype)
    done = merge(None, adapter, tmp_path / "merged")
    assert (done.folder, done.note) == (tmp_path / "merged", None)
    stored = tensors(base)
    assert_same(tensors(tmp_path / "merged"), trained(adapter, {k: v.to(dtype) for k, v in stored.items()}))
    assert done.num_bytes == sum(value.numel() * dtype.itemsize for value in stored.values())
    # In transformers, without a word about the dtype: what apply_adapter makes of the base, and its logits.
    model, live = AutoModelForCausalLM.from_pretrained(done.folder), load(base, dtype)
    apply_adapter(live, adapter)
    assert_same(values(model), values(live))
    ids = torch.arange(40).view(2, 20)
    assert torch.equal(model(ids).logits, live(ids).logits)
    tokens = [AutoTokenizer.from_pretrained(folder)("a b").input_ids for folder in (base, done.folder)]
    assert tokens[0] == tokens[1]
    assert {path.name for path in done.folder.iterdir()} == {path.name for path in base.iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "merged"]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_interpolated_in_another_dtype(tiny, tmp_path, alpha, dtype):
    """The base as the run saw it, in bfloat16, and fp32 sums, each rounded once."""
    adapter = make_adapter(tmp_path / "a", tiny["untied"], torch.bfloat16)
    merge(tiny["untied"], adapter, tmp_path / "merged", alpha, dtype)
    seen = {key: value.bfloat16() for key, value in tensors(tiny["untied"]).items()}
    assert_same(tensors(tmp_path / "merged"), trained(adapter, seen, alpha, getattr(torch, dtype)))
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == dtype and "torch_dtype" not in config


def test_files_are_split_as_the_bases_or_as_asked_for(tiny, tmp_path):
    load(tiny["untied"]).save_pretrained(tmp_path / "base", max_shard_size="50KB")
    names = {path.name for path in (tmp_path / "base").glob("*.safetensors")}
    assert len(names) > 2
    adapter = make_adapter(tmp_path / "a", tmp_path / "base")
    expected = trained(adapter, tensors(tiny["untied"]))
    merge(None, adapter, tmp_path / "same")
    assert {path.name for path in (tmp_path / "same").glob("*.safetensors")} == names
    merge(None, adapter, tmp_path / "one", max_shard_size="1GB")
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]
    merge(tiny["untied"], adapter, tmp_path / "many", max_shard_size=20_000)
    assert all(path.stat().st_size < 41_000 for path in (tmp_path / "many").glob("*.safetensors"))
    for name in ("same", "one", "many"):
        assert_same(tensors(tmp_path / name), expected)
        assert_same(values(load(tmp_path / name)), expected)


def test_a_checkpoint_of_the_decoder_alone(tiny, tmp_path):
    """Its keys have no `model.` in front."""
    LlamaModel.from_pretrained(tiny["tied"]).save_pretrained(tmp_path / "base")
    assert "norm.weight" in tensors(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", tmp_path / "base")
    assert merge(None, adapter, tmp_path / "merged").note is None
    assert tensors(tmp_path / "merged").keys() == tensors(tmp_path / "base").keys()
    assert_same(values(load(tmp_path / "merged")), trained(adapter, values(load(tmp_path / "base"))))


@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("kind", ["pytorch_model.bin", "converted keys"])
def test_other_checkpoints_are_loaded_whole(tiny, tmp_path, kind, dtype):
    base = tmp_path / "base"
    if kind == "converted keys":  # experts are apart in the files, and stacked in the model
        sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = MixtralConfig(vocab_size=32, num_key_value_heads=1, num_local_experts=2, **sizes)
        MixtralForCausalLM(config).save_pretrained(base)
    else:
        shutil.copytree(tiny["untied"], base)
        torch.save(load_file(base / "model.safetensors"), base / kind)
        (base / "model.safetensors").unlink()
    adapter = make_adapter(tmp_path / "a", base)
    done = merge(None, adapter, tmp_path / "merged", 0.5, dtype)
    assert ("safetensors" if kind == "pytorch_model.bin" else "converted") in done.note
    out = getattr(torch, dtype or "float32")
    model = AutoModelForCausalLM.from_pretrained(done.folder)
    assert_same(values(model), trained(adapter, values(load(base)), 0.5, out))
    other = make_adapter(tmp_path / "b", base, fingerprint="0" * 64)
    refuse(tmp_path, "another base", None, other)


def test_a_classifier_is_merged_with_its_head(tiny, tmp_path):
    torch.manual_seed(0)
    kind, classes = AutoModelForSequenceClassification, ["no", "maybe", "yes"]
    plain = kind.from_pretrained(tiny["untied"], num_labels=3)
    facts = {"classes": classes, "pad_token_id": 7, "task": "sequence_classification"}
    heads = {"score.weight": torch.randn(3, 35)}
    adapter = make_adapter(tmp_path / "a", tiny["untied"], model=plain, heads=heads, **facts)
    merge(None, adapter, tmp_path / "merged", dtype="bfloat16")
    merged = kind.from_pretrained(tmp_path / "merged")
    assert "lm_head.weight" not in tensors(tmp_path / "merged")
    expected = trained(adapter, values(plain), dtype=torch.bfloat16)
    assert_same(values(merged), {**expected, "score.weight": heads["score.weight"].bfloat16()})
    assert merged.config.id2label == dict(enumerate(classes)) and merged.config.num_labels == 3
    assert merged.config.architectures == ["LlamaForSequenceClassification"]
    assert (merged.config.pad_token_id, merged.config.label2id["yes"]) == (7, 2)


def refuse(tmp_path, message, base, adapter, name="refused", **options):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        merge(base, adapter, tmp_path / name, **options)
    assert message in str(caught.value), str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_cannot_be_merged_is_refused(tiny, tmp_path, monkeypatch):
    adapter = make_adapter(tmp_path / "a", tiny["untied"])
    other = tmp_path / "other"
    shutil.copytree(tiny["untied"], other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-7
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    refuse(tmp_path, "another base", other, adapter)
    narrow = {name: [1, 2**20] for name in Adapter.open(adapter).names}
    refuse(tmp_path, "another model", None, make_adapter(tmp_path / "b", tiny["untied"], shapes=narrow))
    refuse(tmp_path, "is there already", None, adapter, "other")
    refuse(tmp_path, "not at hand", "nobody/nothing", adapter)
    refuse(tmp_path, "dtype", None, adapter, dtype="int8")
    refuse(tmp_path, "alpha", None, adapter, alpha=float("nan"))
    refuse(tmp_path, "no size", None, adapter, max_shard_size="large")
    large = make_adapter(tmp_path / "c", tiny["untied"], scale=1e6)
    refuse(tmp_path, "too large", None, large, dtype="float16")
    (other / "config.json").write_text("{}")
    refuse(tmp_path, "cannot read the model", other, adapter)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50_000))
    refuse(tmp_path, "free space", None, adapter)


def test_what_reads_back_differently_does_not_count(tiny, tmp_path, monkeypatch):
    adapter, write = make_adapter(tmp_path / "a", tiny["untied"]), module.write_tensors
    size = (tiny["untied"] / "model.safetensors").stat().st_size
    for position in (20_000, size // 2, size - 1):

        def damaged(path, headers, tensors, position=position):
            write(path, headers, tensors)
            content = bytearray(path.read_bytes())
            content[position] ^= 1
            path.write_bytes(content)

        monkeypatch.setattr(module, "write_tensors", damaged)
        refuse(tmp_path, "read back differs", None, adapter)


def test_sizes():
    assert [parse_size(text) for text in (None, 7, "7", "5GB", "1.5 mb")] == [
        None,
        7,
        7,
        5 * 10**9,
        1_500_000,
    ]
