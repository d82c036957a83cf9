"""A run from recipe to report: base, scores before, mask, training, adapter, scores after."""

from __future__ import annotations

import inspect
import json
import math
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from speft_ds import __version__, data, distributed
from speft_ds.adapter import save_adapter
from speft_ds.ds_config import load_ds_config
from speft_ds.engine import SparseEngine, build_engine, shard_of
from speft_ds.errors import UserError
from speft_ds.mask import Mask
from speft_ds.metrics import MetricsLog, peak_memory_gib, tokens_per_second
from speft_ds.model import find_targets, fingerprint, load_base, tied_targets
from speft_ds.optimizer import make_optimizer, make_schedule
from speft_ds.preflight import check_output_dir
from speft_ds.recipe import Recipe, resolved_yaml
from speft_ds.rows import read_pairs
from speft_ds.salience import NEEDS_DATA, SALIENCE, Scorer, target_shapes
from speft_ds.selection import entries_wanted, select
from speft_ds.sparse import SparseState, adapt

PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "lm_eval", "tokenizers")


def say(text: str) -> None:
    """One tidy line, from rank 0."""
    if distributed.rank() == 0:
        print(text, flush=True)


class Trainer:
    """One run. Its methods are the stages, to be called in the order of `run`.

    Attributes (after construction):
        engine: `SparseEngine` over the frozen, sharded base.
        targets: weight name -> linear whose weight may be trained; `shapes`: weight name -> (out, in).
        num_trainable: entries that the mask will have, over all ranks.
        rows: tokenised training rows, the same on every rank.
        timings: stage -> seconds.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.folder = Path(recipe.output_dir)
        self.timings: dict[str, float] = {}
        self.results: dict[str, dict | None] = {"before": None, "after": None}
        if recipe.eval.tasks:  # an unknown task should not wait for the end of training
            from speft_ds.evaluate import find_tasks

            with self.stage("tasks"):
                self.task_manager = find_tasks(recipe.eval)
        with self.stage("data"):
            self._load_rows()
        with self.stage("model"):
            self._load_model()
        train = recipe.train
        self.num_steps = data.num_steps(len(self.rows), train.global_batch, train.steps, train.epochs)
        if recipe.optimizer.warmup_steps > self.num_steps:
            raise UserError(
                f"more warm-up steps ({recipe.optimizer.warmup_steps}) than steps ({self.num_steps})",
                where="optimizer.warmup_steps",
                fix=f"optimizer.warmup_steps={self.num_steps // 10}",
            )
        self.versions = {"python": platform.python_version(), "speft_ds": __version__}
        self.versions |= {name: version(name) for name in PACKAGES}
        self.mask: Mask | None = None
        self.state: SparseState | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage for run.json."""
        start = time.perf_counter()
        yield
        self.timings[name] = time.perf_counter() - start

    def _load_rows(self) -> None:
        from transformers import AutoTokenizer

        recipe = self.recipe.data
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.recipe.model.name_or_path)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load the tokenizer: {error}", where="model.name_or_path") from error
        pairs = read_pairs(recipe.path, recipe.prompt_column, recipe.response_column)
        self.rows = data.tokenize(pairs, self.tokenizer, recipe.chat_template, recipe.max_length)
        # Padding is never looked at (right padding, causal attention, labels by length): any id will do.
        self.pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        if self.recipe.eval.tasks and self.recipe.eval.chat_template and not self.tokenizer.chat_template:
            raise UserError(
                "the tokenizer has no chat template", "eval.chat_template", "eval.chat_template=false"
            )
        wanted = self.recipe.mask.calibration_samples
        if self.recipe.mask.salience in NEEDS_DATA and wanted > len(self.rows):
            raise UserError(
                f"{wanted} calibration samples are asked for, the data has {len(self.rows)} rows",
                where="mask.calibration_samples",
                fix=f"mask.calibration_samples={len(self.rows)}",
            )

    def _load_model(self) -> None:
        recipe = self.recipe
        ds_config = load_ds_config(recipe, distributed.world_size())
        model = load_base(recipe.model.name_or_path, recipe.model.dtype, ds_config)
        self.targets = find_targets(model, recipe.mask.targets)
        if tied := tied_targets(model, self.targets):
            raise UserError(
                f"{', '.join(tied)} shares its weight with another module (tied embeddings)",
                where="mask.targets",
                fix="target layers of the decoder only",
            )
        self.can_keep_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        values = model.config.to_dict().items()
        if dropout := {name: value for name, value in values if "drop" in name and value}:
            say(f"note: the model trains with dropout {dropout}: other world sizes draw other masks")
        if recipe.train.activation_checkpointing != "none":
            reentrant = recipe.train.activation_checkpointing == "reentrant"
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        self.shapes = target_shapes(self.targets)
        self.num_trainable = entries_wanted(recipe.mask, self.shapes)
        self.fingerprint = fingerprint(model)
        self.engine: SparseEngine = build_engine(model, ds_config, self.targets)
        for linear in self.targets.values():
            adapt(linear)

    def evaluate(self, moment: str) -> None:
        """Score the tasks `before` or `after` training, if the recipe says so."""
        recipe = self.recipe.eval
        if not recipe.tasks or not getattr(recipe, moment):
            return
        from speft_ds.evaluate import evaluate

        say(f"evaluating {', '.join(recipe.tasks)} {moment} training")
        with self.stage(f"eval_{moment}"):
            self.results[moment] = evaluate(
                self.engine.module, self.tokenizer, recipe, self.task_manager, self.recipe.seed
            )

    def token_loss(self, module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Summed cross-entropy of a batch's label tokens; `module` is the engine or its module."""
        # Logits over the prompts would be thrown away, and cost a fifth of a small model's step.
        keep = data.num_logits(batch["labels"]) if self.can_keep_logits else 0
        options = {"logits_to_keep": keep} if keep else {}
        logits = module(input_ids=batch["input_ids"], use_cache=False, **options).logits
        return data.summed_loss(logits, batch["labels"][:, -keep:])

    def calibration_batches(self) -> Iterator[tuple[dict[str, Tensor], float]]:
        """This rank's calibration batches, dealt in order; a filler of weight 0 where there is none.

        The batches are the same at every world size, and so is the gradient summed over them.
        """
        recipe = self.recipe.mask
        order = data.permutation(len(self.rows), self.recipe.seed, "calibration")
        rows = [self.rows[number] for number in order[: recipe.calibration_samples]]
        size = recipe.calibration_batch
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        num_labels = sum(row.num_labels for row in rows)
        rank, world_size = distributed.rank(), distributed.world_size()
        for first in range(0, len(batches), world_size):
            mine = first + rank < len(batches)
            batch = batches[first + rank] if mine else batches[0]
            collated = data.collate(batch, self.pad_id, distributed.device())
            yield collated, 1.0 / num_labels if mine else 0.0

    def choose_mask(self) -> None:
        """Score every targeted weight, take the top entries, and set up the trainable state."""
        recipe = self.recipe.mask
        scorer = Scorer(
            self.engine, self.targets, self.recipe.seed, self.calibration_batches(), self.token_loss
        )
        # Without dropout, unless checkpointing (which transformers does in training mode only) is asked for.
        self.engine.module.train(self.recipe.train.activation_checkpointing != "none")
        with self.stage("salience"):
            scores = SALIENCE[recipe.salience](scorer)
        with self.stage("selection"):
            self.mask = select(scores, self.shapes, self.num_trainable, recipe.budget)
        say(
            f"mask: {self.mask.num_trainable:,} of {self.mask.num_target_elements:,} entries "
            f"(density {self.mask.density:.4%}) by {recipe.salience}, {recipe.budget} budget, "
            f"sha256 {self.mask.sha256[:12]}"
        )
        self.attach()

    def attach(self) -> None:
        """Buffers, optimizer and schedule for the mask; from here on the engine trains."""
        train = self.recipe.train
        shards = {name: shard_of(linear.weight) for name, linear in self.targets.items()}
        self.state = SparseState(self.mask, shards, train.sparse_backend, train.reduce_bucket)
        for name, linear in self.targets.items():
            linear.sink = self.state.make_sink(name)
        optimizer = make_optimizer(self.state.delta, self.recipe.optimizer)
        schedule = make_schedule(optimizer, self.recipe.optimizer, self.num_steps)
        self.engine.attach(self.state, optimizer, schedule, self.recipe.optimizer.clip_norm)

    def train_step(self, step: int) -> dict:
        """One optimizer step on global batch `step` (from 0); returns its metrics line.

        The loss is the sum of the token losses over the number of label tokens of the global batch, over
        all ranks and micro-batches: both the one that is optimised and the one that is logged.
        """
        start = time.perf_counter()
        train = self.recipe.train
        ids = data.global_batch_ids(len(self.rows), self.recipe.seed, step, train.global_batch)
        rows = [self.rows[number] for number in ids]
        num_labels = sum(row.num_labels for row in rows)
        loss_sum = torch.zeros((), dtype=torch.float64, device=distributed.device())
        own = data.split_global_batch(rows, train.micro_batch, distributed.rank(), distributed.world_size())
        for micro_batch in own:
            batch = data.collate(micro_batch, self.pad_id, distributed.device())
            loss = self.token_loss(self.engine, batch) / num_labels
            loss_sum += loss.detach()
            # Already normalised by the global batch: the engine must not divide by accumulation steps.
            self.engine.backward(loss, scale_wrt_gas=False)
            if micro_batch is own[-1]:
                self._check_loss(distributed.all_reduce(loss_sum).item(), step)
            lr = self.engine.optimizer.param_groups[0]["lr"]
            self.engine.step()
        seconds = time.perf_counter() - start
        num_tokens = sum(len(row.ids) for row in rows)
        return {
            "step": step + 1,
            "loss": loss_sum.item(),
            "lr": lr,
            "grad_norm": self.engine.get_global_grad_norm(),
            "num_tokens": num_tokens,
            "tokens_per_s": num_tokens / seconds,
            "step_ms": seconds * 1000,
        }

    def _check_loss(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {step + 1}; the weights of the step before are unchanged",
                where="training",
                fix="lower optimizer.lr, look at the rows of this step, or set model.dtype=float32",
            )

    def train(self) -> None:
        """All steps, with one metrics line each."""
        path = self.folder / "metrics.jsonl" if distributed.rank() == 0 else None
        log = MetricsLog(path, self.num_steps)
        self.engine.train()
        with self.stage("training"):
            for step in range(self.num_steps):
                values = self.train_step(step)
                log.log({**values, "peak_memory_gib": peak_memory_gib()})
        log.close()

    def save(self) -> None:
        """Write the adapter (all ranks take part)."""
        facts = {
            "base": self.recipe.model.name_or_path,
            "fingerprint": self.fingerprint,
            "dtype": self.recipe.model.dtype,
            "recipe": self.recipe.model_dump(mode="json"),
        }
        with self.stage("save"):
            save_adapter(self.folder / "adapter", self.state, facts)

    def facts(self) -> dict:
        """The contents of run.json."""
        train = self.recipe.train
        return {
            "versions": self.versions,
            "machine": {
                "device": str(distributed.device()),
                "num_threads": torch.get_num_threads(),
                "platform": platform.platform(),
            },
            "world_size": distributed.world_size(),
            "global_batch": train.global_batch,
            "micro_batch": train.micro_batch,
            "num_steps": self.num_steps,
            "mask": {
                "salience": self.recipe.mask.salience,
                "budget": self.recipe.mask.budget,
                "calibration_samples": self.recipe.mask.calibration_samples,
                **self.mask.facts(),
                "entries_by_rank": self.state.layout.lengths,
            },
            "sparse_backends": sorted(set(self.state.backends.values())),
            "base": {"name_or_path": self.recipe.model.name_or_path, "fingerprint": self.fingerprint},
            "timings_s": self.timings,
        }


def write_json(path: Path, document: dict) -> None:
    """Write to a temporary name, flush to disk, rename; what JSON lacks becomes text, as lm-eval does."""
    from lm_eval.utils import handle_non_serializable

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(document, file, indent=2, default=handle_non_serializable, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def run(recipe: Recipe) -> None:
    """The whole job, on every rank. Rank 0 writes the run folder and prints the table.

    Raises:
        UserError: anything that the user can mend; the same on every rank.
    """
    from speft_ds.report import print_summary

    distributed.init()
    distributed.on_rank_0(lambda: check_output_dir(recipe))
    folder = Path(recipe.output_dir)
    trainer = Trainer(recipe)
    num_ranks = distributed.world_size()
    say(f"{recipe.name}: {len(trainer.rows):,} rows, {trainer.num_steps} steps, {num_ranks} rank(s)")

    def start_folder() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(resolved_yaml(recipe), encoding="utf-8")

    def save_results(moment: str) -> None:
        if trainer.results[moment] is not None:
            results = {key: value for key, value in trainer.results[moment].items() if key != "samples"}
            write_json(folder / "eval" / f"{moment}.json", results)

    distributed.on_rank_0(start_folder)
    trainer.evaluate("before")
    distributed.on_rank_0(lambda: save_results("before"))
    trainer.choose_mask()
    trainer.train()
    trainer.save()
    trainer.evaluate("after")
    distributed.on_rank_0(lambda: save_results("after"))

    def finish() -> None:
        throughput = tokens_per_second(folder / "metrics.jsonl")
        write_json(folder / "run.json", {**trainer.facts(), "tokens_per_s": throughput})
        print_summary(folder)

    distributed.on_rank_0(finish)
    distributed.barrier()
