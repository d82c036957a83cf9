"""What runs on every rank, of whole runs. Each function is one check, called through the `ranks` fixture."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from distributed.reference import (
    Dense,
    assert_as_dense,
    batch_of,
    plain_model,
    start,
    whole_entries,
    whole_weights,
)
from speft_ds.adapter.apply import apply_adapter
from speft_ds.adapter.merge import merge
from speft_ds.comm import collectives
from speft_ds.config.recipe import Recipe
from speft_ds.data.collate import collate
from speft_ds.errors import UserError
from speft_ds.jobs.train import run
from speft_ds.model.fingerprint import fingerprint
from speft_ds.training.trainer import Trainer


def check_run(recipe: Recipe) -> dict:
    """A run holds the invariants 1, 2 and, in fp32, 5; what it makes, to compare with other runs."""
    trainer = start(recipe)
    pretrained = {name: p.detach() for name, p in plain_model(recipe).named_parameters()}
    lines = []
    for step in range(recipe.train.steps):
        lines.append(trainer.train_step(step))
        assert_written_through(trainer, pretrained, step)
    if recipe.model.dtype == "float32":
        assert_as_dense(trainer, lines)
    assert_adapter_is_the_run(trainer)
    return {
        **result_of(trainer, lines),
        "lengths": trainer.state.layout.lengths,
        "counts": [count for name in trainer.mask.index for count in trainer.state.layout.counts(name)],
        "per_weight": [index.numel() for index in trainer.mask.index.values()],
    }


def check_losses(recipe: Recipe) -> dict:
    """A run as users make it, and what it makes."""
    trainer = start(recipe)
    lines = [trainer.train_step(step) for step in range(recipe.train.steps)]
    trainer.save()
    collectives.barrier()
    return result_of(trainer, lines)


def result_of(trainer: Trainer, lines: list[dict]) -> dict:
    return {
        "sha256": trainer.mask.sha256,
        "fingerprint": trainer.context.fingerprint,
        **{key: [line[key] for line in lines] for key in ("loss", "grad_norm", "num_tokens")},
    }


def assert_written_through(trainer: Trainer, pretrained: Dense, step: int) -> None:
    """Invariant 1: (base + delta).to(dtype) at the mask, the pretrained bits elsewhere."""
    deltas, moved = whole_entries(trainer, trainer.state.delta.detach()), 0
    for name, weight in whole_weights(trainer.engine.module).items():
        expected = pretrained[name].clone()
        if name in deltas:
            index, flat = trainer.mask.index[name].to("cpu", torch.int64), expected.view(-1)
            flat[index] = (flat[index].float() + deltas[name]).to(flat.dtype)
            moved += int((expected != pretrained[name]).sum())
        assert torch.equal(weight, expected), f"{name} differs after step {step}"
    assert moved > 0, f"nothing moved in step {step}"
    assert sum(trainer.state.layout.lengths) == trainer.mask.num_trainable, "not all entries have an owner"


def assert_adapter_is_the_run(trainer: Trainer) -> None:
    """Invariant 2: base + saved adapter = the trained weights, and the engine's logits, bit for bit."""
    trainer.save()
    collectives.barrier()
    folder = trainer.folder / "adapter"
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["adapter.json", "adapter.safetensors"], files
    applied = with_adapter(trainer.recipe, folder)
    trained = whole_weights(trainer.engine.module)
    for name, parameter in applied.named_parameters():
        assert torch.equal(parameter, trained[name]), f"{name}: the adapter makes another weight"
    assert_same_logits(trainer, applied)


def with_adapter(recipe: Recipe, folder: Path):
    """A plain model with the adapter in its weights; of a base in few bits, as a merge writes it."""
    if recipe.model.base_format is None:
        return apply_adapter(plain_model(recipe), folder)
    output = folder.parent / "merged"
    if collectives.rank() == 0:
        merge(None, folder, output)
    collectives.barrier()
    return plain_model(make_plain(recipe, name_or_path=str(output)))


def make_plain(recipe: Recipe, **changes) -> Recipe:
    """The recipe, with another `model` section, not in few bits."""
    model = recipe.model.model_copy(update={"base_format": None, **changes})
    return recipe.model_copy(update={"model": model})


def assert_same_logits(trainer: Trainer, plain) -> None:
    """The engine computes what a plain model with its weights does, bit for bit."""
    device = collectives.device()
    ids = batch_of(trainer, 0)["input_ids"].to(device)
    trainer.engine.eval()
    with torch.no_grad():
        live, expected = (model(input_ids=ids).logits for model in (trainer.engine, plain.eval().to(device)))
    trainer.engine.train()
    assert torch.equal(live, expected), "other logits"


def check_exact_start(recipe: Recipe) -> None:
    """Before the first step the weights are the checkpoint's at the mask, and decoded ones elsewhere."""
    trainer = start(recipe)
    original = plain_model(make_plain(recipe))
    decoded = {name: weight.detach() for name, weight in plain_model(recipe).named_parameters()}
    live, num_lost = whole_weights(trainer.engine.module), 0
    for name, weight in original.named_parameters():
        expected = decoded[name].clone()
        if name in trainer.mask.index:
            index = trainer.mask.index[name].cpu().long()
            expected.view(-1)[index] = weight.detach().view(-1)[index]
            num_lost += int((expected != decoded[name]).sum())
        assert torch.allclose(live[name], expected, rtol=1e-7, atol=1e-9), name
        assert recipe.model.dtype == "float32" or torch.equal(live[name], expected), name
    assert num_lost > 0.9 * trainer.mask.num_trainable


def check_nothing_dense(recipe: Recipe) -> None:
    """Invariant 6: no tensor of a weight's size besides the weights, at any linear's backward or after it."""
    gc.collect()
    gc.freeze()  # engines of earlier checks in this process are not ours to judge: `gc` passes them over
    try:
        assert_nothing_dense(start(recipe))
    finally:
        gc.unfreeze()


def assert_nothing_dense(trainer: Trainer) -> None:
    trainer.train_step(0)
    parameters = list(trainer.engine.module.parameters())
    sizes = {rows * columns for rows, columns in trainer.mask.shape.values()}
    weights = {id(item) for parameter in parameters for item in (parameter, parameter.ds_tensor)}

    def strays() -> list:
        found = [item for item in gc.get_objects() if isinstance(item, Tensor)]
        dense = [tensor for tensor in found if tensor.layout == torch.strided and tensor.numel() in sizes]
        return [
            tuple(t.shape) for t in dense if id(t) not in weights and not isinstance(t, torch.nn.Parameter)
        ]

    def watch(name: str, sink: Callable) -> Callable:
        def watched(x, grad_y):
            before_this_layer.append((name, strays()))
            sink(x, grad_y)

        return watched

    before_this_layer, saved = [], []
    for name, linear in trainer.targets.items():
        linear.weight_grad_hook = watch(name, linear.weight_grad_hook) if linear.weight_grad_hook else None
    batch = collate([trainer.rows[n] for n in range(3)], trainer.context.data.pad_id, collectives.device())
    gc.collect()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = trainer.context.loss(trainer.engine, batch)
    # Saved for backward, of a weight's size: only the parameters themselves, whose data ZeRO-3 frees.
    kept = [tuple(t.shape) for t in saved if t.numel() in sizes and id(t) not in weights]
    assert not kept, kept
    saved.clear()
    trainer.engine.backward(loss / 100, scale_wrt_gas=False)
    num_seen = len(before_this_layer)
    assert num_seen == sum(index.numel() > 0 for index in trainer.mask.index.values()), num_seen
    dirty = [(name, found) for name, found in before_this_layer if found]
    assert not dirty, dirty
    assert not strays(), strays()
    in_place = {name: target for name, target in trainer.targets.items() if not trainer.context.quantised}
    for name, linear in in_place.items():
        assert linear.weight.grad is None, f"{name} has a dense gradient"
        if collectives.world_size() == 1:  # nothing is gathered: the weight is its shard
            assert linear.weight.data_ptr() == linear.weight.ds_tensor.data_ptr(), f"two copies of {name}"
        else:
            assert linear.weight.numel() == 0, f"the gathered {name} outlived its layer's backward"


def check_no_stale_copy(recipe: Recipe) -> None:
    """Weights under the persistence threshold are refreshed: a forward after a step sees the new values."""
    trainer = start(recipe)
    assert any(parameter.ds_persist for parameter in trainer.engine.module.parameters()), "none is small"
    assert not any(linear.weight.ds_persist for linear in trainer.targets.values()), "a target persists"
    reference = plain_model(recipe)
    for step in range(3):
        trainer.train_step(step)
        reference.load_state_dict(whole_weights(trainer.engine.module), strict=False)
        assert_same_logits(trainer, reference)


def check_refused(recipe: Recipe) -> str:
    """The message of the UserError that setting up a run raises on this rank; nothing is written."""
    try:
        run(recipe)
    except UserError as error:
        assert not Path(recipe.output_dir).exists(), "there is a run folder"
        return str(error)
    return ""


def check_nonfinite(recipe: Recipe, of_gradient: bool) -> str:
    """The message of the UserError that step 1 raises, where a loss is infinite, or finite with a gradient
    that is NaN, on rank 0 alone; the weights are as they were.
    """
    trainer = start(recipe)
    is_spoilt = collectives.rank() == 0
    if of_gradient:
        sinks = trainer.gradient.hooks
        name = next(name for name, sink in sinks.items() if sink)
        sink, scale = sinks[name], float("nan") if is_spoilt else 1.0
        sinks[name] = lambda x, grad_y: sink(x, grad_y * scale)
    else:
        real, scale = trainer.context.objective, float("inf") if is_spoilt else 1.0
        spoilt = lambda module, batch: (real(module, batch)[0] * scale, None)  # noqa: E731
        trainer.context = replace(trainer.context, objective=spoilt)
    before = fingerprint(trainer.engine.module)
    try:
        trainer.train_step(0)
    except UserError as error:
        assert fingerprint(trainer.engine.module) == before, "the weights changed"
        return str(error)
    return ""


def counting_saved(linear, name: str, saved: dict[str, int]) -> Callable:
    """The linear's forward, noting how many tensors it saves for its backward at most."""
    forward = linear.forward

    def watched(x: Tensor) -> Tensor:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = forward(x)
        saved[name] = max(saved.get(name, 0), len(kept))
        return y

    return watched


def check_inputs_are_made_again(recipe: Recipe) -> list[str]:
    """Linears whose backward has a saved input, once ZeRO-3 knows the order of the modules."""
    trainer = start(recipe)
    for step in range(recipe.train.steps - 1):
        trainer.train_step(step)
    saved: dict[str, int] = {}
    for name, target in trainer.targets.items():
        target.module.forward = counting_saved(target.module, name, saved)
    trainer.train_step(recipe.train.steps - 1)
    return sorted({name.split(".", 2)[2] for name, count in saved.items() if count > 1})  # beside the weight
