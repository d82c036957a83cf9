"""`eval.auto_prompt`: prompts for lm-eval's tasks of choices, searched without their test documents."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask, Task

from speft_ds.comm import watchdog
from speft_ds.config.eval_config import AutoPrompt
from speft_ds.errors import UserError
from speft_ds.evaluation.auto_prompt import Found, LabelledRow, Prompt, Quality, search
from speft_ds.evaluation.lm import EngineLM


def labelled_rows(task: Task, count: int, seed: int) -> list[LabelledRow]:
    """So many rows of a task, drawn from a split that it is not scored on.

    Raises:
        UserError: it has no choices to score, no such split, or too few rows in it.
    """
    name, key = task.config.task, "eval.auto_prompt.shots"
    is_fit = isinstance(task, ConfigurableTask) and task.OUTPUT_TYPE == "multiple_choice"
    if not is_fit or task.multiple_input:
        fix = f"leave it out of eval.tasks, or {key}=null"
        raise UserError(f"{name} has no choices after its prompt, which a search could score", key, fix)
    documents = _documents(task)
    rows = []
    for number in random.Random(seed).sample(range(len(documents)), len(documents)):
        row = _row(task, documents[number])
        rows += [row] if row is not None else []
        if len(rows) == count:
            return rows
    what = f"{name}: {count} labelled rows are asked for, there are {len(rows)} that it is not scored on"
    raise UserError(what, key, f"{key}={len(rows) or 'null'}")


def _documents(task: ConfigurableTask) -> Sequence[dict]:
    config, few = task.config, task.fewshot_cfg.split
    scored = config.test_split or config.validation_split
    if config.training_split not in (None, scored):
        return list(task.training_docs())
    if few not in (None, scored):
        return list(task.fewshot_docs())
    if config.validation_split not in (None, scored):
        return list(task.validation_docs())
    return []


def _row(task: ConfigurableTask, document: dict) -> LabelledRow | None:
    """None where its label is none of its choices, or not a single one."""
    choices, label = task.doc_to_choice(document), task.doc_to_target(document)
    label = choices.index(label) if isinstance(label, str) and label in choices else label
    if not isinstance(label, int) or not 0 <= label < len(choices):
        return None
    return LabelledRow(task.doc_to_text(document), tuple(choices), label)


class AutoPrompts:
    """The prompts that were found, by task; rewrites lm-eval's requests, as a `PromptFormat` does.

    Args:
        lm: the untouched model, which scores the prompts; every rank enters this together.
        in_chat: whether prompts are in the tokenizer's chat template.
    """

    def __init__(self, lm: EngineLM, tasks: dict[str, Task], section: AutoPrompt, seed: int, in_chat: bool):
        self.lm, self.tasks, self.in_chat = lm, tasks, in_chat
        self.rows = {name: labelled_rows(task, section.shots, seed) for name, task in tasks.items()}
        self.found: dict[str, Found] = {}
        self.seconds: dict[str, float] = {}
        for name, rows in self.rows.items():
            watchdog.heartbeat(f"searching a prompt for {name}")
            start, limits = time.perf_counter(), (section.forwards, section.examples, seed)
            self.found[name] = search(rows, lambda prompt, name=name: self._measure(name, prompt), *limits)
            self.seconds[name] = time.perf_counter() - start

    def _measure(self, name: str, prompt: Prompt) -> Quality:
        rows, requests = self.rows[name], []
        for number, row in enumerate(rows):
            for answer in range(len(row.choices)):
                arguments, of = self._arguments(name, prompt, row, answer), (f"{name}, searching", number, 1)
                requests.append(Instance("loglikelihood", {}, arguments, answer, of))
        responses = iter(self.lm.loglikelihood(requests))
        num_right, total = 0, 0.0
        for row in rows:
            scores = [next(responses)[0] for _ in row.choices]
            highest = max(scores)
            num_right += scores.index(highest) == row.label
            total += scores[row.label] - highest - math.log(sum(math.exp(s - highest) for s in scores))
        return num_right / len(rows), total / len(rows)

    def _arguments(self, name: str, prompt: Prompt, row: LabelledRow, answer: int) -> tuple[str, str]:
        text, answer = prompt.write(row, self.rows[name]), prompt.answers(row)[answer]
        if self.in_chat:
            return self.lm.apply_chat_template([{"role": "user", "content": text}]), answer
        return text, f" {answer}"

    def rewrite_request(self, arguments: tuple, task: str, document: dict, number: int) -> tuple:
        """An lm-eval request, the number-th of a document, with the prompt of its task."""
        own = self.tasks[task]
        row = LabelledRow(own.doc_to_text(document), tuple(own.doc_to_choice(document)), 0)
        prompt, answer = self._arguments(task, self.found[task].prompt, row, number % len(row.choices))
        return (prompt if number < len(row.choices) else "", answer)  # those after them ask without a prompt

    def facts(self) -> dict[str, dict]:
        """Task -> its prompt, and how it was found."""
        return {
            name: {
                "template": found.prompt.template,
                "label_words": found.prompt.words,
                "examples": [vars(self.rows[name][number]) for number in found.prompt.examples],
                "rows": len(self.rows[name]),
                "accuracy_on_rows": found.quality[0],
                "log_likelihood_on_rows": found.quality[1],
                "prompts": found.num_prompts,
                "forwards": found.num_forwards,
                "seconds": self.seconds[name],
            }
            for name, found in self.found.items()
        }

    def notes(self) -> list[str]:
        """How each prompt was found, in words."""
        return [
            f"{name}: prompt chosen among {fact['prompts']} on {fact['rows']} labelled rows, "
            f"{fact['accuracy_on_rows']:.0%} right on them ({fact['forwards']:,} answers scored, "
            f"{fact['seconds']:.0f} s): {fact['template']!r}, {len(fact['examples'])} examples, "
            f"label words {', '.join(fact['label_words'] or ['as they are'])}"
            for name, fact in self.facts().items()
        ]
