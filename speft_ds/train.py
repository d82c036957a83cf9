"""A run from recipe to report: base, scores before, mask, training, adapter, scores after."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch

from speft_ds import distributed
from speft_ds.adapter import save_adapter
from speft_ds.base import Base
from speft_ds.data.batch import collate, split_global_batch
from speft_ds.data.order import SampleOrder
from speft_ds.errors import UserError
from speft_ds.files import write_json
from speft_ds.machine import machine, versions
from speft_ds.mask import Mask, read_mask
from speft_ds.metrics import MetricsLog, Timings, peak_memory_gib, say, tokens_per_second
from speft_ds.preflight import check_output_dir, mask_file
from speft_ds.recipe import start_folder
from speft_ds.schedule import SCHEDULES, Schedule, Training
from speft_ds.schema import Recipe
from speft_ds.selection import least_wanted
from speft_ds.sparse import SparseState


class Trainer:
    """One run. Its methods are the stages, to be called in the order of `run`.

    Attributes (after construction):
        base: the frozen, sharded base on its engine.
        rows: tokenised training rows, the same on every rank.
        timings: stage -> seconds.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.folder = Path(recipe.output_dir)
        self.timings = Timings()
        self.results: dict[str, dict | None] = {"before": None, "after": None}
        self.schedule: Schedule | None = None
        if recipe.eval.tasks:  # an unknown task should not wait for the end of training
            from speft_ds.evaluate import find_tasks

            with self.timings.stage("tasks"):
                self.task_manager = find_tasks(recipe.eval)
        with self.timings.stage("data"):
            self.base = Base(recipe, self.timings)
            self._check_chat_template()
            self.rows = self.base.read_training_rows()
            self.base.read_calibration_rows(self.rows)
        train = recipe.train
        self.order = SampleOrder(self.rows.sizes, recipe.data.weights, recipe.seed)
        self.num_steps = self.order.num_steps(train.global_batch, train.steps, train.epochs)
        self._check_steps()
        with self.timings.stage("model"):
            self.loaded, self.loaded_facts = self._read_mask()
            self.base.load(self.loaded)
        self._check_loaded()
        self.engine, self.targets = self.base.engine, self.base.targets

    @property
    def mask(self) -> Mask:
        """The mask of the moment."""
        return self.schedule.mask

    @property
    def state(self) -> SparseState:
        """The trained entries of the moment."""
        return self.schedule.state

    def _check_chat_template(self) -> None:
        recipe = self.recipe.eval
        if recipe.tasks and recipe.chat_template and not self.base.tokenizer.chat_template:
            raise UserError(
                "the tokenizer has no chat template", "eval.chat_template", "eval.chat_template=false"
            )

    def _check_steps(self) -> None:
        mask, warmup = self.recipe.mask, self.recipe.optimizer.warmup_steps
        if warmup > self.num_steps:
            raise UserError(
                f"more warm-up steps ({warmup}) than steps ({self.num_steps})",
                where="optimizer.warmup_steps",
                fix=f"optimizer.warmup_steps={self.num_steps // 10}",
            )
        if mask.schedule in ("periodic", "drop_grow") and mask.update_every >= self.num_steps:
            raise UserError(
                f"the mask would never change: it would after {mask.update_every} steps, the run has "
                f"{self.num_steps}",
                where="mask.update_every",
                fix=f"mask.update_every={max(1, self.num_steps // 5)}, or mask.schedule=static",
            )

    def _read_mask(self) -> tuple[Mask | None, dict]:
        path = self.recipe.mask.load
        return read_mask(mask_file(path)) if path else (None, {})

    def _check_loaded(self) -> None:
        """Refuse a loaded mask of another base, or one that cannot be chosen anew in the same size."""
        if self.loaded is None:
            return
        recipe, loaded = self.recipe.mask, self.loaded
        where = f"mask.load: {recipe.load}"
        if self.loaded_facts.get("fingerprint_bfloat16") != self.base.fingerprint_bfloat16:
            raise UserError(
                "the mask was scored on another base: the weights of this model have another fingerprint",
                where=where,
                fix=f"train {self.loaded_facts.get('base')}, or score this model: speft score",
            )
        if loaded.num_trainable == 0:
            raise UserError("the mask has no entries: nothing to train", where, "score another: speft score")
        if recipe.schedule == "periodic" and (
            recipe.budget == "per_row" or loaded.num_trainable < least_wanted(recipe, self.base.shapes)
        ):
            raise UserError(
                f"mask.budget={recipe.budget} with mask.granularity={recipe.granularity} cannot choose "
                f"{loaded.num_trainable:,} entries anew, which the loaded mask has",
                where=where,
                fix="mask.budget=global mask.granularity=element, or mask.schedule=static",
            )
        say("note: mask.load is given, so the recipe's salience, density, budget and targets are not used")

    def evaluate(self, moment: str) -> None:
        """Score the tasks `before` or `after` training, if the recipe says so."""
        recipe = self.recipe.eval
        if not recipe.tasks or not getattr(recipe, moment):
            return
        from speft_ds.evaluate import evaluate

        say(f"evaluating {', '.join(recipe.tasks)} {moment} training")
        with self.timings.stage(f"eval_{moment}"):
            self.results[moment] = evaluate(
                self.engine.module, self.base.tokenizer, recipe, self.task_manager, self.recipe.seed
            )

    def choose_mask(self) -> None:
        """Take the mask that is given, or score and select one, and set up the trainable state."""
        mask = self.loaded or self.base.choose_mask()
        recipe = self.recipe.mask
        source = f"by {recipe.salience}, {recipe.budget} budget"
        if self.loaded:
            source = f"loaded from {recipe.load}"
        say(
            f"mask: {mask.num_trainable:,} of {mask.num_target_elements:,} entries "
            f"(density {mask.density:.4%}) {source}, sha256 {mask.sha256[:12]}"
        )
        base = self.base
        training = Training(
            self.recipe, self.engine, self.targets, base.heads, self.num_steps, base.choose_mask
        )
        self.schedule = SCHEDULES[recipe.schedule](training, mask)

    def train_step(self, step: int) -> dict:
        """One optimizer step on global batch `step` (from 0); returns its metrics line.

        The loss is the sum of the token losses over the number of label tokens of the global batch, over
        all ranks and micro-batches: both the one that is optimised and the one that is logged.
        """
        start = time.perf_counter()
        train = self.recipe.train
        rows = [self.rows[row] for row in self.order.ids(step * train.global_batch, train.global_batch)]
        num_labels = sum(row.num_labels for row in rows)
        # loss and, for a classifier, rows that it got right, over all ranks and micro-batches
        sums = torch.zeros(2, dtype=torch.float64, device=distributed.device())
        self.schedule.before_step(step)
        own = split_global_batch(rows, train.micro_batch, distributed.rank(), distributed.world_size())
        for micro_batch in own:
            batch = collate(micro_batch, self.base.pad_id, distributed.device())
            loss, num_correct = self.base.objective(self.engine, batch)
            loss = loss / num_labels
            sums[0] += loss.detach()
            if num_correct is not None:
                sums[1] += num_correct
            # Already normalised by the global batch: the engine must not divide by accumulation steps.
            self.engine.backward(loss, scale_wrt_gas=False)
            if micro_batch is own[-1]:
                self._check_loss(distributed.all_reduce(sums)[0].item(), step)
            lr = self.engine.optimizer.param_groups[0]["lr"]
            self.engine.step()
        self.schedule.after_step(step)
        seconds = time.perf_counter() - start
        num_tokens = sum(len(row.ids) for row in rows)
        return {
            "step": step + 1,
            "loss": sums[0].item(),
            **({"accuracy": sums[1].item() / num_labels} if self.base.classifies else {}),
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
        with self.timings.stage("training"):
            for step in range(self.num_steps):
                values = self.train_step(step)
                log.log({**values, "peak_memory_gib": peak_memory_gib()})
        log.close()

    def save(self) -> None:
        """Write the adapter (all ranks take part)."""
        facts = {
            **self.base.identity(),
            "recipe": self.recipe.model_dump(mode="json"),
        }
        with self.timings.stage("save"):
            save_adapter(self.folder / "adapter", self.state, facts)

    def facts(self) -> dict:
        """The contents of run.json."""
        train = self.recipe.train
        return {
            "versions": versions(),
            "machine": {"device": str(distributed.device()), **machine()},
            "world_size": distributed.world_size(),
            "global_batch": train.global_batch,
            "micro_batch": train.micro_batch,
            "num_steps": self.num_steps,
            "mask": {
                "salience": self.recipe.mask.salience,
                "granularity": self.recipe.mask.granularity,
                "budget": self.recipe.mask.budget,
                "schedule": self.recipe.mask.schedule,
                "layer_gate": self.recipe.mask.layer_gate,
                "loaded_from": self.recipe.mask.load,
                "calibration_samples": self.recipe.mask.calibration_samples,
                **self.mask.facts(),
                "entries_by_rank": self.state.layout.lengths,
                "changes": self.schedule.changes,
            },
            "head": sum(rows * columns for rows, columns in self.state.heads.values()),
            "sparse_backends": sorted(set(self.state.gradient.backends.values())),
            "base": {"name_or_path": self.recipe.model.name_or_path, "fingerprint": self.base.fingerprint},
            "timings_s": self.timings,
        }


def run(recipe: Recipe) -> None:
    """The whole job, on every rank. Rank 0 writes the run folder and prints the table.

    Raises:
        UserError: anything that the user can mend; the same on every rank.
    """
    from speft_ds.report import print_summary

    start = time.perf_counter()
    distributed.init()
    distributed.on_rank_0(lambda: check_output_dir(recipe))
    folder = Path(recipe.output_dir)
    trainer = Trainer(recipe)
    num_ranks = distributed.world_size()
    say(f"{recipe.name}: {len(trainer.rows):,} rows, {trainer.num_steps} steps, {num_ranks} rank(s)")

    def save_results(moment: str) -> None:
        if trainer.results[moment] is not None:
            results = {key: value for key, value in trainer.results[moment].items() if key != "samples"}
            write_json(folder / "eval" / f"{moment}.json", results)

    distributed.on_rank_0(lambda: start_folder(recipe))
    trainer.evaluate("before")
    distributed.on_rank_0(lambda: save_results("before"))
    trainer.choose_mask()
    trainer.train()
    trainer.save()
    trainer.evaluate("after")
    distributed.on_rank_0(lambda: save_results("after"))
    trainer.timings["total"] = time.perf_counter() - start

    def finish() -> None:
        throughput = tokens_per_second(folder / "metrics.jsonl")
        write_json(folder / "run.json", {**trainer.facts(), "tokens_per_s": throughput})
        print_summary(folder)

    distributed.on_rank_0(finish)
    distributed.barrier()
