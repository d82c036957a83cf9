"""A search over keys of a recipe for validation loss, trained entries and step time, by Optuna.

The state is an Optuna journal on disk, which several processes may share. Optuna prunes for a single
objective only, so trials are stopped by successive halving of our own (Li et al., A System for Massively
Parallel Hyperparameter Tuning, 2020): after a quarter and after a half of its steps, a trial goes on if its
validation loss is in the better half of the trials that came so far with as few entries, or fewer.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from speft_ds.errors import RecipeError, UserError, shell
from speft_ds.report.run import NUM_WARMUP, RunFolder, is_run, read_run
from speft_ds.tune.space import Space, as_overrides

SAMPLERS = ("tpe", "nsga2")
OBJECTIVES = ("validation loss", "trained entries", "ms per step")
JOURNAL = "journal.jsonl"
ENDED = ("complete", "stopped")
REFUSED = "refused"  # a mark of trials whose values make no recipe
# Trials with up to so many times the lowest loss are as good: the one with the fewest entries is chosen.
NEAR = 1.01
MAX_REFUSED = 100  # draws in a row that are no recipe

Values = tuple[float, float, float]  # of the OBJECTIVES


class TrialFailed(Exception):
    """A trial's run ended without a result."""


@dataclass(frozen=True)
class Point:
    """A complete trial."""

    number: int
    overrides: list[str]
    values: Values


def in_words(values: Values) -> str:
    loss, entries, step_ms = values
    return f"validation loss {loss:.4f}, {entries:,.0f} entries, {step_ms:,.0f} ms per step"


def open_study(
    folder: Path, asked: dict, sampler: str, num_trials: int, seed: int | None = None
) -> optuna.Study:
    """The study in a folder, made if there is none.

    Args:
        asked: what the trials have in common, and what they vary; JSON.
        num_trials: by which the share of the draws at random is chosen.
    Raises:
        UserError: the folder has another search.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    at_random = max(4, num_trials // 4)
    make = {
        "tpe": lambda: optuna.samplers.TPESampler(n_startup_trials=at_random, multivariate=True, seed=seed),
        "nsga2": lambda: optuna.samplers.NSGAIISampler(population_size=at_random, seed=seed),
    }
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / JOURNAL))),
        study_name="speft",
        directions=["minimize"] * len(OBJECTIVES),
        sampler=make[sampler](),
        load_if_exists=True,
    )
    if study.user_attrs.get("asked", asked) != asked:
        fix = f"its own command, another output_dir, or {shell('rm', '-r', folder)}"
        raise UserError("there is a search of another recipe or of other values", str(folder), fix)
    study.set_user_attr("asked", asked)
    return study


def search(
    study: optuna.Study,
    space: Space,
    num_trials: int,
    check: Callable[[list[str]], object],
    run_trial: Callable[[Trial, list[str]], Values | None],
    max_failed: int = 3,
) -> None:
    """Run trials until the study has `num_trials` that ended: those of earlier and of other processes count.

    Args:
        check: overrides -> RecipeError where they make no recipe: other ones are drawn then.
        run_trial: trial and overrides -> its values, or None where `Halving` stopped it; may raise
            TrialFailed, which is passed over, and any other error, which is not.
    Raises:
        UserError: no draw makes a recipe; TrialFailed: `max_failed` trials in a row failed.
    """
    failed = 0
    while sum(state_of(each) in ENDED for each in study.get_trials(deepcopy=False)) < num_trials:
        trial, overrides = _ask(study, space, check)
        state, values = TrialState.FAIL, None
        try:
            values = run_trial(trial, overrides)
            state, failed = TrialState.PRUNED if values is None else TrialState.COMPLETE, 0
        except TrialFailed:
            failed += 1
            if failed == max_failed:
                raise
        finally:
            study.tell(trial, values, state)


def _ask(study: optuna.Study, space: Space, check: Callable[[list[str]], object]) -> tuple[Trial, list[str]]:
    for _ in range(MAX_REFUSED):
        trial = study.ask(space)
        try:
            check(overrides := as_overrides(trial.params))
            return trial, overrides
        except RecipeError as error:
            trial.set_user_attr(REFUSED, True)
            study.tell(trial, state=TrialState.PRUNED)  # of failed ones, a sampler learns nothing
            refused = error
    fix = "give other values with --over"
    raise UserError(f"{MAX_REFUSED} draws in a row are no recipe: {refused.problems[0].what}", "--over", fix)


def state_of(trial: FrozenTrial) -> str:
    """`complete`, `stopped` by halving, `failed`, `running`, or `refused`: never run."""
    if REFUSED in trial.user_attrs:
        return REFUSED
    return {"PRUNED": "stopped", "FAIL": "failed"}.get(trial.state.name, trial.state.name.lower())


class Halving:
    """Says whether to stop a running trial, by successive halving; see the module.

    Attributes:
        stopped_at: the step after which it was; None: it was not.
    """

    def __init__(self, study: optuna.Study, trial: Trial, num_steps: int, folder: Path):
        self.study, self.trial, self.folder = study, trial, folder
        every = measured_every(num_steps)
        self.left, self.stopped_at = [step for step in (every, 2 * every) if step < num_steps], None

    def __call__(self) -> bool:
        """Whether its run, in `folder`, is to be stopped, going by what it has measured."""
        if self.stopped_at is None and self.left and is_run(self.folder):
            run = read_run(self.folder)
            losses = dict(zip(*run.series("validation_loss"), strict=True))
            while self.left and self.left[0] in losses:
                step = self.left.pop(0)
                if should_stop(self.study, self.trial, step, losses[step], run.num_trained):
                    self.stopped_at = step
                    break
        return self.stopped_at is not None


def measured_every(num_steps: int) -> int:
    """Steps between two measurements of the validation loss in a trial of so many steps."""
    return max(1, num_steps // 4)


def should_stop(study: optuna.Study, trial: Trial, step: int, loss: float, entries: int) -> bool:
    """Note the loss of a trial at a halving, and say whether it is not in the better half."""
    key = f"at step {step}"
    trial.set_user_attr(key, [loss, entries])
    noted = {each.number: each.user_attrs.get(key) for each in study.get_trials(deepcopy=False)}
    del noted[trial.number]
    rivals = [other[0] for other in noted.values() if other is not None and other[1] <= entries]
    return sum(other < loss for other in rivals) >= max(1, (len(rivals) + 1) // 2)


def values_of(run: RunFolder) -> Values:
    """The values of a finished run. Raises TrialFailed where one is missing."""
    steps, losses = run.series("validation_loss")
    _, times = run.series("step_ms")
    if not (losses and steps[-1] == run.num_done and times and run.num_trained):
        raise TrialFailed(f"{run.folder} has no validation loss at its end, or no step")
    return losses[-1], float(run.num_trained), statistics.median(times[NUM_WARMUP:] or times)


def points_of(trials: Sequence[FrozenTrial]) -> list[Point]:
    """The complete ones among trials, by loss; those of `study.best_trials` are the Pareto front."""
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    points = [Point(trial.number, as_overrides(trial.params), tuple(trial.values)) for trial in done]
    return sorted(points, key=lambda point: point.values)


def choose(front: list[Point]) -> Point:
    """The point with the fewest entries among those whose loss is within 1% of the lowest."""
    best = min(point.values[0] for point in front)
    near = [point for point in front if point.values[0] <= NEAR * best]
    return min(near, key=lambda point: (point.values[1], point.values))
