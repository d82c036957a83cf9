"""What is compared: the frozen lower bound, ours, and peers; each is a model, a batch and a training step.

On one rank everything but ours is plain torch, peers as PEFT makes them. On more ranks the floor is the
frozen model on our engine before anything is attached, and peers train under plain DeepSpeed ZeRO-3, loaded
sharded, as `transformers` does it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import counting
import deepspeed
import peft
import torch
from deepspeed.accelerator import get_accelerator
from groups import Case
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from speft_ds.adapter.save import save_adapter
from speft_ds.comm import collectives
from speft_ds.config.deepspeed_config import load_ds_config
from speft_ds.config.method_config import LORA, WITH_MASK
from speft_ds.config.recipe import Recipe
from speft_ds.data.collate import collate
from speft_ds.data.dataset import Row
from speft_ds.model.linear_cross_entropy import find_head_loss
from speft_ds.model.load_model import load_base
from speft_ds.model.loss import NextToken
from speft_ds.model.targets import find_targets
from speft_ds.training.make_schedule import make_schedule
from speft_ds.training.memory import tensor_bytes
from speft_ds.training.metrics import Timings
from speft_ds.training.model_facts import base_facts
from speft_ds.training.run_data import load_data
from speft_ds.training.setup import choose_mask, load_context
from speft_ds.training.stash_format import TrainingStash
from speft_ds.zero.engine import require_grad
from speft_ds.zero.shards import full_shape

# High ones: in the few steps on one batch the loss has to fall, in bfloat16 too.
LR = {"speft_ds": 3e-3, "lora": 1e-3, "shira": 3e-3, "supertuning": 3e-3, "full": 1e-4}
# Of ours, by `method.name`; those that are not here have that of `speft_ds`.
OTHER_LR = dict.fromkeys(("full", "lisa", "half"), 1e-4) | dict.fromkeys(LORA, LR["lora"])
PEERS = ("lora", "shira", "supertuning", "full")
METHODS = ("floor", "speft_ds", *PEERS)


def recipe_of(case: Case, world_size: int) -> Recipe:
    """Ours, and the DeepSpeed configuration of all that is sharded."""
    on_gpu = get_accelerator().device_name() == "cuda"
    mask = {"salience": "random", "density": case.density, "compute": case.compute}
    method = {"name": case.method} | ({"rank": case.lora_rank} if case.method in LORA else {})
    return Recipe.model_validate(
        {
            "model": {"name_or_path": case.model, "dtype": case.dtype, "base_format": case.base_format},
            "data": {"path": "rows.jsonl"},  # never opened: random masks need no rows
            "method": method,
            **({"mask": mask} if case.method in WITH_MASK else {}),
            "optimizer": {
                "lr": OTHER_LR.get(case.method, LR["speft_ds"]),
                "schedule": "constant",
                "clip_norm": None,
            },
            "train": {"steps": 1000, "global_batch": case.rows * world_size, "micro_batch": case.rows},
            "deepspeed": {"config": "zero3_bf16" if on_gpu else "zero3_cpu"},
        }
    )


class Method:
    """A step on one batch, again and again; subclasses say what a forward and the rest of the step are.

    Args:
        world_size: ranks that share the work, each with the same rows: so the mean gradient, and with it
            every loss, is that of one rank.
    """

    model: nn.Module
    objective: NextToken

    def __init__(self, case: Case, world_size: int):
        self.case, self.world_size = case, world_size
        self.device = torch.device(get_accelerator().current_device_name())

    def ready(self) -> dict:
        """Make the batch; what is trained."""
        vocabulary = self.model.config.get_text_config().vocab_size
        size = (self.case.rows, self.case.length)
        ids = torch.randint(vocabulary, size, generator=torch.Generator().manual_seed(0)).tolist()
        rows = [Row(row, [False] + [True] * (len(row) - 1)) for row in ids]
        self.batch = collate(rows, 0, self.device)
        self.num_labels = sum(row.num_labels for row in rows)
        return {"num_trainable": self.num_trainable(), "num_weights": sum(map(numel, self.weights()))}

    def weights(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def num_trainable(self) -> int:
        return sum(numel(weight) for weight in self.weights() if weight.requires_grad)

    def forward(self) -> Tensor:
        """The mean loss of the batch."""
        return self.objective(self.model, self.batch)[0] / self.num_labels

    def finish(self, loss: Tensor) -> None:
        """Backward and update."""
        raise NotImplementedError

    def whole_step(self) -> float:
        loss = self.forward()
        self.finish(loss)
        return loss.item()

    def step(self) -> dict:
        """Seconds of one step, by the clock and of this process's cores, and its loss."""
        get_accelerator().synchronize()
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = self.whole_step()
        get_accelerator().synchronize()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "loss": loss}

    def count_saved(self) -> dict:
        """A step, and the bytes that it saves for its backward."""
        num_bytes, loss = counting.saved_bytes(self.model, self.forward)
        self.finish(loss)
        return {"saved_bytes": num_bytes, "loss": loss.item()}

    def count_alive(self) -> dict:
        """A step, and the bytes that are alive after its forward and were not before."""
        num_bytes, loss = counting.alive_bytes(self.forward)
        self.finish(loss)
        return {"alive_bytes": num_bytes, "loss": loss.item()}

    def count_peak(self) -> dict:
        """A step, its peak memory, and what this rank sends."""
        losses: list[float] = []
        with counting.Traffic(self.world_size) as sent:
            peak = counting.peak_bytes(lambda: losses.append(self.whole_step()), self.device)
        return {
            "peak_bytes": peak,
            "sent_bytes": round(sent.gradients),
            "sent_weights_bytes": round(sent.weights),
            "loss": losses[0],
        }


class PlainFloor(Method):
    """Forward and activation gradients of a frozen model, in plain torch."""

    def __init__(self, case: Case, world_size: int):
        super().__init__(case, world_size)
        self.model = load_plain(case, self.device).requires_grad_(False)
        self.model.get_input_embeddings().register_forward_hook(require_grad)
        self.objective = NextToken(self.model, packing=False, head_loss=find_head_loss(self.model))

    def finish(self, loss: Tensor) -> None:
        loss.backward()


class PlainPeer(Method):
    """A peer in plain torch."""

    def __init__(self, case: Case, world_size: int, name: str):
        super().__init__(case, world_size)
        model = load_plain(case, self.device).requires_grad_(False)
        self.objective = NextToken(model, packing=False, head_loss=find_head_loss(model))
        self.model = prepare(name, model, case)
        self.optimizer = adamw(self.model, name)

    def finish(self, loss: Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class OnOurEngine(Method):
    """The frozen model, sharded."""

    def __init__(self, case: Case, world_size: int):
        super().__init__(case, world_size)
        self.recipe = recipe_of(case, world_size)
        data = load_data(self.recipe, needs_calibration=True)
        self.context = load_context(self.recipe, data)
        self.engine, self.objective = self.context.engine, self.context.objective
        self.model = self.engine.module


class ShardedFloor(OnOurEngine):
    """Forward and activation gradients of the frozen model on our engine."""

    def __init__(self, case: Case, world_size: int):
        super().__init__(case, world_size)
        self.model.get_input_embeddings().register_forward_hook(require_grad)
        self.model.train()

    def finish(self, loss: Tensor) -> None:
        loss.backward()
        self.engine.after_plain_backward()


class Ours(OnOurEngine):
    """The same engine, with a random mask attached to it."""

    def __init__(self, case: Case, world_size: int):
        super().__init__(case, world_size)
        recipe, timings = self.recipe, Timings()
        self.mask = choose_mask(self.context, timings)
        choose = partial(choose_mask, self.context, timings)
        self.schedule = make_schedule(self.context, self.mask, recipe.train.steps, choose)
        self.engine.train()
        self.stash = TrainingStash(self.model, self.case.stash)
        self.num_steps = 0

    def ready(self) -> dict:
        """Also: bytes of what is trained, on the rank that has most, and of the adapter."""
        state = self.schedule.state
        held = [state.base, state.delta, *state.index.values(), self.schedule.gradient.own]
        held += [*self.schedule.optimizer.state[state.delta].values()]
        facts = {**base_facts(self.context), "recipe": None}
        with tempfile.TemporaryDirectory() as folder:
            adapter = Path(collectives.broadcast_object(folder)) / "adapter"
            save_adapter(adapter, state, facts, self.context.low_rank)
            sizes = collectives.run_on_rank0(lambda: [file.stat().st_size for file in adapter.iterdir()])
        own = {"state_bytes": tensor_bytes(held), "adapter_bytes": sum(sizes or ())}
        return super().ready() | own

    def num_trainable(self) -> int:
        return sum(self.schedule.state.layout.lengths)

    def forward(self) -> Tensor:
        self.schedule.before_step(self.num_steps)
        with self.stash.packing(self.batch["input_ids"].numel()):
            return self.objective(self.engine, self.batch)[0] / self.num_labels

    def finish(self, loss: Tensor) -> None:
        # The loss of the global batch, which its gradient is summed over.
        self.engine.backward(loss / self.world_size, scale_wrt_gas=False)
        self.engine.step()
        self.schedule.after_step(self.num_steps, self.engine.optimizer.overflow)
        self.num_steps += 1


class ShardedPeer(Method):
    """A peer under plain DeepSpeed ZeRO-3."""

    def __init__(self, case: Case, world_size: int, name: str):
        super().__init__(case, world_size)
        config = load_ds_config(recipe_of(case, world_size), world_size)
        model = load_base(case.model, case.dtype, config)
        # By this PEFT knows that weights are sharded; as under transformers' Trainer, also the bucket.
        self.zero3 = HfDeepSpeedConfig(config)
        width = model.config.get_text_config().hidden_size
        config["zero_optimization"]["reduce_bucket_size"] = width * width
        self.model = prepare(name, model, case)
        self.engine, *_ = deepspeed.initialize(
            model=self.model, optimizer=adamw(self.model, name), config=config
        )
        self.objective = NextToken(model, packing=False, head_loss=find_head_loss(model, self.engine))

    def forward(self) -> Tensor:
        return self.objective(self.engine, self.batch)[0] / self.num_labels

    def finish(self, loss: Tensor) -> None:
        self.engine.backward(loss)
        self.engine.step()


def load_plain(case: Case, device: torch.device) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(case.model, dtype=getattr(torch, case.dtype))
    return model.to(device).train()


def numel(weight: nn.Parameter) -> int:
    """Elements of a weight, sharded or not."""
    return full_shape(weight).numel()


def adamw(model: nn.Module, name: str) -> torch.optim.AdamW:
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.optim.AdamW(trained, lr=LR[name], weight_decay=0.0)


def prepare(name: str, model: nn.Module, case: Case) -> nn.Module:
    """A frozen model as a peer trains it: the linears of the decoder layers, or everything."""
    torch.manual_seed(0)
    if name == "full":
        return model.requires_grad_(True)
    targets = find_targets(model, None)
    names = [weight.removesuffix(".weight") for weight in targets]
    return peft.get_peft_model(model, CONFIGS[name](names, targets, case))


def lora(names: list[str], targets: dict[str, nn.Linear], case: Case) -> peft.PeftConfig:
    return peft.LoraConfig(
        r=case.lora_rank, lora_alpha=2 * case.lora_rank, lora_dropout=0.0, target_modules=names
    )


def shira(names: list[str], targets: dict[str, nn.Linear], case: Case) -> peft.PeftConfig:
    """Trains r (rows + columns) weights of each linear, r a whole number: the one nearest to the density."""
    shapes = [full_shape(linear.weight) for linear in targets.values()]
    wanted = case.density * sum(shape.numel() for shape in shapes)
    r = max(1, round(wanted / sum(map(sum, shapes))))
    return peft.ShiraConfig(r=r, random_seed=0, target_modules=names)


def supertuning(names: list[str], targets: dict[str, nn.Linear], case: Case) -> peft.PeftConfig:
    return peft.SupertuningConfig(sparsity=1.0 - case.density, target_modules=names)


CONFIGS: dict[str, Callable] = {"lora": lora, "shira": shira, "supertuning": supertuning}


def make(name: str, case: Case, world_size: int) -> Method:
    """A method by its name, on this rank."""
    if world_size > 1 or name == "speft_ds":
        collectives.init()
    if name == "floor":
        return (ShardedFloor if world_size > 1 else PlainFloor)(case, world_size)
    if name == "speft_ds":
        return Ours(case, world_size)
    return (ShardedPeer if world_size > 1 else PlainPeer)(case, world_size, name)
