"""Applying an adapter: exact, and refused where it does not belong. No DeepSpeed."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import speft_ds
from speft_ds.adapter import read_adapter, write_adapter
from speft_ds.errors import UserError
from speft_ds.model import fingerprint

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def base(tiny):
    return lambda dtype=torch.float32: AutoModelForCausalLM.from_pretrained(tiny["untied"], dtype=dtype)


@pytest.fixture
def adapter(tmp_path, base):
    def write(**changes):
        index = torch.tensor([0, 5, 1854], dtype=torch.int32)
        tensors = {f"{NAME}.index": index, f"{NAME}.delta": torch.tensor([0.5, -1.0, 2.0])}
        tensors.update(changes.pop("tensors", {}))
        facts = {"base": "tiny", "fingerprint": fingerprint(base()), "dtype": "float32", **changes}
        write_adapter(tmp_path / "adapter", tensors, facts)
        return tmp_path / "adapter"

    return write


def test_applied_weights_are_base_plus_delta(base, adapter):
    model, before = base(), dict(base().named_parameters())
    assert speft_ds.apply_adapter(model, adapter()) is model
    for name, parameter in model.named_parameters():
        expected = before[name].detach().clone()
        if name == NAME:
            expected.view(-1)[[0, 5, 1854]] += torch.tensor([0.5, -1.0, 2.0])
        assert torch.equal(parameter, expected), name


def refuse(model, folder, message):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(UserError) as caught:
        speft_ds.apply_adapter(model, folder)
    assert message in str(caught.value)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_another_base_is_refused(base, adapter):
    model = base()
    with torch.no_grad():  # one bit of one weight
        model.model.norm.weight[3] += 1e-7
    refuse(model, adapter(), "another base")


def test_a_second_application_is_refused(base, adapter):
    folder = adapter()
    refuse(speft_ds.apply_adapter(base(), folder), folder, "another base")


def test_another_dtype_is_refused(base, adapter):
    refuse(base(torch.bfloat16), adapter(), "dtype=torch.float32")


@pytest.mark.parametrize("index", [[-1, 5, 6], [0, 5, 1855], [5, 0, 7], [5, 5, 7]])
def test_indices_that_do_not_fit_are_refused(base, adapter, index):
    tensors = {f"{NAME}.index": torch.tensor(index, dtype=torch.int32)}
    refuse(base(), adapter(tensors=tensors), "out of range or unsorted")


def test_a_damaged_file_is_refused(base, adapter):
    folder = adapter()
    path = folder / "adapter.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    refuse(base(), folder, "damaged")
    path.write_bytes(content[:20])
    refuse(base(), folder, "not a readable adapter")
    path.unlink()
    refuse(base(), folder, "not a readable adapter")


def test_other_versions_and_nonfinite_deltas_are_refused(base, adapter, tmp_path):
    folder = adapter()
    facts = json.loads((folder / "adapter.json").read_text())
    (folder / "adapter.json").write_text(json.dumps({**facts, "format_version": 99}))
    refuse(base(), folder, "format 99")
    with pytest.raises(UserError, match="not finite"):
        bad = {f"{NAME}.index": torch.tensor([1]), f"{NAME}.delta": torch.tensor([float("nan")])}
        write_adapter(tmp_path / "other", bad, {})
    assert not (tmp_path / "other").exists()


def test_what_is_written_is_read_back(adapter):
    tensors, facts = read_adapter(adapter())
    assert facts["dtype"] == "float32" and sorted(tensors) == [f"{NAME}.delta", f"{NAME}.index"]
