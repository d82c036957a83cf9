"""Adapters with random entries for small models, and what they make of a weight, computed densely."""

import torch
from speft_ds.model.fingerprint import fingerprint
from speft_ds.model.targets import find_targets
from transformers import AutoModelForCausalLM

from speft_ds.adapter.format import Adapter, write_adapter


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def make_adapter(folder, of, dtype=torch.float32, seed=0, scale=0.05, model=None, heads=None, **changes):
    """An adapter for the checkpoint `of`, with about 2% of each weight's entries, of some weights 20%."""
    model = load(of, dtype) if model is None else model
    generator = torch.Generator().manual_seed(seed)
    weights = {name: linear.weight for name, linear in find_targets(model, None).items()}
    facts = {
        "base": str(of),
        "dtype": str(dtype).removeprefix("torch."),
        "fingerprint": fingerprint(model),
        "task": "causal_lm",
        "shapes": {name: list(weight.shape) for name, weight in weights.items()},
    }
    entries = []
    for number, (name, weight) in enumerate(weights.items()):
        chosen = torch.rand(weight.numel(), generator=generator) < (0.2 if number % 5 == 0 else 0.02)
        index = chosen.nonzero().view(-1)
        entries.append((name, index, torch.randn(len(index), generator=generator) * scale))
    write_adapter(folder, entries, {**facts, **changes}, heads)
    return folder


def trained(folder, weights, alpha=1.0, dtype=None):
    """Name -> weight with the adapter, by dense fp32 sums of whole matrices; of weights by name."""
    adapter, result = Adapter.open(folder), {}
    for name, weight in weights.items():
        dense = torch.zeros(weight.numel())
        if name in adapter.names:
            index, delta = adapter.entries(name)
            dense[index] = delta
        total = weight.detach().float() + alpha * dense.view(weight.shape)
        result[name] = total.to(dtype or weight.dtype)
    return result


def values(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype and torch.equal(found[name], weight), name
