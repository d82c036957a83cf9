"""A run folder, read. A missing or damaged file becomes a sentence and not a crash."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from speft_ds.config.limited_yaml import read_yaml
from speft_ds.errors import UserError
from speft_ds.evaluation.scores import Evaluations, read_evaluations
from speft_ds.io import parse_json, read_json
from speft_ds.training.checkpoint.folder import Checkpoint, list_checkpoints
from speft_ds.training.run_dir import FACTS, METRICS, RECIPE

NUM_WARMUP = 3  # steps that throughput leaves out
ADAPTER = "adapter"


@dataclass(frozen=True)
class RunFolder:
    """A run folder, read."""

    folder: Path
    recipe: dict[str, Any]  # recipe.yaml, nested
    facts: dict[str, Any]  # run.json
    lines: list[dict[str, Any]]  # metrics.jsonl, one dict per step
    adapter: dict[str, Any]  # adapter.json
    evaluations: Evaluations
    checkpoints: list[Checkpoint]
    problems: list[str]  # one sentence for everything missing or damaged

    @property
    def name(self) -> str:
        return self.folder.absolute().name.encode(errors="replace").decode()

    def fact(self, key: str, default: Any = None) -> Any:
        """A value of run.json by its dotted key; see `look_up`."""
        return look_up(self.facts, key, default)

    def setting(self, key: str, default: Any = None) -> Any:
        """A value of the recipe by its dotted key; see `look_up`."""
        return look_up(self.recipe, key, default)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """The steps at which metrics.jsonl has a finite value of a key, and these values."""
        pairs = [(line["step"], float(line[key])) for line in self.lines if is_number(line.get(key))]
        return [step for step, _ in pairs], [value for _, value in pairs]

    @property
    def is_finished(self) -> bool:
        return self.facts.get("finished") is True

    @property
    def num_done(self) -> int:
        return self.lines[-1]["step"] if self.lines else 0

    @property
    def num_steps(self) -> int:
        """Of the complete run; 0: not known."""
        return self.fact("num_steps", 0) or self.setting("train.steps", 0)

    @property
    def starts(self) -> list[dict[str, Any]]:
        """Where its processes began: `step` and `world_size` of each."""
        return [start for start in self.fact("starts", []) if is_number(look_up(start, "step"))]

    @property
    def num_ranks(self) -> int:
        """Of the last start; 0: not known."""
        last = self.starts[-1] if self.starts else {}
        return self.fact("world_size", 0) or look_up(last, "world_size", 0)

    @property
    def nonfinite_steps(self) -> list[int]:
        """Steps whose loss or gradient was not finite: they changed nothing."""
        keys = ("loss", "grad_norm")
        return [line["step"] for line in self.lines if any(line.get(key, 0.0) is None for key in keys)]

    @property
    def step_seconds(self) -> float:
        """Of all steps, over all starts."""
        return sum(self.series("step_ms")[1]) / 1000

    @property
    def tokens_per_s(self) -> float | None:
        """Without the first steps; None where there are no lines."""
        lines = [ln for ln in self.lines if is_number(ln.get("num_tokens")) and is_number(ln.get("step_ms"))]
        lines = lines[NUM_WARMUP:] or lines
        seconds = sum(line["step_ms"] for line in lines) / 1000
        return sum(line["num_tokens"] for line in lines) / seconds if seconds else None

    @property
    def stashed(self) -> list[tuple[str, list[dict[str, Any]]]]:
        """The formats of stashed activations in the order of the steps, each with its lines."""
        with_stash = [line for line in self.lines if isinstance(line.get("stash"), str)]
        return [(name, list(lines)) for name, lines in groupby(with_stash, lambda line: line["stash"])]

    @property
    def saved(self) -> dict[str, float]:
        """Bytes that the last forward saved for its backward, of the rank with the most; see `SavedBytes`."""
        ranks = [numbers(look_up(rank, "saved", {})) for rank in self.fact("resources", [])]
        return max(ranks, key=lambda rank: rank.get("packed", 0), default={})

    @property
    def resources(self) -> tuple[float, dict[str, float], dict[str, float]]:
        """Peak bytes, memory breakdown and comm volume (kind -> bytes) of the rank with the highest peak."""
        ranks = [rank for rank in self.fact("resources", []) if isinstance(rank, dict)]
        largest = max(ranks, key=lambda rank: look_up(rank, "peak_bytes", 0), default={})
        memory, sent = (numbers(largest.get(key)) for key in ("memory_breakdown", "comm_volume"))
        return look_up(largest, "peak_bytes", 0), memory, sent

    @property
    def num_trained(self) -> int:
        """Entries of the mask, and elements of whole weights and of low-rank matrices."""
        return sum(self.fact(key, 0) for key in ("mask.num_trainable", "whole", "low_rank.num_elements"))

    @property
    def adapter_bytes(self) -> int:
        return size_of(self.folder / ADAPTER)


def is_number(value: object) -> bool:
    """Whether it is a finite number; no integer beyond the floats is."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def look_up(nested: Any, key: str, default: Any = None) -> Any:
    """The value of a dotted key; the default where there is none of the default's type (None: of any)."""
    for part in key.split("."):
        nested = nested.get(part) if isinstance(nested, dict) else None
    if default is None:
        return nested
    is_such = is_number(nested) if is_number(default) else isinstance(nested, type(default))
    return nested if is_such else default


def numbers(mapping: Any) -> dict[str, float]:
    """The finite numbers in a mapping; empty where it is none."""
    return {k: v for k, v in mapping.items() if is_number(v)} if isinstance(mapping, dict) else {}


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (RECIPE, FACTS, METRICS))


def read_run(folder: Path) -> RunFolder:
    """Read a run folder.

    Raises:
        UserError: it is not a run folder.
    """
    if not is_run(folder):
        what = f"{folder} is not a run folder: it has no {RECIPE}, no {FACTS} and no {METRICS}"
        raise UserError(what, str(folder), "name the output_dir of a run, like runs/quickstart")
    problems: list[str] = []
    has_adapter = (folder / ADAPTER).is_dir()
    run = RunFolder(
        folder,
        recipe=_read_document(folder / RECIPE, problems),
        facts=_read_document(folder / FACTS, problems),
        adapter=_read_document(folder / ADAPTER / "adapter.json", problems) if has_adapter else {},
        lines=list(_read_lines(folder / METRICS, problems)),
        evaluations=read_evaluations(folder),
        checkpoints=list_checkpoints(folder),
        problems=problems,
    )
    problems += run.evaluations.problems
    damaged = [checkpoint for checkpoint in run.checkpoints if checkpoint.problem]
    problems += [f"{each.path.relative_to(folder)} does not count: {each.problem}" for each in damaged]
    return run


def _read_document(path: Path, problems: list[str]) -> dict[str, Any]:
    """A JSON or YAML file with a mapping in it; empty, and a problem, where it is not that."""
    try:
        document = read_yaml(path) if path.suffix == ".yaml" else read_json(path)
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
        if path.exists() and not path.is_file():  # a pipe would keep us waiting
            raise FileNotFoundError(path)
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        problems.append(f"there is no {path.name}: no step was made, or it was removed")
        return
    last = 0
    for number, line in enumerate(text.splitlines(), 1):
        try:
            values = parse_json(line)
        except ValueError:
            values = None
        if not isinstance(look_up(values, "step"), int) or not is_number(values["step"]):
            problems.append(f"line {number} of {path.name} is damaged, and left out")
            continue
        if values["step"] != last + 1:
            problems.append(f"{path.name} goes from step {last} to {values['step']} in line {number}")
        last = values["step"]
        yield values
