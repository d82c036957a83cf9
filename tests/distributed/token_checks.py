"""References of new tokens: a plain model that transformers resized, trained by autograd."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from distributed.reference import (
    DenseRun,
    assert_as_dense,
    evaluated_weights,
    finished_run,
    plain_model,
    start,
    whole_weights,
)
from speft_ds.adapter.apply import apply_adapter, remove_adapter
from speft_ds.adapter.merge import merge
from speft_ds.comm import collectives
from speft_ds.evaluation.runner import plain_copy


def resized_model(trainer):
    """The base with the rows of the run, new tokens at the mean; weight -> starting values."""
    new, model = trainer.context.new_tokens, plain_model(trainer.recipe)
    means = {name: weight.mean(0) for name, weight in model.named_parameters() if name in new.targets}
    model.resize_token_embeddings(new.num_rows, mean_resizing=False)
    grown, starting = new.rows[new.rows >= new.num_pretrained], {}
    with torch.no_grad():
        if (bias := model.get_output_embeddings().bias) is not None:
            bias[new.num_pretrained :] = 0.0
        for name, mean in means.items():
            weight = model.get_parameter(name)
            weight[new.num_pretrained :] = 0.0
            weight[grown] = mean
            in_old_rows = len(new.rows) - len(grown)
            starting[name] = torch.cat(
                [torch.zeros(in_old_rows, len(mean)), mean.expand(len(grown), -1)]
            ).flatten()
    return model, starting


def reference(trainer):
    model, starting = resized_model(trainer)
    return DenseRun(trainer, model, picked=trainer.state.mask.index, start=starting)


def check_against_autograd(recipe):
    """Losses, norms and weights of a run are those of plain autograd."""
    trainer = start(recipe)
    before = whole_weights(trainer.engine.module)
    lines = [trainer.train_step(step) for step in range(recipe.train.steps)]
    after = whole_weights(trainer.engine.module)
    assert_as_dense(trainer, lines, reference)
    new = trainer.context.new_tokens
    return {
        "sizes": (new.num_pretrained, new.num_rows),
        "targets": set(new.targets),
        "rows": {
            name: (after[name] != before[name]).any(-1).nonzero()[:, 0].tolist() for name in new.targets
        },
        "ids": new.rows.tolist(),
        "rows_with_them": sum(bool(set(row.ids) & set(new.rows.tolist())) for row in trainer.rows),
        "selected": trainer.mask.num_trainable,
        "mask": set(trainer.mask.shape),
        "changes": trainer.schedule.changes,
    }


def check_adapter(recipe):
    """The live model is its gathered copy, the base with the adapter and what is evaluated, bit for bit.

    The rows of new tokens stay when the mask changes, with what they learnt. Then the adapter comes off.
    """
    trainer = start(recipe)
    new, started = trainer.context.new_tokens, whole_weights(trainer.engine.module)
    for step in range(recipe.train.steps):
        trainer.train_step(step)
        for name, target in new.targets.items():
            rows = trainer.state.mask.index[name].view(len(new.rows), -1) // target.shape[1]
            assert (rows == new.rows[:, None].to(rows)).all()
    trainer.save()
    collectives.barrier()
    folder, trained = trainer.folder / "adapter", whole_weights(trainer.engine.module)
    copy = plain_copy(trainer.engine.module)
    model = plain_model(recipe)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    apply_adapter(model, folder)
    assert len(before) == len(trained)
    for found in (copy, model):
        assert found.config.vocab_size == found.get_input_embeddings().num_embeddings == new.num_rows
        for name, weight in found.named_parameters():
            assert torch.equal(weight.cpu(), trained[name]), name
    for name, weight in evaluated_weights(recipe, folder).items():
        assert torch.equal(weight, trained[name]), name
    remove_adapter(model)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == new.num_pretrained
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]), name
    moved = [n for n in new.targets if not torch.equal(trained[n][new.rows], started[n][new.rows])]
    return {"moved": set(moved), "changes": trainer.schedule.changes, "mask": trainer.mask.num_trainable}


def check_merged(recipe, folder):
    """The merged checkpoint, and what is evaluated, are the live model of a base in few bits."""
    trainer, trained = finished_run(recipe)
    collectives.run_on_rank0(lambda: merge(None, trainer.folder, folder))
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, recipe.model.dtype))
    for name, weight in merged.named_parameters():
        assert torch.equal(weight, trained[name]), name
