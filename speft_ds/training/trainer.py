"""The training loop: the stages of a run, and its step."""

from __future__ import annotations

import math
import time
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import torch

from speft_ds.adapter.format import tensors_sha256
from speft_ds.adapter.save import save_adapter
from speft_ds.comm import collectives, signals, watchdog
from speft_ds.comm.signals import StepFlags
from speft_ds.config.mask_config import mask_file
from speft_ds.config.recipe import Recipe
from speft_ds.data.collate import collate, split_global_batch
from speft_ds.data.dataset import Row
from speft_ds.data.row_counts import row_counts
from speft_ds.env import log_rank0, versions
from speft_ds.errors import UserError
from speft_ds.evaluation.eval_jobs import EvalJob, Phase, jobs_of, slice_jobs
from speft_ds.evaluation.results import keep_scores, still_to_score
from speft_ds.evaluation.validation_loss import ValidationLoss
from speft_ds.model.targets import shorten
from speft_ds.sparse.gradient import SparseGradient
from speft_ds.sparse.kernels.measure import agree_on_costs
from speft_ds.sparse.mask import Mask, read_mask
from speft_ds.sparse.state import SparseState
from speft_ds.training import checks, memory
from speft_ds.training.checkpoint.parts import Parts, Snapshot
from speft_ds.training.checkpoint.random_states import random_states, restore_random_states
from speft_ds.training.checkpoint.resume import Start
from speft_ds.training.checkpoint.writer import Writer
from speft_ds.training.make_schedule import make_schedule
from speft_ds.training.metrics import MetricsLog, Monitor, Timings
from speft_ds.training.model_facts import base_facts, scored_model_facts
from speft_ds.training.profile import StepProfiler
from speft_ds.training.run_data import load_data, read_file
from speft_ds.training.schedule import Schedule
from speft_ds.training.setup import choose_mask, load_context
from speft_ds.training.stash_format import TrainingStash


class Trainer:
    """One run. Its methods are the stages, to be called in the order of `run`.

    Args:
        recipe: all sections.
        start: where the run starts; None: at the beginning.

    Attributes (after construction):
        context: the frozen, sharded base on its engine, and its rows.
        rows: tokenised training rows, the same on every rank.
        num_steps: of the run; `first_step`: of this process.
        row_counts: see `row_counts.row_counts`.
        timings: stage -> seconds.
    """

    def __init__(self, recipe: Recipe, start: Start | None = None):
        self.recipe = recipe
        self.checkpoint = start.checkpoint if start else None
        self.folder = Path(recipe.output_dir)
        self.timings = Timings(collectives.synchronize)
        self.schedule: Schedule | None = None
        self.evaluation = None
        jobs = jobs_of(recipe.eval, "before") + jobs_of(recipe.eval, "after") or slice_jobs(recipe.eval)
        if jobs:
            with self.timings.stage("tasks"):  # an unknown task should not wait for the end of training
                from speft_ds.evaluation.runner import EvalRunner  # late: lm-eval takes its time

                self.evaluation = EvalRunner(recipe, jobs)
        with self.timings.stage("data"):
            data = load_data(recipe, needs_training=True, needs_calibration=True)
            checks.check_chat_template(recipe.eval, data.tokenizer)
            self.rows, self.validation = data.training, None
            if recipe.eval.validation is not None:
                rows = read_file(recipe, data, recipe.eval.validation, "eval.validation")
                self.validation = ValidationLoss(rows, recipe.eval.batch_size, data.pad_id)
        if self.evaluation is not None:
            with self.timings.stage("tasks"):  # nor should what lm-eval does not score
                self.evaluation.prepare(data.tokenizer)
        train = recipe.train
        self.order = self.rows.order(recipe.data.weights, recipe.seed)
        self.num_steps = self.order.num_steps(train.global_batch, train.steps, train.epochs)
        checks.check_steps(recipe, self.num_steps)
        self.row_counts = row_counts(self.rows, self.order.num_epochs(self.num_steps * train.global_batch))
        with self.timings.stage("kernels"):
            costs = agree_on_costs(recipe, self.checkpoint.manifest if self.checkpoint else None)
        with self.timings.stage("model"):
            self.loaded, facts = read_mask(mask_file(recipe.mask.load)) if recipe.mask.load else (None, {})
            self.context = load_context(recipe, data, self.loaded, costs=costs)
        checks.check_sampled(self.context)
        checks.check_shapes(recipe.mask, self.context.shapes)
        if self.loaded is not None:
            checks.check_loaded_mask(self.context, self.loaded, facts)
            log_rank0("note: with mask.load, the recipe's salience, density, budget and targets are not used")
        self.engine, self.targets = self.context.engine, self.context.targets
        self.stash = TrainingStash(self.engine.module, train.stash)
        self.first_step = 0  # the steps before it were made by other processes
        self.num_skipped = self.num_nonfinite = 0  # steps: over the run, and in a row up to now
        self.best_loss = math.inf  # on the validation rows
        self.scoring_s: dict[str, float] = {}  # label of a job that was not cached -> seconds, on rank 0
        self.run_id = ""
        self.resources: list[dict] = []  # by rank, of the training: memory and communication volume
        self.writer = Writer(self.folder, train, self.checkpoint.step if self.checkpoint else 0)
        self.flags = StepFlags(lambda: self.writer.is_written, train.checkpoint_every)
        if self.checkpoint is not None:
            checks.check_same_run(self.context, self.loaded, self.checkpoint)

    @property
    def mask(self) -> Mask:
        """The mask of the moment."""
        return self.schedule.mask

    @property
    def state(self) -> SparseState:
        """The trained entries of the moment."""
        return self.schedule.state

    @property
    def gradient(self) -> SparseGradient:
        """The gradient of these entries."""
        return self.schedule.gradient

    def evaluate(self, phase: Phase) -> None:
        """Score what the recipe says `before` or `after` training, as far as it was not done before.

        Scores of this phase that are of other weights, or made otherwise, are set aside.
        """
        folder, wanted = self.folder / "eval", jobs_of(self.recipe.eval, phase)
        if not wanted:
            return
        adapter = self.folder / "adapter" if phase == "after" else None
        model = scored_model_facts(self.context, collectives.broadcast_object(tensors_sha256(adapter)))
        left = collectives.run_on_rank0(lambda: still_to_score(folder, phase, wanted, model, self.recipe))
        left: list[EvalJob] = collectives.broadcast_object(left)  # as rank 0 sees the folder
        if left and phase == "before" and self.first_step > 0:
            labels = ", ".join(job.label for job in left)
            log_rank0(f"note: {labels}: not scored the way the recipe asks; the weights are trained by now")
        elif left:
            with self.timings.stage(f"eval_{phase}"):
                for scored in self.evaluation.run(self.engine.module, left, model):
                    collectives.run_on_rank0(partial(keep_scores, folder, scored, self.recipe.eval))
                    if scored is not None and not scored.file.cached:
                        self.scoring_s[scored.file.label] = scored.file.seconds

    def choose_mask(self) -> None:
        """Take the mask that is given, or score and select one, and set up the trainable state."""
        if self.checkpoint is not None:
            return self._take_up()
        mask = self.loaded or choose_mask(self.context, self.timings)
        self._note_trained(mask)
        with self.timings.stage("state"):
            self.schedule = self._make_schedule(mask)
        log_rank0(self.gradient.in_words())

    def _note_trained(self, mask: Mask) -> None:
        """Say what is trained."""
        if whole := self.context.whole_of_base:
            elements = sum(target.numel for target in whole.values())
            log_rank0(f"trained whole: {elements:,} elements of {len(whole)} weights: {shorten(list(whole))}")
        if (new := self.context.new_tokens).targets:
            log_rank0(f"new tokens: rows of {shorten(list(new.targets))} are trained, {new.in_words()}")
        if not self.recipe.method.has_mask:
            return
        recipe = self.recipe.mask
        by_scores = f"by {recipe.salience}, {recipe.budget} budget"
        source = f"loaded from {recipe.load}" if self.loaded else by_scores
        log_rank0(
            f"mask: {mask.num_trainable:,} of {mask.num_target_elements:,} entries "
            f"(density {mask.density:.4%}) {source}, sha256 {mask.sha256[:12]}"
        )
        log_rank0(mask.cost_in_words())

    def _make_schedule(self, mask: Mask) -> Schedule:
        return make_schedule(
            self.context, mask, self.num_steps, partial(choose_mask, self.context, self.timings)
        )

    def _take_up(self) -> None:
        """The trainable state, as the checkpoint has it."""
        parts, manifest = Parts(self.checkpoint), self.checkpoint.manifest
        with self.timings.stage("resume"):
            with parts.refusing():
                mask = parts.mask("trained", self.context.shapes)
            self.schedule = self._make_schedule(mask)  # an error of ours is no damage
            with parts.refusing():
                self._restore(parts, manifest)
        self.engine.global_steps = self.first_step
        was, now = manifest["world_size"], collectives.world_size()
        ranks = f"{now} rank(s)" + (f", it was written by {was}" if was != now else "")
        at = f"step {self.first_step} of {self.num_steps}"
        log_rank0(f"resuming from {self.checkpoint.path}: {at}, on {ranks}")
        log_rank0(self.gradient.in_words())

    def _restore(self, parts: Parts, manifest: dict) -> None:
        """What the schedule and this loop go on from."""
        self.schedule.restore(parts)
        if self.mask.sha256 != parts.facts["sha256"]:
            raise ValueError("its mask has another hash now")
        self.first_step, progress = manifest["step"], manifest["progress"]
        self.num_skipped, self.num_nonfinite = progress["num_skipped"], progress["num_nonfinite"]
        self.stash.restore(progress.get("stash"))
        self.best_loss = math.inf if progress["best_loss"] is None else progress["best_loss"]

    def train_step(self, step: int) -> dict:
        """One optimizer step on global batch `step` (from 0); returns its metrics line.

        The loss is the sum of the token losses over the number of label tokens of the global batch, over
        all ranks and micro-batches: both the one that is optimised and the one that is logged. A step whose
        loss or gradient is not finite changes nothing.

        `step_ms` ends without waiting for the device, which may still update the weights then: the next
        step waits for that, where it reads its loss, as this one did for the step before.
        """
        start = time.perf_counter()
        size, optimizer = self.recipe.train.global_batch, self.engine.optimizer
        rows = [self.rows[row] for row in self.order.ids(step * size, size)]
        num_labels, num_tokens = sum(row.num_labels for row in rows), sum(len(row.ids) for row in rows)
        lr = optimizer.param_groups[0]["lr"]
        self.schedule.before_step(step)
        loss, num_correct = self._accumulate(rows, num_labels, step)
        self._count_nonfinite(optimizer.overflow, loss, step)
        self.schedule.after_step(step, optimizer.overflow)
        stash = self.stash.after_step(step, loss, optimizer.overflow)
        seconds = time.perf_counter() - start
        return {
            "step": step + 1,
            "loss": loss,
            **({"accuracy": num_correct / num_labels} if num_correct is not None else {}),
            "lr": lr,
            "grad_norm": optimizer._global_grad_norm,
            "num_skipped": self.num_skipped,
            "num_tokens": num_tokens,
            "tokens_per_s": num_tokens / seconds,
            "step_ms": seconds * 1000,
            **stash,
        }

    def _accumulate(self, rows: list[Row], num_labels: int, step: int) -> tuple[float, float | None]:
        """Forward and backward of a global batch, each rank its own micro-batches, and the optimizer's step.

        Returns:
            (loss, rows that a classifier got right or None), over all ranks and micro-batches.
        """
        train, rank, world_size = self.recipe.train, collectives.rank(), collectives.world_size()
        # Over all ranks and micro-batches, read once: loss; for a classifier, rows that it got right; the
        # squared norm of the gradient; the flags.
        sums = torch.zeros(3 + len(StepFlags.KINDS), dtype=torch.float64, device=collectives.device())
        values, optimizer = [], self.engine.optimizer
        own = split_global_batch(rows, train.micro_batch, rank, world_size)
        for number, micro_batch in enumerate(own):
            watchdog.heartbeat(f"step {step + 1}, micro-batch {number + 1} of {len(own)}", counts=True)
            batch = collate(micro_batch, self.context.data.pad_id, collectives.device())
            with self.stash.packing(batch["input_ids"].numel()):
                loss, num_correct = self.context.objective(self.engine, batch)
            loss = loss / num_labels
            sums[0] += loss.detach()
            if num_correct is not None:
                sums[1] += num_correct
            # Already normalised by the global batch: the engine must not divide by accumulation steps.
            self.engine.backward(loss, scale_wrt_gas=False)
            if micro_batch is own[-1]:
                sums[2] = optimizer.own_squared_norm()
                sums[3:] = torch.tensor(self.flags.local(), dtype=torch.float64)
                values = collectives.all_reduce(sums).tolist()
                self.flags.reduce(values[3:])
                optimizer.skip_step, optimizer.squared_norm = not math.isfinite(values[0]), values[2]
            self.engine.step()
        return values[0], None if num_correct is None else values[1]

    def _count_nonfinite(self, skipped: bool, loss: float, step: int) -> None:
        """Count a step that was skipped. Raises UserError, on every rank, where that is one too many."""
        self.num_skipped += skipped
        self.num_nonfinite = self.num_nonfinite + 1 if skipped else 0
        if self.num_nonfinite < self.recipe.train.max_nonfinite:
            return
        self.writer.finish()
        norm = self.engine.optimizer._global_grad_norm
        raise UserError(
            f"the loss is {loss} and the gradient norm {norm} at step {step + 1}; {self.num_nonfinite} steps "
            f"in a row were not finite (train.max_nonfinite); {self.writer.last()}",
            where="training",
            fix="check the rows of these steps; start another run with a lower optimizer.lr, or "
            "model.dtype=float32",
            can_go_on=False,
        )

    def train(self) -> None:
        """All steps that are left, with one metrics line each, and checkpoints beside them.

        Raises:
            Stopped: a rank was asked to stop; all that was reached is in a checkpoint.
        """
        path = self.folder / "metrics.jsonl" if collectives.rank() == 0 else None
        monitor = collectives.run_on_rank0(lambda: Monitor(self.recipe, self.folder))
        after = [job.label.replace("after", "before", 1) for job in jobs_of(self.recipe.eval, "after")]
        seconds = [self.scoring_s.get(label) for label in after]
        then_s = None if None in seconds else sum(seconds)
        log = MetricsLog(path, self.num_steps, self.first_step, monitor, then_s)
        if self.checkpoint is not None:
            restore_random_states(self.checkpoint)
        self.flags.restart()
        self.engine.train()
        memory.reset_peak()
        train = self.recipe.train
        profiler = StepProfiler(train.profile, self.folder)
        with self.timings.stage("training"), closing(log):
            for step in range(self.first_step, self.num_steps):
                profiler.before(step + 1)
                values = {**self.train_step(step), "peak_memory_gib": memory.peak_gib()}
                profiler.after(step + 1)
                if step == self.first_step + 1:  # in the first, ZeRO-3 frees weights that it keeps later
                    memory.note_saved_inputs(self.targets.values(), train.activation_checkpointing)
                    self.stash.note_saved()
                values |= self._measure(step + 1)
                log.log(values)
                self._checkpoint_if_due(step + 1, log, values.get("validation_loss"))
            self.writer.finish()
        num_micro_batches = train.global_batch // (train.micro_batch * collectives.world_size())
        held = (self.engine, self.state, self.gradient, self.schedule.optimizer)
        resources = {**memory.resources(*held, num_micro_batches), "saved": self.stash.facts()}
        self.resources = collectives.all_gather_objects(resources)
        self.timings["checkpoints"] = self.writer.seconds

    def _measure(self, done: int) -> dict:
        """Validation loss and scores on a slice of the tasks after `done` steps, if it is time."""
        recipe, values = self.recipe.eval, {}
        is_last = done == self.num_steps
        if done % recipe.every and not is_last:
            return values
        if self.validation is not None:
            with self.timings.stage("validation"):
                values["validation_loss"] = self.validation.measure(self.engine.module, self.context.loss)
        if recipe.slice is not None and recipe.tasks and not (is_last and recipe.after):
            # A rank that is asked to stop does so in a step, where a checkpoint is written: scores can wait.
            with self.timings.stage("slices"), suppress(signals.Stopped):
                values["scores"] = self.evaluation.slice_scores(self.engine.module)
        return values

    def _checkpoint_if_due(self, done: int, log: MetricsLog, validation_loss: float | None) -> None:
        """Write a checkpoint after `done` steps if it is time, and stop if a rank was asked to."""
        flags, writer = self.flags, self.writer
        if flags.all_written:
            writer.finish()
        is_best = validation_loss is not None and validation_loss < self.best_loss
        self.best_loss = validation_loss if is_best else self.best_loss
        train, scores_after = self.recipe.train, bool(jobs_of(self.recipe.eval, "after"))
        keeps = train.checkpoint_every is not None
        at_the_end = done == self.num_steps and (keeps or scores_after)  # a stop while scoring costs nothing
        is_kept = train.keep_every is not None and done % train.keep_every == 0
        is_time = flags.is_time(done) or is_kept or (is_best and train.keep_best)
        if flags.stop or at_the_end or (keeps and is_time):
            log.flush()
            writer.start(done, self._snapshot(), self._manifest(done, validation_loss))
            flags.restart()
        if flags.stop:
            writer.finish()
            collectives.raise_if_stop_requested()

    def _snapshot(self) -> Snapshot:
        """The trainable state, and this rank's random states (dropout)."""
        snapshot = self.schedule.snapshot()
        snapshot.own.update(random_states())
        return snapshot

    def _manifest(self, done: int, validation_loss: float | None) -> dict:
        """What a checkpoint says of the run."""
        epoch, row = self.order.locate(done * self.recipe.train.global_batch)
        return {
            "run_id": self.run_id,
            "recipe": self.recipe.model_dump(mode="json", exclude={"name"}),
            "base": base_facts(self.context),
            "rows_sha256": self.rows.facts["sha256"],
            "calibration_sha256": self.context.data.calibration_sha256,
            "order": {"seed": self.recipe.seed, "epoch": epoch, "row": row},
            "progress": {
                "num_skipped": self.num_skipped,
                "num_nonfinite": self.num_nonfinite,
                "best_loss": self.best_loss if math.isfinite(self.best_loss) else None,
                "stash": self.stash.progress(),
            },
            "validation_loss": validation_loss,
            "kernel_costs": self.context.costs.to_json() if self.context.costs else None,
            "versions": versions(),
        }

    def save(self) -> None:
        """Write the adapter (all ranks take part)."""
        facts = {**base_facts(self.context), "recipe": self.recipe.model_dump(mode="json")}
        facts["mask"] = self.mask.facts()
        tokenizer = self.context.data.tokenizer if self.context.new_tokens.targets else None
        with self.timings.stage("save"):
            save_adapter(self.folder / "adapter", self.state, facts, self.context.low_rank, tokenizer)
