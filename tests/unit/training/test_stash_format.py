"""`train.stash=dynamic` on losses that are made up; what a checkpoint holds of it."""

import json
from itertools import pairwise

import pytest

from speft_ds.training.stash_format import WINDOW, DynamicFormat, TrainingStash
from unit.model.test_input_recompute import IDS, make_model


def formats(losses):
    """The format of each step."""
    dynamic, found = DynamicFormat(), []
    for loss in losses:
        found.append(dynamic.name)
        dynamic.add(loss)
    return found


def changes(losses):
    found = formats(losses)
    return [(step, after) for step, (before, after) in enumerate(pairwise(found), 1) if after != before]


def test_a_loss_that_falls_keeps_few_bits():
    assert set(formats(3.0 * 0.99**step for step in range(10 * WINDOW))) == {"bfp4"}


def test_a_loss_that_stays_takes_one_format_after_the_other():
    """Two windows for each: the second is compared with the first."""
    assert changes([2.0] * (10 * WINDOW)) == [(2 * WINDOW, "bfp6"), (4 * WINDOW, "bfp8")]


def test_it_is_the_mean_that_counts():
    falls = [2.0 - step / (5 * WINDOW) for step in range(3 * WINDOW)]
    noise = [0.5 * (-1) ** step for step in range(3 * WINDOW)]
    assert changes([loss + each for loss, each in zip(falls, noise, strict=True)]) == []
    assert changes([2.0 + each for each in noise]) == [(2 * WINDOW, "bfp6")]


@pytest.mark.parametrize(("share", "raises"), [(0.005, True), (0.02, False)])
def test_how_far_it_must_have_fallen(share, raises):
    for first in (2.0, -2.0):
        losses = [first] * WINDOW + [first - share * abs(first)] * WINDOW + [0.0]
        assert bool(changes(losses)) == raises


def test_it_rises_after_it_fell():
    losses = [3.0 * 0.98**step for step in range(3 * WINDOW)] + [5.0] * WINDOW
    assert changes([*losses, 0.0]) == [(4 * WINDOW, "bfp6")]


def make(asked):
    return TrainingStash(make_model("llama"), asked)


@pytest.mark.parametrize("stop", [5, WINDOW, 2 * WINDOW - 1, 2 * WINDOW, 3 * WINDOW + 1])
def test_a_resumed_run_goes_on_alike(stop):
    losses = [2.0 + 0.1 * (step % 7) for step in range(5 * WINDOW)]
    whole, first, second = make("dynamic"), make("dynamic"), make("dynamic")
    used = [whole.after_step(step, loss, False) for step, loss in enumerate(losses)]
    for step, loss in enumerate(losses[:stop]):
        first.after_step(step, loss, False)
    progress = first.progress()
    text = json.dumps(progress)
    first.after_step(stop, 1.0, False)
    assert json.dumps(progress) == text  # it is written while the run goes on
    second.restore(json.loads(text))
    assert [second.after_step(step, loss, False) for step, loss in enumerate(losses[stop:], stop)] == used[
        stop:
    ]
    assert len({values["stash"] for values in used}) == 3


@pytest.mark.parametrize(
    "progress",
    [None, {}, {"name": "bfp4", "losses": 3, "before": None}, {"name": "nf4", "losses": [], "before": None},
     {"name": "bfp4", "losses": ["x"], "before": None}, {"name": "bfp4", "losses": [1.0] * 99, "before": 1}],
)  # fmt: skip
def test_progress_that_is_none_is_not_taken_up(progress):
    with pytest.raises((KeyError, TypeError, ValueError)):
        make("dynamic").restore(progress)


def test_skipped_steps_do_not_count():
    stash = make("dynamic")
    for step in range(5 * WINDOW):
        assert stash.after_step(step, float("nan"), True) == {"stash": "bfp4"}


def test_fixed_formats_and_none():
    assert make("bfp8").after_step(0, 1.0, False) == {"stash": "bfp8"}
    none = make(None)
    assert (none.after_step(0, 1.0, False), none.facts(), none.progress(), none.stash) == ({}, {}, None, None)
    assert not none.stash and not none.restore(None)


def test_what_is_saved_is_said(capsys):
    stash = make("bfp4")
    model = make_model("llama")
    with stash.packing(IDS.numel()):  # frozen: nothing is saved
        model(input_ids=IDS, use_cache=False)
    stash.note_saved()
    assert "train.stash" in capsys.readouterr().out
    model.get_input_embeddings().register_forward_hook(lambda module, x, y: y.requires_grad_(True))
    with stash.packing(IDS.numel()):
        model(input_ids=IDS, use_cache=False)
    stash.note_saved()
    saved = stash.facts()
    assert f"{saved['activations'] / 2**20:,.1f} MiB" in capsys.readouterr().out
    assert 0 < saved["packed"] < saved["activations"] / 4
