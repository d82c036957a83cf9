"""`train.stash` on real ranks: against a reference that rounds by itself, over world sizes, resumed."""

import pytest
import torch

from distributed import stash_checks
from distributed.checkpoint_checks import assert_same, contents
from distributed.reference import SGD, make_recipe

CHECKPOINTING = ["none", "reentrant", "non_reentrant"]


@pytest.mark.parametrize(("stash", "checkpointing"), [("bfp4", "reentrant"), ("bfp8", "non_reentrant")])
def test_checkpointed_layers_are_those_of_rounded_inputs(ranks, tiny, tmp_path, stash, checkpointing):
    train = {"stash": stash, "activation_checkpointing": checkpointing}
    recipe = make_recipe(tiny, tmp_path, optimizer=SGD, train=train)  # Adam's first steps see signs alone
    results = ranks(2)(stash_checks.check_against_rounded_layers, recipe=recipe)
    assert results[0] == results[1]


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_world_size_is_not_an_input(ranks, tiny, tmp_path, checkpointing):
    """One mask, one curve of the loss; the first loss is that without a stash, the others are not."""
    train = {"activation_checkpointing": checkpointing, "stash": "bfp4"}
    runs = {
        world_size: ranks(world_size)(
            stash_checks.check_losses, recipe=make_recipe(tiny, tmp_path / str(world_size), train=train)
        )[0]
        for world_size in (1, 2, 4)
    }
    plain = make_recipe(tiny, tmp_path / "plain", train={**train, "stash": None})
    (plain,) = ranks(1)(stash_checks.check_losses, recipe=plain)
    for run in runs.values():
        assert run["sha256"] == plain["sha256"]
        assert run["loss"] == pytest.approx(runs[1]["loss"], abs=1e-4)
        assert run["grad_norm"] == pytest.approx(runs[1]["grad_norm"], rel=1e-3)
        assert run["stash"] == ["bfp4"] * 5 and 0 < run["saved"]["packed"] < run["saved"]["activations"] / 3
    assert runs[1]["loss"][0] == pytest.approx(plain["loss"][0], abs=1e-6)
    gap = abs(runs[1]["loss"][-1] - plain["loss"][-1])
    assert 1e-5 < gap < 0.1 * (plain["loss"][0] - plain["loss"][-1])
    assert plain["stash"] == [None] * 5 and plain["saved"] == {}


def test_both_kinds_of_checkpointing_are_one(ranks, tiny, tmp_path):
    made = [
        ranks(1)(stash_checks.check_losses, recipe=make_recipe(tiny, tmp_path / kind, train={
            "activation_checkpointing": kind, "stash": "bfp4"}))[0]
        for kind in CHECKPOINTING[1:]
    ]  # fmt: skip
    assert made[0]["loss"] == made[1]["loss"] and torch.equal(made[0]["delta"], made[1]["delta"])


@pytest.mark.parametrize("backend", ["dense", "sampled", "columns"])
def test_every_backend_has_the_packed_inputs(ranks, tiny, tmp_path, backend):
    """The same run, whatever multiplies: on two ranks, with tied weights and columns of inputs."""
    mask = {"compute": 0.5}
    made = []
    for name in ("dense", backend):
        train = {"sparse_backend": name, "stash": "bfp4"}
        recipe = make_recipe(tiny, tmp_path / name, "tied", mask=mask, train=train)
        made.append(ranks(2)(stash_checks.check_losses, recipe=recipe)[0])
    assert made[0]["sha256"] == made[1]["sha256"]
    assert all(run["saved"]["packed"] > 0 for run in made)
    assert made[1]["loss"] == pytest.approx(made[0]["loss"], abs=2e-5 if backend != "columns" else 2e-3)


def test_a_resumed_run_goes_on_with_its_format(ranks, tiny, tmp_path):
    def piece(folder, stop, checkpoint=None):
        train = {"stash": "dynamic", "steps": 12}
        recipe = make_recipe(tiny, tmp_path / folder, train=train)
        pieces = ranks(2)(stash_checks.run_short_windows, recipe=recipe, stop=stop, checkpoint=checkpoint)
        assert pieces[0]["formats"] == pieces[1]["formats"]
        return pieces[0]

    whole, first = piece("whole", 12), piece("first", 5)
    second = piece("second", 12, first["checkpoint"])
    assert whole["formats"] == ["bfp4"] * 4 + ["bfp6"] * 4 + ["bfp8"] * 4
    assert first["formats"] + second["formats"] == whole["formats"]
    assert first["losses"] + second["losses"] == whole["losses"]
    assert_same(contents(second["checkpoint"]), contents(whole["checkpoint"]))
