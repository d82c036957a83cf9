"""The evaluation jobs of a recipe: its tasks, their baselines, what may have been forgotten; prompt formats.

Equivalent formats of a prompt show how much a model's scores depend on wording alone. Sclar et al.,
Quantifying Language Models' Sensitivity to Spurious Features in Prompt Design (FormatSpread), 2024:
descriptors ("Question: ") in another case, with another separator, fields on lines of their own.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from speft_ds.config.eval_config import EvalConfig
from speft_ds.evaluation.scores import JobKind

Phase = Literal["before", "after"]
SLICE = "slice"  # label of what is scored while training
DESCRIPTOR = re.compile(r"^([A-Z][A-Za-z]*(?: [A-Za-z]+){0,2}):(?=[ \n]|$)", re.MULTILINE)
CASES: tuple[Callable[[str], str], ...] = (str, str.upper, str.lower)
SEPARATORS = (":", " :", "::", " -", " ->", ":\t", " |", ": :")
BREAKS = ("\n", "\n\n", "\n\t")


@dataclass(frozen=True)
class EvalJob:
    """Some tasks to score in one way.

    Attributes:
        label: the name of its score file.
        kind: `main`; `fewshot`: the base with k examples in the prompt; `auto`: with a searched prompt;
            `format`: the same prompts in another format; `extra`: asked for on the command line.
        num_fewshot: examples in each prompt; None: each task's own number.
        limit: documents per task, or below 1 the share of them; None: all.
        format: number of the prompt format; 0: the tasks' own.
        has_text: whether the perplexity of the forgetting text is measured, too.
    """

    label: str
    kind: JobKind
    tasks: tuple[str, ...]
    num_fewshot: int | None
    limit: float | None
    format: int = 0
    has_text: bool = False


@dataclass(frozen=True)
class LowBits:
    """Formats that a model is scored in, simulated; None: as it is.

    Attributes:
        weights: of the decoder's linears; `activations`: of their inputs.
    """

    weights: str | None = None
    activations: str | None = None

    @property
    def facts(self) -> dict[str, str]:
        """Those that are not None, by attribute."""
        return {what: name for what, name in vars(self).items() if name}


AS_IT_IS = LowBits()


def jobs_of(section: EvalConfig, phase: Phase) -> list[EvalJob]:
    """The jobs before or after training, the recipe's tasks first; none where the recipe skips the phase."""
    if not getattr(section, phase):
        return []
    tasks, shots, limit = tuple(section.tasks), section.num_fewshot, section.limit
    forgetting = tuple(task for task in section.forgetting_tasks if task not in tasks)
    has_text = section.forgetting_text is not None
    jobs = []
    if tasks or forgetting or has_text:
        jobs.append(EvalJob(phase, "main", tasks + forgetting, shots, limit, has_text=has_text))
    if tasks and phase == "before":
        fewer = _fewer(limit, section.manual_fewshot_limit)
        jobs += [EvalJob(f"before-{k}shot", "fewshot", tasks, k, fewer) for k in section.manual_fewshot]
        if section.auto_prompt.shots is not None:
            jobs.append(EvalJob("before-auto-prompt", "auto", tasks, 0, fewer))
    if tasks:
        jobs += _other_formats(EvalJob(phase, "format", tasks, shots, limit), section.format_spread)
    return jobs


def _fewer(limit: float | None, own: float | None) -> float | None:
    """The smaller of two limits; of a number and a share nobody knows it, and the baselines' own holds."""
    if limit is None or own is None:
        return limit if own is None else own
    return min(limit, own) if (limit < 1) == (own < 1) else own


def slice_jobs(section: EvalConfig) -> list[EvalJob]:
    """What is scored now and then while training, if anything is."""
    if not (section.slice and section.tasks):
        return []
    return [EvalJob(SLICE, "main", tuple(section.tasks), section.num_fewshot, section.slice)]


def extra_jobs(section: EvalConfig, adapter: Path | None, low_bits: LowBits = AS_IT_IS) -> list[EvalJob]:
    """The recipe's tasks and text in every prompt format, apart from a run: of an adapter, or of the base.

    Labels begin with `base`, `tuned` (a run's adapter) or `adapter-NAME`, never like those of a run's phases.
    """
    if adapter is None:
        model = "base"
    else:
        model = "tuned" if adapter.name == "adapter" else f"adapter-{adapter.resolve().name}"
    shots = "" if section.num_fewshot is None else f"-{section.num_fewshot}shot"
    limit = f"-limit{section.limit}" if section.limit else ""
    bits = "".join(f"-{what}-{name}" for what, name in low_bits.facts.items())
    has_text = section.forgetting_text is not None
    names = "+".join([*section.tasks, *(["text"] if has_text else [])])
    label = f"{model}-{names[:150]}{shots}{limit}{bits}".replace("/", "_")
    job = EvalJob(label, "extra", tuple(section.tasks), section.num_fewshot, section.limit, has_text=has_text)
    others = _other_formats(replace(job, has_text=False), section.format_spread) if job.tasks else []
    return [job, *others]


def _other_formats(job: EvalJob, format_spread: int) -> list[EvalJob]:
    return [replace(job, label=f"{job.label}-format-{i}", format=i) for i in range(1, format_spread)]


@dataclass(frozen=True)
class PromptFormat:
    """How the fields of a prompt are written."""

    case: Callable[[str], str]  # of descriptors
    separator: str  # in place of their colon
    line_break: str  # before them

    def rewrite_request(self, arguments: tuple, *_: object) -> tuple:
        """An lm-eval request in this format: its prompt, and the strings that end an answer in both forms."""
        prompt, *more = arguments
        if more and isinstance(more[0], dict) and "until" in more[0]:
            until = more[0]["until"]
            until = [until] if isinstance(until, str) else until
            more[0] = {**more[0], "until": list(dict.fromkeys([*until, *map(self.rewrite, until)]))}
        return self.rewrite(prompt), *more

    def rewrite(self, prompt: str) -> str:
        """The prompt in this format; unchanged where no line starts with a descriptor."""
        names = {self._descriptor(found) for found in DESCRIPTOR.finditer(prompt)}
        if not names:
            return prompt
        longest_first = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        return re.sub(rf"\n(?={longest_first})", self.line_break, DESCRIPTOR.sub(self._descriptor, prompt))

    def _descriptor(self, found: re.Match[str]) -> str:
        return self.case(found[1]) + self.separator

    def __str__(self) -> str:
        return repr(self.line_break + self.case("Question") + self.separator)[1:-1]


def prompt_formats(count: int) -> list[PromptFormat | None]:
    """The first `count` formats in an order that is the same for every run; first the task's own (None)."""
    formats = [PromptFormat(c, s, b) for c in CASES for s in SEPARATORS for b in BREAKS]
    formats.remove(PromptFormat(str, ":", "\n"))
    random.Random(0).shuffle(formats)
    return [None, *formats[: count - 1]]
