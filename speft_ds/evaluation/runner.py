"""Evaluation of a model on a recipe's tasks, with the same scores for any number of ranks."""

from __future__ import annotations

import copy
import logging
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import torch
from lm_eval import evaluator, simple_evaluate
from lm_eval.api import task
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.models.utils import resolve_max_length
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from speft_ds.comm import collectives
from speft_ds.config.recipe import Recipe
from speft_ds.env import log_rank0, versions
from speft_ds.evaluation.eval_jobs import AS_IT_IS, SLICE, EvalJob, LowBits, prompt_formats, slice_jobs
from speft_ds.evaluation.lm import EngineLM, ResponseCache
from speft_ds.evaluation.low_bits import low_bits_notes, rounded_inputs
from speft_ds.evaluation.perplexity import read_text, text_perplexity
from speft_ds.evaluation.prompt_tasks import AutoPrompts, labelled_rows
from speft_ds.evaluation.results import Scored, asked, check_scores, scores_of
from speft_ds.evaluation.scores import ScoreFile, Settings
from speft_ds.evaluation.task_checks import check_tasks
from speft_ds.evaluation.tasks import find_tasks, load_tasks, local_data
from speft_ds.model.low_rank import has_low_rank
from speft_ds.model.quantise import quantised_linears
from speft_ds.zero.shards import full_shape, shard_of

MAX_SHARE = 0.5  # of the free memory, for a copy: activations, logits and the KV cache need the rest


class EvalRunner:
    """The tasks of some jobs, ready to be scored once `prepare` has passed.

    Args:
        jobs: of the run, in order.
        low_bits: the formats that the model is scored in; that of its weights is for the caller to apply.
    Raises:
        UserError: lm-eval does not know a task.
    """

    def __init__(self, recipe: Recipe, jobs: Sequence[EvalJob], low_bits: LowBits = AS_IT_IS):
        self.recipe, self.section, self.jobs, self.low_bits = recipe, recipe.eval, list(jobs), low_bits
        self.tokenizer: PreTrainedTokenizerBase | None = None
        names = list(dict.fromkeys(task for job in jobs for task in job.tasks))
        self.manager = find_tasks(names, self.section.include_path) if names else None
        self.formats = prompt_formats(self.section.format_spread)
        self._notes: dict[tuple, list[str]] = {}  # by what the requests of a job depend on
        self._told: set[str] = set()  # notes that were logged

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Load every task and build every request, so that what fails does so before the model is loaded.

        Every rank enters this together.

        Args:
            tokenizer: the base's.
        Raises:
            UserError: lm-eval would not score a task; a task's data cannot be read.
        """
        self.tokenizer = tokenizer
        config = AutoConfig.from_pretrained(self.recipe.model.name_or_path, trust_remote_code=False)
        max_length = resolve_max_length(config, tokenizer)
        if any(job.has_text for job in self.jobs):
            read_text(Path(self.section.forgetting_text), self.section.forgetting_bytes)
        for job in self.jobs:
            if job.tasks and _requests_of(job) not in self._notes:
                with undisturbed(), local_data(self.section.data_dir) as notes:
                    found = check_tasks(job, self.manager, tokenizer, self.section.chat_template, max_length)
                self._notes[_requests_of(job)] = sorted({*notes, *found})
                self._tell(self._notes[_requests_of(job)])
            if job.kind == "auto":
                with undisturbed(), local_data(self.section.data_dir):
                    for task in load_tasks(self.manager, job.tasks).values():
                        labelled_rows(task, self.section.auto_prompt.shots, self.recipe.seed)

    def _tell(self, notes: Sequence[str]) -> None:
        """Log notes, each once."""
        for note in notes:
            if note not in self._told:
                log_rank0(f"note: {note}")
        self._told.update(notes)

    def run(self, module: nn.Module, jobs: list[EvalJob], of: dict) -> Iterator[Scored | None]:
        """Run jobs one after the other; every rank enters this together.

        Each result is yielded at once, so that it is kept if a later job is stopped.

        Args:
            module: the engine's.
            of: what identifies the weights, by `scored_model_facts`; the responses of a base are cached.
        Yields:
            the results on rank 0, None on the others.
        Raises:
            UserError: a task's data cannot be read.
        """
        inputs = self.low_bits.activations
        with model_to_score(module, self.section.mode) as (model, is_sharded), rounded_inputs(model, inputs):
            self._tell(low_bits_notes(model, self.low_bits))
            for job in jobs:
                if job.label != SLICE:
                    log_rank0(self._round(job, of))
                with undisturbed():
                    scored = self._score(model, is_sharded, job, of)
                yield scored

    def _round(self, job: EvalJob, of: dict) -> str:
        """`round 1 of 4: quickstart_json, untouched`."""
        what = ", ".join([*job.tasks, *(["the forgetting text"] if job.has_text else [])])
        how = ["untouched" if _is_base(of) else "trained"]
        how += [f"{job.num_fewshot} examples in the prompt"] if job.kind == "fewshot" else []
        how += ["a prompt that is searched"] if job.kind == "auto" else []
        how += [f"prompt format {job.format}"] if job.format else []
        how += [f"{what} in {name}" for what, name in self.low_bits.facts.items()]
        return f"round {self.jobs.index(job) + 1} of {len(self.jobs)}: {what}, {', '.join(how)}"

    def slice_scores(self, module: nn.Module) -> dict[str, float]:
        """Task and metric -> score on the first `eval.slice` documents of each task, on every rank."""
        (scored,) = self.run(module, slice_jobs(self.section), {})
        scores = scored and {f"{s.task} {s.metric}": s.value for s in scored.file.main_scores()}
        return collectives.broadcast_object(scores)

    def _score(self, model: nn.Module, is_sharded: bool, job: EvalJob, of: dict) -> Scored | None:
        start, section = time.perf_counter(), self.section
        is_base = _is_base(of)
        device = torch.cuda.get_device_name() if collectives.device().type == "cuda" else "cpu"
        run_by = {"batch_size": section.batch_size, "device": device, "is_sharded": is_sharded}
        cache = ResponseCache({**of, **run_by, "versions": versions()}) if is_base else None
        prompt_format = self.formats[job.format]
        lm = EngineLM(model, self.tokenizer, section.batch_size, is_sharded, prompt_format, cache)
        if job.kind == "auto":
            lm.prompt_format = self._searched_prompts(lm, job)
        results = self._results(lm, job) if job.tasks else {}
        perplexity = text_perplexity(lm, section) if job.has_text else None
        if collectives.rank() != 0:
            return None
        forgetting = [task for task in section.forgetting_tasks if task not in section.tasks]
        scores = scores_of(results, forgetting) if results else []
        scores, more_notes = check_scores(scores, job, lm.num_rewritten)
        notes = [*self._notes.get(_requests_of(job), []), *more_notes, *lm.notes()]
        notes += low_bits_notes(model, self.low_bits)
        notes += lm.prompt_format.notes() if job.kind == "auto" else []
        if cache is not None and cache.problem:
            notes.append(cache.problem)
        if job.label != SLICE:
            self._tell(notes)
        file = ScoreFile(
            label=job.label,
            kind=job.kind,
            model="base" if is_base else "tuned",
            asked=asked(job, of, self.recipe),
            settings=Settings(
                num_fewshot=job.num_fewshot,
                limit=job.limit,
                chat_template=section.chat_template,
                seed=DEFAULT_OTHER_SEED,
                format=job.format,
                format_text=str(prompt_format) if prompt_format else None,
                mode="sharded" if is_sharded else "gathered",
                world_size=collectives.world_size(),
                batch_size=section.batch_size,
                **self.low_bits.facts,
                lm_eval=version("lm_eval"),
            ),
            scores=scores,
            perplexity=perplexity,
            auto_prompt=lm.prompt_format.facts() if job.kind == "auto" else None,
            seconds=time.perf_counter() - start,
            cached=cache is not None and cache.has_everything,
            notes=notes,
        )
        return Scored(file, results)

    def _searched_prompts(self, lm: EngineLM, job: EvalJob) -> AutoPrompts:
        with local_data(self.section.data_dir):
            tasks = load_tasks(self.manager, job.tasks)
        return AutoPrompts(lm, tasks, self.section.auto_prompt, self.recipe.seed, self.section.chat_template)

    def _results(self, lm: EngineLM, job: EvalJob) -> dict | None:
        """lm-eval's results (on rank 0), with the prompts as the model got them."""
        # lm-eval seeds all generators with its own defaults, so that the prompts are those of stock lm-eval.
        with local_data(self.section.data_dir):
            results = simple_evaluate(
                model=lm,
                tasks=list(job.tasks),
                num_fewshot=job.num_fewshot,
                limit=job.limit,
                apply_chat_template=self.section.chat_template,
                task_manager=self.manager,
            )
        if results is not None and lm.prompt_format is not None:
            for task, row in ((task, row) for task, rows in results["samples"].items() for row in rows):
                asked = enumerate(row["arguments"])
                rewrite = lm.prompt_format.rewrite_request
                row["arguments"] = [rewrite(each, task, row["doc"], number) for number, each in asked]
        return results


def _is_base(of: dict) -> bool:
    return "adapter" in of and of["adapter"] is None


def _requests_of(job: EvalJob) -> tuple:
    """What the requests of a job depend on, but for their format."""
    return job.tasks, job.num_fewshot, job.limit


@contextmanager
def undisturbed() -> Iterator[None]:
    """Training continues with the random numbers that it would draw without an evaluation.

    Without lm-eval's warnings: what they say of the scores is counted in the notes. It does not ask git
    either, which complains wherever there is no repository, and shows no bars without a name.
    """
    python, numpy_state, device = random.getstate(), np.random.get_state(), collectives.device()
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    ask_git, evaluator.get_git_commit_hash = evaluator.get_git_commit_hash, lambda: None
    bar, task.tqdm = task.tqdm, lambda rows, **_: rows
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        log.setLevel(level)
        evaluator.get_git_commit_hash, task.tqdm = ask_git, bar
        random.setstate(python)
        np.random.set_state(numpy_state)


@contextmanager
def model_to_score(module: nn.Module, mode: str) -> Iterator[tuple[nn.Module, bool]]:
    """The model to run by `eval.mode`, and whether it is sharded; every rank enters this together.

    `auto` copies nothing where a single rank has all weights already.
    """
    is_in_few_bits = bool(quantised_linears(module))
    has_all = mode == "auto" and not is_in_few_bits and is_complete(module)
    has_others = is_in_few_bits or has_low_rank(module)  # than a plain model has
    if has_all or mode == "sharded" or has_others or (mode == "auto" and not copy_fits(module)):
        was_training = module.training
        module.eval()
        yield module, not has_all
        module.train(was_training)
    else:
        yield plain_copy(module).eval(), False


def is_complete(module: nn.Module) -> bool:
    """Whether this rank's shards are the complete weights, on the device that computes."""
    device = collectives.device().type
    return collectives.world_size() == 1 and all(
        shard_of(weight).device.type == device for weight in module.parameters()
    )


def copy_fits(module: nn.Module) -> bool:
    """Whether a copy fits on every rank; the same answer on all ranks."""
    needed = sum(full_shape(weight).numel() * weight.element_size() for weight in module.parameters())
    device = collectives.device()
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available // int(os.environ["LOCAL_SIZE"])
    is_short = torch.tensor([float(needed > MAX_SHARE * free)], device=device)
    fits = collectives.all_reduce_max(is_short).item() == 0
    if not fits:
        gib = needed / 2**30
        log_rank0(f"note: no room for a copy of the model ({gib:.1f} GiB) on every rank: scored sharded")
    return fits


@torch.no_grad()
def plain_copy(module: nn.Module) -> nn.Module:
    """An unsharded copy of the same bits on this rank's device; every rank makes one together."""
    import deepspeed

    with torch.device("meta"):
        plain = type(module)(copy.deepcopy(module.config))
    plain.generation_config = copy.deepcopy(module.generation_config)
    device = collectives.device()
    sharded = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, empty in [*plain.named_parameters(), *plain.named_buffers()]:
        is_weight = isinstance(empty, nn.Parameter)
        with deepspeed.zero.GatheredParameters([sharded[name]], enabled=is_weight):
            values = sharded[name].detach().to(device, copy=True)
        assert values.shape == empty.shape, name
        parent, _, own_name = name.rpartition(".")
        own = nn.Parameter(values, requires_grad=False) if is_weight else values
        setattr(plain.get_submodule(parent), own_name, own)
    plain.tie_weights()
    return plain
