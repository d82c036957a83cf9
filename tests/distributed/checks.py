"""What runs on every rank. Each function is one check, called through the `ranks` fixture."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import torch

from distributed.reference import (
    batch_of,
    make_trainer,
    plain_model,
    train_like_reference,
    whole_weights,
)
from speft_ds.adapter.apply import apply_adapter
from speft_ds.comm import collectives
from speft_ds.config.recipe import Recipe
from speft_ds.data.collate import collate
from speft_ds.errors import UserError
from speft_ds.jobs.train import run
from speft_ds.model.fingerprint import fingerprint
from speft_ds.training.trainer import Trainer


def check_dense_reference(recipe: Recipe) -> None:
    """Invariant 5: the run equals dense autograd with the gradient masked to the same entries."""
    trainer = make_trainer(recipe)
    trainer.choose_mask()
    train_like_reference(recipe, trainer)


def check_write_through(recipe: Recipe) -> None:
    """Invariant 1: (base + delta).to(dtype) at the mask, the pretrained bits elsewhere, after every step."""
    trainer = make_trainer(recipe)
    trainer.choose_mask()
    pretrained = dict(plain_model(recipe).named_parameters())
    moved = 0
    for step in range(3):
        trainer.train_step(step)
        state, trained = trainer.state, whole_weights(trainer.engine.module)
        by_rank = collectives.all_gather_padded(state.delta.detach(), state.layout.lengths)
        for name, weight in trained.items():
            expected = pretrained[name].detach().clone()
            if name in trainer.mask.index:
                index = trainer.mask.index[name].to(torch.int64)
                parts = [
                    by_rank[r][state.layout.places(name, r)] for r in range(state.rank_shards.world_size)
                ]
                flat = expected.view(-1)
                flat[index] = (flat[index].float() + torch.cat(parts)).to(flat.dtype)
                moved += int((flat != pretrained[name].view(-1)).sum())
            assert torch.equal(weight, expected), f"{name} differs after step {step}"
    assert moved > 0
    assert sum(state.layout.lengths) == trainer.mask.num_trainable


def check_adapter(recipe: Recipe) -> None:
    """Invariant 2: base + saved adapter = the trained weights, and the engine's logits, bit for bit."""
    trainer = make_trainer(recipe)
    trainer.choose_mask()
    for step in range(3):
        trainer.train_step(step)
    trainer.save()
    collectives.barrier()
    folder = trainer.folder / "adapter"
    assert sorted(path.name for path in folder.iterdir()) == ["adapter.json", "adapter.safetensors"]
    applied = apply_adapter(plain_model(recipe), folder)
    trained = whole_weights(trainer.engine.module)
    for name, parameter in applied.named_parameters():
        assert torch.equal(parameter, trained[name]), name
    batch = batch_of(trainer, 0)
    with torch.no_grad():
        trainer.engine.eval()
        live = trainer.engine(input_ids=batch["input_ids"]).logits
        plain = applied.eval()(input_ids=batch["input_ids"]).logits
    assert torch.equal(live, plain)


def check_losses(recipe: Recipe) -> dict:
    """A run's losses, gradient norms, mask and adapter, to compare between world sizes and splits."""
    trainer = make_trainer(recipe)
    trainer.choose_mask()
    steps = [trainer.train_step(step) for step in range(recipe.train.steps)]
    trainer.save()
    collectives.barrier()
    return {
        "sha256": trainer.mask.sha256,
        "fingerprint": trainer.context.fingerprint,
        "losses": [step["loss"] for step in steps],
        "grad_norms": [step["grad_norm"] for step in steps],
        "num_tokens": [step["num_tokens"] for step in steps],
    }


def check_nothing_dense(recipe: Recipe) -> None:
    """Invariant 6: no tensor of a weight's size besides the weights, at any linear's backward or after it."""
    # Engines of earlier checks in this process are not ours to judge. Held, so that no id is used twice.
    earlier = [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]
    trainer = make_trainer(recipe)
    trainer.choose_mask()
    trainer.train_step(0)
    parameters = list(trainer.engine.module.parameters())
    sizes = {rows * columns for rows, columns in trainer.mask.shape.values()}
    weights = {id(item) for parameter in parameters for item in (parameter, parameter.ds_tensor)}
    weights |= {id(item) for item in earlier}

    def strays() -> list:
        found = [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]
        dense = [tensor for tensor in found if tensor.layout == torch.strided and tensor.numel() in sizes]
        return [
            tuple(t.shape) for t in dense if id(t) not in weights and not isinstance(t, torch.nn.Parameter)
        ]

    def watch(name: str, sink):
        def watched(x, grad_y):
            before_this_layer.append((name, strays()))
            sink(x, grad_y)

        return watched

    before_this_layer, saved = [], []
    for name, linear in trainer.targets.items():
        linear.weight_grad_hook = watch(name, linear.weight_grad_hook) if linear.weight_grad_hook else None
    batch = collate([trainer.rows[n] for n in range(3)], trainer.context.data.pad_id, torch.device("cpu"))
    gc.collect()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = trainer.context.loss(trainer.engine, batch)
    # Saved for backward, of a weight's size: only the parameters themselves, whose data ZeRO-3 frees.
    kept = [tuple(t.shape) for t in saved if t.numel() in sizes and id(t) not in weights]
    assert not kept, kept
    saved.clear()
    trainer.engine.backward(loss / 100, scale_wrt_gas=False)
    assert len(before_this_layer) == sum(index.numel() > 0 for index in trainer.mask.index.values())
    dirty = [(name, found) for name, found in before_this_layer if found]
    assert not dirty, dirty
    assert not strays(), strays()
    for name, linear in trainer.targets.items():
        assert linear.weight.grad is None
        if collectives.world_size() == 1:  # nothing is gathered: the weight is its shard
            assert linear.weight.data_ptr() == linear.weight.ds_tensor.data_ptr(), f"two copies of {name}"
        else:
            assert linear.weight.numel() == 0, f"the gathered {name} outlived its layer's backward"


def check_no_stale_copy(recipe: Recipe) -> None:
    """Weights under the persistence threshold are refreshed: a forward after a step sees the new values."""
    trainer = make_trainer(recipe)
    assert any(parameter.ds_persist for parameter in trainer.engine.module.parameters())
    assert not any(linear.weight.ds_persist for linear in trainer.targets.values())
    trainer.choose_mask()
    for step in range(3):
        trainer.train_step(step)
        reference = plain_model(recipe).eval()
        reference.load_state_dict(whole_weights(trainer.engine.module), strict=False)
        batch = batch_of(trainer, 0)
        trainer.engine.eval()
        with torch.no_grad():
            live = trainer.engine(input_ids=batch["input_ids"]).logits
            assert torch.equal(live, reference(input_ids=batch["input_ids"]).logits)
        trainer.engine.train()


def check_empty_slices(recipe: Recipe) -> None:
    """A rank that owns no entry of a weight, and weights without any entry, train like the rest."""
    trainer = make_trainer(recipe)
    trainer.choose_mask()
    counts = [count for name in trainer.mask.index for count in trainer.state.layout.counts(name)]
    assert 0 in counts, "this recipe should leave some rank without an entry of some weight"
    assert any(index.numel() == 0 for index in trainer.mask.index.values())
    train_like_reference(recipe, trainer)


def check_refused(recipe: Recipe) -> str:
    """The message of the UserError that setting up a run raises on this rank; nothing is written."""
    try:
        run(recipe)
    except UserError as error:
        assert not Path(recipe.output_dir).exists()
        return str(error)
    return ""


def check_ranks_without_entries(recipe: Recipe) -> list[int]:
    """With fewer entries than ranks, a rank that owns none takes part in every step."""
    trainer = make_trainer(recipe)
    trainer.choose_mask()
    train_like_reference(recipe, trainer)
    trainer.save()
    return trainer.state.layout.lengths


def refused_first_step(trainer: Trainer) -> str:
    """The message of the UserError that step 1 raises; the weights are as they were."""
    before = fingerprint(trainer.engine.module)
    try:
        trainer.train_step(0)
    except UserError as error:
        assert fingerprint(trainer.engine.module) == before, "the weights changed"
        return str(error)
    return ""


def check_nonfinite_gradient(recipe: Recipe) -> str:
    """A finite loss with a gradient that is NaN on rank 0 alone stops every rank."""
    trainer = make_trainer(recipe)
    trainer.choose_mask()
    sinks = trainer.gradient.hooks
    name = next(name for name, sink in sinks.items() if sink)
    sink, scale = sinks[name], float("nan") if collectives.rank() == 0 else 1.0
    sinks[name] = lambda x, grad_y: sink(x, grad_y * scale)
    return refused_first_step(trainer)


def check_nonfinite(recipe: Recipe) -> str:
    """A loss that overflows on rank 0 alone stops every rank."""
    trainer = make_trainer(recipe)
    trainer.choose_mask()
    real, scale = trainer.context.objective, float("inf") if collectives.rank() == 0 else 1.0
    spoilt = lambda module, batch: (real(module, batch)[0] * scale, None)  # noqa: E731
    trainer.context = replace(trainer.context, objective=spoilt)
    return refused_first_step(trainer)


def check_inputs_are_made_again(recipe: Recipe) -> list[str]:
    """Linears whose backward has a saved input, once ZeRO-3 knows the order of the modules."""
    trainer = make_trainer(recipe)
    trainer.choose_mask()
    for step in range(recipe.train.steps - 1):
        trainer.train_step(step)
    saved = []
    for name, linear in trainer.targets.items():
        forward = linear.forward

        def watched(x, name=name, forward=forward):
            kept = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
                y = forward(x)
            if len(kept) > 1:  # more than the weight
                saved.append(name)
            return y

        linear.forward = watched
    trainer.train_step(recipe.train.steps - 1)
    return sorted({name.split(".", 2)[2] for name in saved})
