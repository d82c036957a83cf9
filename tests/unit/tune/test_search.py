"""The search on a synthetic objective: its front, what it stops, how it goes on, who shares it."""

import multiprocessing

import pytest
from optuna.trial import TrialState

from speft_ds.errors import RecipeError, UserError
from speft_ds.tune import search
from speft_ds.tune.space import read_space

SPACE = read_space(["optimizer.lr=1e-5..1e-1", "mask.density=0.001..0.1"], "quickstart", [])
ASKED = {"recipe": "quickstart", "over": list(SPACE)}


def measure(trial):
    """A loss that is lowest at a rate of 1e-3, and falls with the entries, up to 1,000,000 of them."""
    rate, density = trial.params["optimizer.lr"], trial.params["mask.density"]
    entries = round(density * 1e7)
    return 1 + abs(rate - 1e-3) * 100 + 1e4 / entries, float(entries), 100 + density


def never(values):
    return None


def run(folder, num_trials, sampler="tpe", check=never, one=lambda trial, _: measure(trial), **options):
    study = search.open_study(folder, ASKED, sampler, num_trials, seed=0)
    search.search(study, SPACE, num_trials, check, one, **options)
    return study


def points(*values):
    return [search.Point(number, [], each) for number, each in enumerate(values)]


@pytest.mark.parametrize("sampler", search.SAMPLERS)
def test_the_front_is_of_those_that_none_beats(tmp_path, sampler):
    study = run(tmp_path, 60, sampler)
    everything, front = search.points_of(study.trials), search.points_of(study.best_trials)
    assert len(everything) == 60

    def is_beaten(point):
        others = [other.values for other in everything if other.values != point.values]
        return any(all(a <= b for a, b in zip(other, point.values, strict=True)) for other in others)

    assert [p.number for p in front] == [p.number for p in everything if not is_beaten(p)]
    assert front == sorted(front, key=lambda point: point.values)
    assert min(point.values[0] for point in front) < 1.15


def test_the_same_command_goes_on_and_another_is_refused(tmp_path):
    first = run(tmp_path, 5).trials
    study = run(tmp_path, 8)
    assert [t.params for t in study.trials[:5]] == [t.params for t in first] and len(study.trials) == 8
    assert len(run(tmp_path, 8).trials) == 8
    with pytest.raises(UserError):
        search.open_study(tmp_path, {**ASKED, "over": ["optimizer.lr"]}, "tpe", 8)


def test_the_chosen_one_has_the_fewest_entries_of_those_as_good_as_the_best():
    front = points((1.0, 900.0, 5.0), (1.009, 300.0, 5.0), (1.02, 10.0, 5.0))
    assert search.choose(front).number == 1


def test_the_better_half_of_those_with_as_few_entries_goes_on(tmp_path):
    study = search.open_study(tmp_path, ASKED, "tpe", 9)

    def stops(loss, entries, step=10):
        return search.should_stop(study, study.ask(SPACE), step, loss, entries)

    assert not stops(5.0, 100)  # the first
    assert stops(6.0, 100)  # the worse of two
    assert not stops(4.0, 200)
    assert not stops(7.0, 50)  # the first with so few
    assert not stops(4.5, 200)  # the second of five
    assert stops(5.5, 200)  # the fourth of six
    assert not stops(9.0, 100, step=20)


def test_trials_that_are_stopped_or_fail_count_as_such(tmp_path):
    def one(trial, overrides):
        assert len(overrides) == 2
        if trial.number % 3 == 1:
            raise search.TrialFailed("log")
        return measure(trial) if trial.number % 3 else None

    study = run(tmp_path, 6, one=one)
    states = [search.state_of(trial) for trial in study.trials]
    assert states[:3] == ["stopped", "failed", "complete"]
    assert sum(state in search.ENDED for state in states) == 6

    def always(trial, overrides):
        raise search.TrialFailed("log")

    with pytest.raises(search.TrialFailed):
        run(tmp_path / "failing", 6, one=always)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", 6, one=interrupt)
    assert len(run(tmp_path / "stopped", 6).trials) == 7


def interrupt(trial, overrides):
    raise KeyboardInterrupt


def test_draws_that_are_no_recipe_are_drawn_again(tmp_path):
    def check(values):
        if float(dict(value.split("=") for value in values)["optimizer.lr"]) > 1e-3:
            raise RecipeError([UserError("too high")])

    study = run(tmp_path, 8, check=check)
    done = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    assert {search.state_of(trial) for trial in study.trials} == {"complete", "refused"}
    assert len(done) == 8 and all(trial.params["optimizer.lr"] < 1.01e-3 for trial in done)

    def refuse(values):
        raise RecipeError([UserError("never")])

    with pytest.raises(UserError):
        run(tmp_path / "none", 5, check=refuse)


def test_processes_share_a_search(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=run, args=(tmp_path, 12)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]
    study = search.open_study(tmp_path, ASKED, "tpe", 12)
    numbers = [trial.number for trial in study.trials]
    assert numbers == list(range(len(numbers))) and 12 <= len(numbers) <= 13
    assert all(trial.state == TrialState.COMPLETE for trial in study.trials)
