"""Small adapters, and the same as dense matrices."""

from __future__ import annotations

from pathlib import Path

import torch

from speft_ds.adapter.format import Adapter, write_adapter

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


def matrices(seed: int, density: float = 0.1, shapes: dict = SHAPES) -> dict[str, torch.Tensor]:
    """Random deltas by weight, 0 where there is no entry; a weight may have none."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        made[name] = values * (torch.rand(shape, generator=generator) < density)
    return made


def write(folder: Path, dense: dict[str, torch.Tensor], heads=None, stored=torch.float32, **facts) -> Path:
    """An adapter of the elements that are not 0; `stored`: the dtype of its deltas on disk."""
    shapes = {name: list(values.shape) for name, values in dense.items()}
    flat = {name: values.reshape(-1) for name, values in dense.items()}
    entries = ((n, (v != 0).nonzero()[:, 0], v[v != 0]) for n, v in flat.items())
    write_adapter(folder, entries, FACTS | {"shapes": shapes} | facts, heads, stored)
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Matrices of the deltas of an adapter, 0 where there is no entry."""
    adapter = Adapter.open(folder)
    made = {name: torch.zeros(*shape) for name, shape in adapter.facts["shapes"].items()}
    for name in adapter.names:
        index, delta = adapter.entries(name)
        made[name].view(-1)[index] = delta
    return made


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def flat(dense: dict[str, torch.Tensor]) -> torch.Tensor:
    """All elements of all matrices, weight by weight."""
    return torch.cat([values.reshape(-1) for values in dense.values()])
