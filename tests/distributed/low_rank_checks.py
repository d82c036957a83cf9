"""References of the low-rank methods: stock PEFT's modules and torch's AdamW in one process."""

from __future__ import annotations

import shutil

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from distributed.reference import (
    DenseRun,
    assert_as_dense,
    batch_of,
    evaluated_weights,
    plain_model,
    start,
    whole_weights,
)
from speft_ds.comm import collectives


def wrapped(name: str) -> str:
    return f"{name.removesuffix('.weight')}.base_layer.weight"


class PeftRun(DenseRun):
    """A run of stock PEFT, from the adapter that the run saved before its first step.

    PiSSA starts by PEFT's own singular values: what is saved of it is a difference, which is 0 then.
    """

    def __init__(self, trainer):
        method, folder = trainer.recipe.method, trainer.folder / "initial"
        if method.name == "pissa":
            config = LoraConfig.from_pretrained(folder)
            config.r, config.lora_alpha, config.inference_mode = method.rank, method.alpha, False
            config.init_lora_weights = "pissa"
            peft = get_peft_model(plain_model(trainer.recipe), config)
        else:
            peft = PeftModel.from_pretrained(plain_model(trainer.recipe), folder, is_trainable=True)
        model = peft.base_model.model
        entries = {wrapped(name): index for name, index in trainer.mask.index.items()}
        for name, weight in model.named_parameters():
            assert weight.requires_grad == (name in trainer.context.whole), name
            weight.requires_grad_(name in trainer.context.whole or name in entries)
        whole = {name: torch.arange(target.numel) for name, target in trainer.context.whole.items()}
        super().__init__(trainer, model, picked=entries | whole, whole=set(whole))


def live_logits(trainer) -> torch.Tensor:
    """Of the first rows, on every rank."""
    module = trainer.engine.module.eval()
    with torch.no_grad():
        ids = batch_of(trainer, 0)["input_ids"].to(collectives.device())
        return module(input_ids=ids).logits.float().cpu()


def train(recipe):
    """A run that saved its adapter before its first step, as `initial`, and after its last."""
    trainer = start(recipe)
    trainer.save()
    collectives.run_on_rank0(lambda: shutil.move(trainer.folder / "adapter", trainer.folder / "initial"))
    lines = [trainer.train_step(step) for step in range(recipe.train.steps)]
    trainer.save()
    collectives.barrier()
    return trainer, lines


def check_against_peft(recipe):
    """Losses, norms and all parameters of a run are those of stock PEFT."""
    trainer, lines = train(recipe)
    assert_as_dense(trainer, lines, PeftRun)
    names = {name.split(".lora_")[1].split(".")[0] for name in trainer.context.low_rank.targets}
    return {
        "parts": names,
        "entries": trainer.mask.num_trainable,
        "low_rank": trainer.context.low_rank.num_elements,
        "trained": sum(trainer.state.layout.lengths),
        "targets": trainer.mask.num_target_elements,
    }


def train_and_look(recipe):
    """What the live model computes after the last step, and the first batch."""
    trainer, lines = train(recipe)
    trained = whole_weights(trainer.engine.module)
    logits = live_logits(trainer)
    return {
        "logits": logits,
        "ids": batch_of(trainer, 0)["input_ids"],
        "losses": [line["loss"] for line in lines],
        "rank": trainer.context.low_rank.config.r,
        "dtypes": {weight.dtype for weight in trained.values()},
        "evaluated": evaluated_weights(recipe, trainer.folder / "adapter"),
    }
