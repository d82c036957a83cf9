"""One family of models on ranks: a step against plain autograd, and one and the same model everywhere."""

from __future__ import annotations

from pathlib import Path

import torch

from distributed.reference import make_trainer, plain_model, whole_weights
from speft_ds.adapter.apply import apply_adapter
from speft_ds.adapter.export import export_peft
from speft_ds.adapter.merge import merge
from speft_ds.comm import collectives
from speft_ds.config.recipe import Recipe
from speft_ds.data.collate import collate
from speft_ds.errors import UserError
from speft_ds.evaluation.runner import plain_copy
from speft_ds.model.loss import NextToken
from speft_ds.model.reach import find_reach
from speft_ds.model.weight_grad_hooks import weight_grad_hooks

IDS = torch.arange(5, 45).view(2, 20)


def check_family(recipe: Recipe, exports: bool = False) -> dict:
    """What a row of docs/models.md says of a family in this dtype at this world size.

    Args:
        exports: whether the export for PEFT is compared, too.
    Returns:
        `refused`: the text of the refusal, and nothing else; or `coverage`, `num_targets`, `gradient_error`
        (largest difference from autograd over the largest gradient of the weight), `merge` (`per weight` or
        `in memory`), whether `packing` and `checkpointing` work, and, for each of `applied`, `merged`,
        `gathered`, `exported`, whether its weights and logits are those of the live model, bit for bit;
        `exported` is None where PEFT has no place for a weight, or cannot come to its value.
    """
    try:
        trainer = make_trainer(recipe)
    except UserError as error:
        return {"refused": error.what}
    trainer.choose_mask()
    reach = find_reach(trainer.engine.module, trainer.targets, trainer.engine.after_plain_backward)
    expected, largest = reference_gradients(recipe, trainer)
    trainer.train_step(0)
    trainer.save()
    collectives.barrier()
    state = trainer.state
    by_rank = collectives.all_gather_padded(state.delta.detach(), state.layout.lengths)
    error = 0.0
    for name, gradient in expected.items():
        parts = [by_rank[r][state.layout.places(name, r)] for r in range(collectives.world_size())]
        got = torch.cat(parts).cpu() / -recipe.optimizer.lr
        error = max(error, float((got - gradient).abs().max()) / max(largest[name], 1e-30))
    return {
        "coverage": reach.coverage(trainer.targets),
        "num_targets": len(trainer.targets),
        "gradient_error": error,
        "packing": works_packed(trainer),
        **same_model_everywhere(recipe, trainer, exports),
        "checkpointing": works_checkpointed(trainer),
    }


def works_packed(trainer) -> bool:
    try:
        NextToken(trainer.engine.module, True, trainer.engine.after_plain_backward)
    except UserError:
        return False
    return True


def works_checkpointed(trainer) -> bool:
    """Whether a backward with activation checkpointing feeds every target."""
    module, targets, fed = trainer.engine.module, trainer.targets, set()
    if not module.supports_gradient_checkpointing:
        return False
    for target in targets.values():
        target.module.recomputes_input = False
    module.gradient_checkpointing_enable({"use_reentrant": False})
    module.train()
    with weight_grad_hooks(targets, {name: lambda *factors, n=name: fed.add(n) for name in targets}):
        ids = IDS.to(collectives.device())
        module(input_ids=ids, use_cache=False).logits.float().sum().backward()
        trainer.engine.after_plain_backward()
    module.gradient_checkpointing_disable()
    return fed == targets.keys()


def reference_gradients(recipe: Recipe, trainer) -> tuple[dict, dict]:
    """Weight -> the gradient of the mean token loss at its entries, row by row by autograd; its largest."""
    model = plain_model(recipe).eval()
    weights = dict(model.named_parameters())
    for name, weight in weights.items():
        weight.requires_grad_(name in trainer.mask.index)
    ids = trainer.order.ids(0, recipe.train.global_batch)
    rows = [trainer.rows[number] for number in ids]
    num_labels = sum(sum(row.loss_mask[1:]) for row in rows)
    sums = {name: torch.zeros(weights[name].shape) for name in trainer.mask.index}
    for row in rows:
        model.zero_grad()
        batch = collate([row], trainer.context.data.pad_id, torch.device("cpu"))
        labels = batch["labels"]
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[0, :-1].float(), labels[0, 1:], reduction="sum", ignore_index=-100
        )
        (loss / num_labels).backward()
        for name, total in sums.items():
            if weights[name].grad is not None:
                total += weights[name].grad.float()
    index = {name: i.to("cpu", torch.int64) for name, i in trainer.mask.index.items() if i.numel()}
    picked = {name: sums[name].view(-1)[i] for name, i in index.items()}
    return picked, {name: float(total.abs().max()) for name, total in sums.items()}


@torch.no_grad()
def same_model_everywhere(recipe: Recipe, trainer, exports: bool) -> dict[str, bool | str | None]:
    """Which copies of the trained model are it, bit for bit, by weights and logits; and how it was merged."""
    folder, done = trainer.folder, None
    if collectives.rank() == 0:
        done = merge(None, folder / "adapter", folder / "merged")
    collectives.barrier()
    is_exact = exports and collectives.broadcast_object(export_is_exact(folder))
    module, ids = trainer.engine.module.eval(), IDS.to(collectives.device())
    live, weights = module(input_ids=ids, use_cache=False).logits, whole_weights(module)
    merged = recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"name_or_path": str(folder / "merged")})}
    )
    copies = {
        "applied": apply_adapter(plain_model(recipe), folder / "adapter"),
        "merged": plain_model(merged),
        "gathered": plain_copy(module),
    }
    if is_exact:
        from peft import PeftModel

        copies["exported"] = PeftModel.from_pretrained(
            plain_model(recipe), folder / "peft"
        ).merge_and_unload()
    trainer.engine.module.train()
    for model in copies.values():  # mapped from a file, a weight lies at any address, by which torch rounds
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        model.to(collectives.device())
    found = {} if done is None else {"merge": "in memory" if done.note else "per weight"}
    return (
        {"exported": None}
        | found
        | {
            name: torch.equal(model.eval()(input_ids=ids, use_cache=False).logits, live)
            and all(torch.equal(weights[key], value.cpu()) for key, value in model.named_parameters())
            for name, model in copies.items()
        }
    )


def export_is_exact(folder: Path) -> bool | None:
    """Whether the export of a run for PEFT comes to the trained values; rank 0 makes it, where it can be."""
    if collectives.rank():
        return None
    try:
        return export_peft(folder / "adapter", folder / "peft").num_rounded == 0
    except UserError:
        return False
