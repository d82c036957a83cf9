"""The export for PEFT, in stock PEFT: the weights and the logits of the trained model, bit for bit."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file

from speft_ds import apply_adapter
from speft_ds.adapter.export import export_peft, find_sparsity, peft_count, summands_for
from speft_ds.adapter.format import Adapter
from unit.adapter.samples import (
    UP1,
    assert_same,
    classifier,
    facts_of,
    load,
    make_adapter,
    make_classifier,
    refused,
    values,
    write,
)

needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason='PEFT is not installed: pip install "speft_ds[peft]"'
)
IDS = torch.arange(40).view(2, 20)


@needs_peft
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("checkpoint", ["untied", "tied"])
def test_stock_peft_computes_the_trained_model(tiny, tmp_path, checkpoint, dtype):
    from peft import PeftModel

    base = tiny[checkpoint]
    adapter = make_adapter(tmp_path / "a", base, dtype)
    done = export_peft(adapter, tmp_path / "peft")
    assert done.num_entries == Adapter.open(adapter).num_entries and done.num_rounded == 0
    trained = apply_adapter(load(base, dtype), adapter)
    with torch.no_grad():
        logits = trained(IDS).logits
        assert not torch.equal(logits, load(base, dtype)(IDS).logits)
        model = PeftModel.from_pretrained(load(base, dtype), tmp_path / "peft")
        assert torch.equal(model(IDS).logits, logits)
        assert_same(values(model.merge_and_unload()), values(trained))
        loaded = load(base, dtype)
        loaded.load_adapter(str(tmp_path / "peft"))  # transformers' own way
        assert torch.equal(loaded(IDS).logits, logits)


@needs_peft
def test_stock_peft_loads_a_classifier(tiny, tmp_path):
    from peft import PeftModel

    base, (adapter, _) = tiny["untied"], make_classifier(tmp_path / "a", tiny["untied"])
    export_peft(adapter, tmp_path / "peft")
    with torch.no_grad():
        expected = apply_adapter(classifier(base), adapter)(IDS).logits
        model = PeftModel.from_pretrained(classifier(base), tmp_path / "peft")
        model.config.pad_token_id = 7
        assert torch.equal(model(IDS).logits, expected)


def test_the_files(tiny, tmp_path):
    """As many values as PEFT counts from the sparsity, in its order; what is filled up changes nothing."""
    adapter = Adapter.open(make_adapter(tmp_path / "a", tiny["untied"]))
    done = export_peft(adapter.folder, tmp_path / "peft", tiny["untied"])
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny["untied"]) and config["task_type"] == "CAUSAL_LM"
    assert [f"{name}.weight" for name in config["target_modules"]] == adapter.names
    num_values = 0
    for name, (rows, columns) in adapter.shape.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.supertuning"
        index, value = tensors[f"{key}_indices"], tensors[f"{key}_values"]
        assert (index.dtype, value.dtype) == (torch.int32, torch.float32)
        assert len(index) == len(value) == int(rows * columns * (1 - config["sparsity"]))
        dense, expected = torch.zeros(rows * columns), torch.zeros(rows * columns)
        expected[adapter.entries(name)[0]] = adapter.entries(name)[1]
        assert torch.equal(dense.scatter_add(0, index.long(), value), expected)
        num_values += len(value)
    assert num_values == done.num_entries + done.num_padding and done.num_padding > 0
    zero = torch.tensor([-0.0])
    assert torch.signbit(zero.scatter_add(0, torch.tensor([0]), value[-1:])).all()  # not even a zero's sign


def test_sums_come_to_the_trained_values():
    """In both ways to add: at once in fp32, as CPUs do, and rounded each time, as GPUs do."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        before = (torch.randn(200_000, generator=generator) * 0.1).to(dtype)
        delta = torch.randn(200_000, generator=generator) * 0.05
        wanted = (before.float() + delta).to(dtype)
        index, values, num_missed = summands_for(before, torch.arange(200_000), delta)
        assert num_missed == 0 and 200_000 < len(index) < 240_000
        assert torch.equal(before.scatter_add(0, index, values.to(dtype)), wanted)
        at_once = before.float().scatter_add(0, index, values).to(dtype)
        second = index[200_000:]
        in_turn = before + values[:200_000].to(dtype)
        in_turn[second] += values[200_000:].to(dtype)
        assert torch.equal(at_once, wanted) and torch.equal(in_turn, wanted)
        assert not torch.equal(before + delta.to(dtype), wanted)  # of the deltas themselves they do not


def test_without_the_base_the_deltas_are_written(tiny, tmp_path):
    adapter = make_adapter(tmp_path / "a", tiny["untied"], torch.bfloat16, base="nobody/nothing")
    assert export_peft(adapter, tmp_path / "peft").num_rounded is None
    opened = Adapter.open(adapter)
    delta = opened.entries(opened.names[0])[1]
    values = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    key = f"base_model.model.{opened.names[0].removesuffix('.weight')}.supertuning_values"
    assert torch.equal(values[key][: len(delta)], delta)


def test_a_weight_that_is_trained_completely(tiny, tmp_path):
    facts = facts_of(tiny["untied"], load(tiny["untied"], torch.bfloat16))
    adapter = write(tmp_path / "a", {UP1: torch.randn(53, 35) * 0.05}, **facts)
    done = export_peft(adapter, tmp_path / "peft")
    assert done.num_padding == 0 and 0 < done.num_rounded < 0.2 * 53 * 35
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["sparsity"] == 0


def test_what_cannot_be_exported_is_refused(tiny, tmp_path):
    adapter, output = make_adapter(tmp_path / "a", tiny["untied"]), tmp_path / "peft"
    refused(lambda: export_peft(adapter, output, "nobody/nothing"), "--base", "nobody/nothing")
    refused(lambda: export_peft(adapter, adapter), "OUTPUT")
    make_adapter(adapter, tiny["untied"], fingerprint="0" * 64)
    refused(lambda: export_peft(adapter, output), adapter)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("counts", [[(1, 1)], [(1, 3), (5, 7)], [(53, 5300), (1, 35)], [(2**31, 2**32 + 1)]])
def test_every_layer_has_room(counts):
    sparsity = find_sparsity(counts)
    assert 0 <= sparsity < 1 and all(count <= peft_count(numel, sparsity) for count, numel in counts)
    assert any(peft_count(numel, sparsity) <= count + 1 for count, numel in counts)
