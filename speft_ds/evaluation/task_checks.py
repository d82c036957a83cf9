"""What lm-eval would refuse in the middle of a job, or only warn of, found before the model is loaded."""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator_utils import get_sample_size
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from speft_ds.comm import watchdog
from speft_ds.errors import UserError
from speft_ds.evaluation.eval_jobs import EvalJob
from speft_ds.evaluation.tasks import load_tasks, refusals

TAIL = 256  # characters of a prompt, by which the tokens of its answer are counted


class TokenCounter(HFLM):
    """lm-eval's model without the model, which counts the tokens of prompts and answers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.backend = tokenizer, "causal"
        self.add_bos_token = self.custom_prefix_token_id = self.enable_thinking = None
        self.chat_template_args = {}

    def _loglikelihood_tokens(self, requests, **_):
        return [len(continuation) for _, _, continuation in requests]

    def count(self, request: Instance) -> int:
        """Tokens of the answer to score. An end of the prompt is enough to see that they are not few."""
        prompt, answer = request.args
        short = SimpleNamespace(args=(prompt[-TAIL:], answer))
        counts = self.loglikelihood([short], disable_tqdm=True)
        if prompt[:-TAIL] and not 0 < counts[0] <= len(answer):
            counts = self.loglikelihood([request], disable_tqdm=True)
        return counts[0]


def check_tasks(
    job: EvalJob,
    manager: TaskManager,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: bool,
    max_length: int,
) -> list[str]:
    """Load the tasks of a job and build every request, as lm-eval does; to be called inside `local_data`.

    Args:
        chat_template: whether prompts are in the chat template of the tokenizer.
        max_length: of the model, in tokens.
    Returns:
        What the user should know of the scores.
    Raises:
        UserError: lm-eval would not score a task.
    """
    # As lm-eval before it loads tasks: some draw.
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    tasks, notes, counter = load_tasks(manager, job.tasks), [], TokenCounter(tokenizer)
    for name, task in tasks.items():
        watchdog.heartbeat(f"checking the task {name}")
        with refusals(name):
            _check_kind(name, task)
            _set_examples(task, job.num_fewshot)
            if isinstance(task, ConfigurableTask):
                notes += _split_notes(name, task)
                _check_examples(name, task, job)
            documents = get_sample_size(task, job.limit)
            _build(task, documents, counter if chat_template else None)
            _check_requests(name, task, max_length, counter)
            if isinstance(task, ConfigurableTask):
                notes += _choice_notes(name, task, documents)
    return notes


def _check_kind(name: str, task: Task) -> None:
    fix = "leave the task out of eval.tasks and eval.forgetting_tasks"
    if getattr(task, "UNSAFE_CODE", False):
        what = f"{name} runs code that the model writes (unsafe_code), which needs consent"
        raise UserError(what, "eval.tasks", f"{fix}; lm-eval itself runs it with --confirm_run_unsafe_code")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"{name} needs a model of images or sound", "eval.tasks", fix)


def _set_examples(task: Task, num_fewshot: int | None) -> None:
    """As lm-eval: a task's own number stays where it is 0, or where none is asked for."""
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own != 0:
        task.set_config("num_fewshot", num_fewshot)
    elif own is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)


def _split_notes(name: str, task: ConfigurableTask) -> list[str]:
    config, notes = task.config, []
    scored = config.test_split or config.validation_split
    if config.test_split is None:
        notes.append(f"{name}: it has no test split; scored on {scored}")
    few = task.fewshot_cfg
    source = few.split or (
        few.samples is None and (config.training_split or config.validation_split or scored)
    )
    if config.num_fewshot and source == scored and not _leaves_out(task):
        notes.append(f"{name}: few-shot examples are of {scored}, too: a document may be its own example")
    return notes


def _leaves_out(task: ConfigurableTask) -> bool:
    """Whether lm-eval keeps a document out of its own examples."""
    return task.config.test_split is not None and task.fewshot_cfg.split == task.config.test_split


def _check_examples(name: str, task: ConfigurableTask, job: EvalJob) -> None:
    shots = task.config.num_fewshot
    there = len(task.sampler.df) - _leaves_out(task) if hasattr(task, "sampler") else 0
    if shots > there:
        key = "eval.manual_fewshot" if job.kind == "fewshot" else "eval.num_fewshot"
        what = (
            f"{name}: {shots} examples are asked for, there are {max(there, 0)} documents to take them from"
        )
        fix = (
            f"{key}=[{max(there, 0)}], or less"
            if job.kind == "fewshot"
            else f"{key}={max(there, 0)}, or less"
        )
        raise UserError(what, key, fix)


def _build(task: Task, documents: int | None, chat: HFLM | None) -> None:
    task.build_all_requests(
        limit=documents,
        rank=0,
        world_size=1,
        apply_chat_template=chat is not None,
        fewshot_as_multiturn=True,
        chat_template=chat and chat.apply_chat_template,
    )


def _check_requests(name: str, task: Task, max_length: int, counter: TokenCounter) -> None:
    for request in task.instances:
        if request.request_type == "loglikelihood":
            count = counter.count(request) if request.args[1] else 0
            if not 0 < count <= max_length:
                few = "no token" if count == 0 else f"{count:,} tokens, more than the model's {max_length:,}"
                what = f"{name}: an answer to score of document {request.doc_id} has {few}"
                fix = "mend the task's data, or set eval.limit below that document"
                raise UserError(what, "eval.tasks", fix)
        if request.request_type == "generate_until":
            prompt = request.args[0]
            if not counter.tok_encode(prompt[:TAIL]) and not counter.tok_encode(prompt):
                what = f"{name}: the prompt of document {request.doc_id} has no token to go on from"
                raise UserError(what, "eval.tasks", "mend the task's doc_to_text, or leave the task out")
            longest = normalize_gen_kwargs(request.args[1])["max_gen_toks"]
            if longest >= max_length:
                what = (
                    f"{name}: max_gen_toks={longest} leaves no room for a prompt in the model's {max_length}"
                )
                raise UserError(what, "eval.tasks", "lower max_gen_toks in the generation_kwargs of its file")


def _choice_notes(name: str, task: ConfigurableTask, documents: int | None) -> list[str]:
    """Documents whose label is none of their choices, or that have a choice without text."""
    if task.OUTPUT_TYPE != "multiple_choice" or callable(task.config.process_results):
        return []
    total = outside = empty = 0
    num_requests = Counter(request.doc_id for request in task.instances)
    for number, document in task.doc_iterator(limit=documents):
        with np.errstate(all="ignore"):  # what lm-eval cannot count with, it should not find at the end
            task.process_results(document, [(-1.0, False)] * num_requests[number])
        choices = task.doc_to_choice(document)
        label = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
        labels = label if isinstance(label, list) else [label]
        known = [each in choices if isinstance(each, str) else 0 <= each < len(choices) for each in labels]
        total, outside, empty = total + 1, outside + (not all(known)), empty + ("" in choices)
    counted = ((outside, "have a label outside their choices"), (empty, "have an empty choice"))
    return [f"{name}: {number} of {total} documents {what}" for number, what in counted if number]
