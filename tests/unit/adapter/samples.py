"""Small adapters, of checkpoints and of dense matrices, and what they make of weights, computed densely."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from speft_ds.adapter.format import Adapter, write_adapter
from speft_ds.errors import UserError
from speft_ds.model.fingerprint import fingerprint
from speft_ds.model.targets import find_targets, target_shapes

SHAPES = {
    "model.layers.0.self_attn.q_proj.weight": [24, 16],
    "model.layers.0.mlp.up_proj.weight": [31, 16],
    "model.layers.1.self_attn.q_proj.weight": [24, 16],
    "model.layers.1.mlp.up_proj.weight": [31, 16],
}
Q, UP, Q1, UP1 = SHAPES
FACTS = {
    "base": "owner/name",
    "dtype": "float32",
    "fingerprint": "f" * 64,
    "fingerprint_bfloat16": "b" * 64,
    "task": "causal_lm",
    "recipe": {"name": "mine", "data": {"path": "rows.jsonl"}, "optimizer": {"lr": 0.001}},
}


def score_row(task, metric, before, after, value, role="task", num_fewshot=0):
    """A row of `card_scores`."""
    known = {"role": role, "documents": 1500, "num_fewshot": num_fewshot}
    return {"task": task, "metric": metric, "before": before, "after": after, "value": value, **known}


SCORES = [
    score_row("arc_easy", "acc", "25.0% ± 1.0", "51.2% ± 1.0", 0.51239),
    score_row("odd|task", "exact_match", None, "100.0%", 1.0, num_fewshot=None),
    score_row("piqa", "acc", "68.0%", "61.0%", 0.61, role="forgetting"),
]


def refused(action, where="", what=""):
    """Check that an action is a user's error, which says where and what to do."""
    with pytest.raises(UserError) as caught:
        action()
    error = caught.value
    assert str(where) in (error.where or "") and what in error.what and error.fix, str(error)


def assert_same(found, expected):
    """Check that two dicts have the same tensors, dtypes included."""
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype and torch.equal(found[name], weight), name


# Of matrices


def matrices(seed, density=0.1, shapes=SHAPES):
    """Random deltas by weight, 0 where there is no entry; a weight may have none."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        made[name] = values * (torch.rand(shape, generator=generator) < density)
    return made


def write(folder, dense, heads=None, stored=torch.float32, **facts):
    """An adapter of the elements that are not 0; `stored`: the dtype of its deltas on disk."""
    shapes = {name: list(values.shape) for name, values in dense.items()}
    flat = {name: values.reshape(-1) for name, values in dense.items()}
    entries = ((n, (v != 0).nonzero()[:, 0], v[v != 0]) for n, v in flat.items())
    write_adapter(folder, entries, FACTS | {"shapes": shapes} | facts, heads, stored)
    return folder


def read(folder):
    """Matrices of the deltas of an adapter, 0 where there is no entry."""
    adapter = Adapter.open(folder)
    made = {name: torch.zeros(*shape) for name, shape in adapter.facts["shapes"].items()}
    for name in adapter.names:
        index, delta = adapter.entries(name)
        made[name].view(-1)[index] = delta
    return made


def flat(dense):
    """All elements of all matrices, weight by weight."""
    return torch.cat([values.reshape(-1) for values in dense.values()])


# Of checkpoints


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def values(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def facts_of(folder, model):
    """What an adapter says of its base."""
    dtype = str(model.dtype).removeprefix("torch.")
    return {"base": str(folder), "dtype": dtype, "fingerprint": fingerprint(model)}


def make_adapter(folder, of, dtype=torch.float32, seed=0, scale=0.05, model=None, heads=None, **changes):
    """An adapter for the checkpoint `of`, with about 2% of the entries, of one weight 20%."""
    model = load(of, dtype) if model is None else model
    shapes = target_shapes(find_targets(model, None))
    dense = matrices(seed, 0.02, shapes)
    dense[min(shapes)] = matrices(seed, 0.2, shapes)[min(shapes)]
    dense = {name: deltas * scale for name, deltas in dense.items()}
    return write(folder, dense, heads, **facts_of(of, model) | changes)


def tune(of, folder, dtype=torch.float32, coarse=False):
    """A checkpoint, of several files, that differs from `of` in every weight; `coarse`: by few values."""
    model = load(of, dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        step = torch.randn(parameter.shape, generator=generator) * 0.02
        parameter.data += ((step * 100).round() / 128 if coarse else step).to(dtype)
    model.save_pretrained(folder, max_shard_size="10KB")
    return str(folder)


def trained(folder, weights, alpha=1.0, dtype=None):
    """Name -> weight with the adapter, by dense fp32 sums of complete matrices; of weights by name."""
    deltas, result = read(folder), {}
    for name, weight in weights.items():
        delta = deltas.get(name, torch.zeros(weight.shape)).view(weight.shape)  # of a stack, as a matrix
        total = weight.detach().float() + alpha * delta
        result[name] = total.to(dtype or weight.dtype)
    return result


CLASSES = {"classes": ["no", "maybe", "yes"], "pad_token_id": 7}


def classifier(of, dtype=torch.float32):
    """A model with the classes of `CLASSES`, whose head is the same each time."""
    torch.manual_seed(3)
    kind = AutoModelForSequenceClassification
    return kind.from_pretrained(of, num_labels=3, dtype=dtype).eval()


def make_classifier(folder, of, dtype=torch.float32):
    """An adapter of a classifier, and its head."""
    model = classifier(of, dtype)
    head = torch.randn(3, model.config.hidden_size).to(dtype)
    heads = {"score.weight": head}
    return make_adapter(folder, of, dtype, model=model, heads=heads, **CLASSES), head
