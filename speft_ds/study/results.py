"""What the runs of a study came to, and the file that keeps it: readable without the runs' folders.

Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from speft_ds.errors import UserError, shell
from speft_ds.evaluation.scores import Score
from speft_ds.io import read_json, write_json
from speft_ds.report.run import RunFolder, is_number, read_run
from speft_ds.study.runs import StudyRun
from speft_ds.study.study_config import VALIDATION_LOSS, StudyConfig
from speft_ds.training.run_dir import LOG, has_files

FILE = "study.json"
# What a run was made from and with, kept so that its folder may go.
FACTS = ("run_id", "starts", "versions", "data", "mask.sha256", "num_steps", "global_batch")
TEXT_LOSS = "general text/loss"  # nats per token of eval.forgetting_text
Role = Literal["held-out", "task", "forgetting"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class Measure(_Part):
    """A number that says how good a run is."""

    value: float
    before: float | None = None  # of the untouched model
    role: Role
    higher_is_better: bool = False
    is_share: bool = False


class Result(_Part):
    """What a run came to. `measures`: by name, like `validation_loss` or `sst2/acc`."""

    key: str
    name: str
    setting: str
    variant: str
    rate: float
    seed: int
    state: Literal["finished", "failed"]
    cause: str | None = None  # of a failure: the end of its log
    base: str | None = None  # the fingerprint of its weights
    measures: dict[str, Measure] = Field({})
    num_trained: int | None = None
    seconds: float | None = None  # in steps
    peak_bytes: float | None = None
    adapter_bytes: int | None = None
    machine: str | None = None
    facts: dict[str, Any] = Field({})  # FACTS of its run.json

    def score(self, metric: str) -> float:
        """By a metric, higher is better; -inf where it is not known or not finite."""
        found = self.measures.get(metric)
        if found is None or not math.isfinite(found.value):
            return -math.inf
        return found.value if found.higher_is_better else -found.value


class StudyFile(_Part):
    """The contents of FILE."""

    study: dict[str, Any]  # the study, resolved
    first_runs: list[str]  # keys of the runs that were known to be needed at the start
    results: list[Result] = Field([])


def read_result(run: StudyRun, folder: Path) -> Result | None:
    """What a run came to; None where it is not finished. The folder is the run's."""
    if not folder.is_dir():
        return None
    try:
        found = read_run(folder)
    except UserError:  # it was stopped before its first file
        return None
    if not found.is_finished:
        return None
    machine = found.fact("machine.gpu") or found.fact("machine.cpu")
    return Result(
        **_identity(run),
        state="finished",
        base=found.fact("base.fingerprint_bfloat16") or found.fact("base.fingerprint"),
        measures=dict(_measures(found)),
        num_trained=found.num_trained or None,
        seconds=found.step_seconds,
        peak_bytes=float(found.resources[0]) or None,
        adapter_bytes=found.adapter_bytes,
        machine=f"{machine}, {found.num_ranks} rank(s)",
        facts={name: found.fact(name) for name in FACTS},
    )


def failed(run: StudyRun, folder: Path) -> Result:
    """The result of a run that failed, with the end of its log. The folder is the run's."""
    try:
        lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError as error:
        lines = [str(error)]
    return Result(**_identity(run), state="failed", cause="\n".join(lines[-3:])[-500:])


def _identity(run: StudyRun) -> dict[str, Any]:
    setting = {"setting": run.setting.label, "variant": run.setting.variant}
    return {"key": run.key, "name": run.name, **setting, "rate": run.rate, "seed": run.recipe.seed}


def _measures(run: RunFolder) -> Iterable[tuple[str, Measure]]:
    steps, losses = run.series(VALIDATION_LOSS)
    if losses and steps[-1] == run.num_done:  # else the last one was not finite
        yield VALIDATION_LOSS, Measure(value=losses[-1], role="held-out")
    before, after = run.evaluations.perplexities
    if after and is_number(after.token_perplexity):
        old = math.log(before.token_perplexity) if before else None
        yield TEXT_LOSS, Measure(value=math.log(after.token_perplexity), before=old, role="forgetting")
    for role in ("task", "forgetting"):
        for score in run.evaluations.after.main_scores(role) if run.evaluations.after else []:
            old = run.evaluations.both(score)[0]
            yield (
                name_of(score),
                Measure(
                    value=score.value,
                    before=old and old.value,
                    role=role,
                    higher_is_better=score.higher_is_better,
                    is_share=score.is_share,
                ),
            )


def name_of(score: Score) -> str:
    """As the metric of a study names it."""
    return "/".join([score.task, score.metric, *([score.filter] if score.filter not in ("", "none") else [])])


def open_study(folder: Path, study: StudyConfig, runs: Iterable[StudyRun]) -> dict[str, Result]:
    """The results that a folder has so far, by the keys of their runs.

    Raises:
        UserError: it is the folder of another study, or of something else.
    """
    fix = f"another --output, or remove this one: {shell('rm', '-r', folder)}"
    path = folder / FILE
    if not path.is_file():
        if folder.is_file() or has_files(folder):
            raise UserError(f"{folder} is not empty, and is no study: it has no {FILE}", "--output", fix)
        return {}
    try:
        found = StudyFile.model_validate(read_json(path))
    except (OSError, ValueError, ValidationError) as error:
        raise UserError(f"not a readable study: {error}", str(path), fix) from error
    if {run.key for run in runs}.isdisjoint(found.first_runs):
        old, now = found.study, resolved(study)
        differs = [key for key in now if old.get(key) != now[key]] or ["its recipe"]
        differs = [{"given": "the command line"}.get(key, key) for key in differs]
        raise UserError(f"{folder} is of another study: other {', '.join(differs)}", "--output", fix)
    return {result.key: result for result in found.results}


def write_study(
    folder: Path, study: StudyConfig, runs: Iterable[StudyRun], results: Iterable[Result]
) -> None:
    """Write FILE. Raises OSError."""
    keys = [run.key for run in runs]
    document = StudyFile(study=resolved(study), first_runs=keys, results=list(results))
    write_json(folder / FILE, document.model_dump(mode="json"))


def resolved(study: StudyConfig) -> dict[str, Any]:
    return study.model_dump(mode="json", exclude={"name"})
