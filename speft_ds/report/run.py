"""What a run folder says, read so that a missing or damaged file is a sentence and not a crash."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from speft_ds.errors import UserError
from speft_ds.evaluation.scores import Evaluations, read_evaluations
from speft_ds.training.checkpoint.folder import Checkpoint, list_checkpoints
from speft_ds.training.run_dir import FACTS, METRICS, RECIPE

NUM_WARMUP = 3  # steps that throughput leaves out
ADAPTER = "adapter"
Number = (int, float)


@dataclass(frozen=True)
class Run:
    """A run folder, read.

    Attributes:
        recipe: recipe.yaml, nested; facts: run.json; lines: metrics.jsonl, one dict a step.
        adapter: adapter.json.
        problems: what is missing or damaged, in words.
    """

    folder: Path
    recipe: dict[str, Any]
    facts: dict[str, Any]
    lines: list[dict[str, Any]]
    adapter: dict[str, Any]
    evaluations: Evaluations
    checkpoints: list[Checkpoint]
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.absolute().name

    def fact(self, key: str, kind: type | tuple = object) -> Any:
        """A value of run.json by its dotted key; None where there is none of this type."""
        return look_up(self.facts, key, kind)

    def setting(self, key: str, kind: type | tuple = object) -> Any:
        """A value of the recipe by its dotted key; None where there is none of this type."""
        return look_up(self.recipe, key, kind)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps, and the finite values of a key of metrics.jsonl at them."""
        pairs = [(line["step"], line[key]) for line in self.lines if is_number(line.get(key))]
        return [step for step, _ in pairs], [float(value) for _, value in pairs]

    @property
    def is_finished(self) -> bool:
        # Before runs could be resumed, run.json was written at their end alone.
        return self.facts.get("finished", "timings_s" in self.facts) is True

    @property
    def num_done(self) -> int:
        return self.lines[-1]["step"] if self.lines else 0

    @property
    def num_steps(self) -> int | None:
        return self.fact("num_steps", int) or self.setting("train.steps", int)

    @property
    def starts(self) -> list[dict[str, Any]]:
        """Where its processes began: `step` and `world_size` each."""
        return [start for start in self.fact("starts", list) or [] if is_number(look_up(start, "step"))]

    @property
    def nonfinite_steps(self) -> list[int]:
        """Steps whose loss or gradient was not finite: they changed nothing."""
        keys = ("loss", "grad_norm")
        return [line["step"] for line in self.lines if any(line.get(key, 0.0) is None for key in keys)]

    @cached_property
    def step_seconds(self) -> float:
        """Of all steps, whatever process made them."""
        return sum(self.series("step_ms")[1]) / 1000

    @property
    def tokens_per_s(self) -> float | None:
        """Without the first steps; None where there are no lines."""
        lines = [ln for ln in self.lines if is_number(ln.get("num_tokens")) and is_number(ln.get("step_ms"))]
        lines = lines[NUM_WARMUP:] or lines
        seconds = sum(line["step_ms"] for line in lines) / 1000
        return sum(line["num_tokens"] for line in lines) / seconds if seconds else None

    @property
    def peak_memory_gib(self) -> float | None:
        return max(self.series("peak_memory_gib")[1], default=None)

    @property
    def account(self) -> dict[str, dict[str, int]]:
        """`memory` and `sent` of the rank that held most while training: kind -> bytes; empty if unknown."""
        accounts = [
            {what: _numbers(look_up(each, what, dict) or {}) for what in ("memory", "sent")}
            for each in self.fact("accounts", list) or []
        ]
        return max(accounts, key=lambda each: sum(each["memory"].values()), default={})

    @cached_property
    def adapter_bytes(self) -> int:
        return size_of(self.folder / ADAPTER)


def is_number(value: object) -> bool:
    return isinstance(value, Number) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(values: dict) -> dict:
    return {key: value for key, value in values.items() if is_number(value)}


def look_up(nested: Any, key: str, kind: type | tuple = object) -> Any:
    """The value of a dotted key; None where it is missing or of another type."""
    for part in key.split("."):
        nested = nested.get(part) if isinstance(nested, dict) else None
    return nested if isinstance(nested, kind) else None


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (RECIPE, FACTS, METRICS))


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: it is none.
    """
    if not is_run(folder):
        what = f"{folder} is not a run folder: it has no {RECIPE}, no {FACTS} and no {METRICS}"
        raise UserError(what, str(folder), "name the output_dir of a run, like runs/quickstart")
    problems: list[str] = []
    recipe = _read_document(folder / RECIPE, problems)
    facts = _read_document(folder / FACTS, problems)
    has_adapter = (folder / ADAPTER).is_dir()
    adapter = _read_document(folder / ADAPTER / "adapter.json", problems) if has_adapter else {}
    lines = list(_read_lines(folder / METRICS, problems))
    evaluations = read_evaluations(folder)
    problems += evaluations.problems
    checkpoints = list_checkpoints(folder)
    problems += [
        f"{c.path.relative_to(folder)} does not count: {c.problem}" for c in checkpoints if c.problem
    ]
    return Run(folder, recipe, facts, lines, adapter, evaluations, checkpoints, problems)


def _read_document(path: Path, problems: list[str]) -> dict[str, Any]:
    """A JSON or YAML file with a mapping in it; empty, and a problem, where it is not that."""
    try:
        text = path.read_text(encoding="utf-8")
        document = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
        if not isinstance(document, dict):
            raise ValueError("it is not a mapping")
    except FileNotFoundError:
        problems.append(f"there is no {path.name}")
    except (OSError, ValueError, yaml.YAMLError) as error:
        problems.append(f"{path.name} cannot be read: {' '.join(str(error).split())}")
    else:
        return document
    return {}


def _read_lines(path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl that can be read, by step."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        problems.append(f"there is no {path.name}: no step was made, or it was removed")
        return
    last = 0
    for number, line in enumerate(text.splitlines(), 1):
        try:
            values = json.loads(line)
        except ValueError:
            values = None
        if not isinstance(values, dict) or not isinstance(values.get("step"), int):
            problems.append(f"line {number} of {path.name} is damaged, and left out")
            continue
        if values["step"] != last + 1:
            problems.append(f"{path.name} goes from step {last} to {values['step']} in line {number}")
        last = values["step"]
        yield values
