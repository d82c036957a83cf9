"""Which checkpoints are kept, against the rule in words."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speft_ds.training.checkpoint.folder import best_of, folder_of, inspect, list_checkpoints, prune, verify
from unit.saved import flip, save, unmark

LOSSES = st.sampled_from([None, 1.0, 1.5, 2.0])


def steps(run):
    return [checkpoint.step for checkpoint in list_checkpoints(run)]


def is_kept(step, newest, found, keep_last, keep_every, keep_best):
    """The rule for one step; `found`: step -> whether it is whole, whose it is, validation loss."""
    is_whole, run_id, loss = found[step]
    if step >= newest or (is_whole and run_id != "mine"):
        return True
    if not is_whole:
        return False
    losses = {
        other: loss
        for other, (is_whole, run_id, loss) in found.items()
        if is_whole and run_id == "mine" and other <= newest
    }
    is_last = sum(other > step for other in losses) < keep_last
    is_every = keep_every is not None and step % keep_every == 0
    measured = [(loss, other) for other, loss in losses.items() if loss is not None]
    is_best = keep_best and (loss, step) in measured and (loss, step) == min(measured)
    return is_last or is_every or is_best


@given(
    st.dictionaries(
        st.integers(1, 24),
        st.tuples(st.booleans(), st.sampled_from(["mine", "mine", "other"]), LOSSES),
        max_size=8,
    ),
    st.integers(1, 24),
    LOSSES,
    st.integers(1, 4),
    st.none() | st.integers(1, 6),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_what_nothing_says_to_keep_is_removed(found, newest, loss, keep_last, keep_every, keep_best):
    found[newest] = (True, "mine", loss)
    with TemporaryDirectory() as folder:
        run = Path(folder)
        for step, (is_whole, run_id, loss) in found.items():
            path = save(run, step, (), validation_loss=loss, run_id=run_id)
            if not is_whole:
                unmark(path)
        prune(folder_of(run, newest), keep_last, keep_every, keep_best)
        kept = {step for step in found if is_kept(step, newest, found, keep_last, keep_every, keep_best)}
        assert set(steps(run)) == kept
        # What the rule is there for: the one just made stays, and all that is newer.
        assert {step for step in found if step >= newest} <= kept


def test_an_unfinished_one_among_older_ones_is_removed_and_a_newer_one_stays(tmp_path):
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
    unmark(tmp_path / "checkpoints" / "step_000020")
    unmark(tmp_path / "checkpoints" / "step_000040")
    prune(folder_of(tmp_path, 30), keep_last=2, keep_every=None, keep_best=False)
    assert steps(tmp_path) == [40, 30, 10]


def test_of_equal_losses_the_first_is_the_best(tmp_path):
    for step, loss in [(10, 2.0), (20, 1.0), (30, None), (40, 1.0), (50, 3.0)]:
        save(tmp_path, step, validation_loss=loss)
    assert best_of(list_checkpoints(tmp_path)).step == 20
    assert best_of([]) is None and best_of([inspect(save(tmp_path, 60))]) is None


@pytest.mark.parametrize("keep_last", [1, 2])
def test_one_that_was_found_damaged_and_passed_over_costs_no_whole_one(tmp_path, keep_last):
    """A run that went back from step 30 to 20, since 30's contents are damaged, saves step 25."""
    for step in (20, 30):
        save(tmp_path, step)
    flip(tmp_path / "checkpoints" / "step_000030" / "part_00000.safetensors")
    prune(save(tmp_path, 25), keep_last, keep_every=None, keep_best=False)
    assert [c.step for c in list_checkpoints(tmp_path) if c.problem is verify(c) is None][:1] == [25]


def test_one_of_another_run_costs_no_own_one(tmp_path):
    """`newest_whole` passes over it, so it must not count as one that is kept."""
    save(tmp_path, 30, run_id="other")
    prune(save(tmp_path, 25), keep_last=1, keep_every=None, keep_best=False)
    assert 25 in steps(tmp_path)
