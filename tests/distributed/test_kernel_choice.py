"""Kernels chosen by measured costs: alike on all ranks, and the same when a run goes on.

The checks, which run on every rank, come first.
"""

import os
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from unittest import mock

import pytest
import torch
from unit.sparse.tables import keep, sampling

from distributed.reference import make_recipe, start
from speft_ds.comm import collectives
from speft_ds.errors import UserError
from speft_ds.sparse.kernels import measure
from speft_ds.training.checkpoint.folder import inspect
from speft_ds.training.checkpoint.resume import Start


def check_choice(
    recipe,
    folder: Path,
    is_cheap: list[bool | None],
    kernels: str = "measured",
    checkpoint: Path | None = None,
    stop: int = 0,
    recorded_device: str | None = None,
) -> dict:
    """Start a run, or go on from a checkpoint, where the ranks' caches differ.

    Args:
        folder: for the caches.
        is_cheap: by rank, whether its table says that sampling pays; None: it has no table.
        stop: step to write a checkpoint after; 0: none.
        recorded_device: the name that the checkpoint's table has; None: as it is.
    """
    rank, said, measured = collectives.rank(), StringIO(), []
    own = {"SPEFT_DS_CACHE": str(folder / f"rank{rank}"), "SPEFT_DS_KERNELS": kernels}
    device = measure.device_name(torch.device("cpu"))
    begin = Start("resumed", inspect(checkpoint)) if checkpoint else None
    if recorded_device:
        begin.checkpoint.manifest["kernel_costs"]["device"] = recorded_device

    def make_up(*_):
        measured.append(rank)
        return sampling(True, device=device)

    with (
        mock.patch.dict(os.environ, own),
        mock.patch.object(measure, "measure", make_up),
        redirect_stdout(said),
    ):
        if is_cheap[rank] is not None:
            keep(sampling(is_cheap[rank], device=device))
        trainer = start(recipe, begin)
        for step in range(trainer.first_step, stop):
            trainer.train_step(step)
        if stop:
            trainer.writer.start(stop, trainer._snapshot(), trainer._manifest(stop, None))
            trainer.writer.finish()
    costs = trainer.context.costs
    return {
        "backends": trainer.gradient.backends,
        "device": costs and costs.device,
        "sha256": costs and costs.sha256,
        "measured": measured,
        "said": said.getvalue(),
        "checkpoint": trainer.folder / "checkpoints" / f"step_{stop:06d}",
    }


def check_refused(recipe) -> str:
    """Every rank is refused, not rank 0 alone."""
    with mock.patch.dict(os.environ, {"SPEFT_DS_KERNELS": "fast"}), pytest.raises(UserError) as refused:
        measure.agree_on_costs(recipe)
    return refused.value.where


# The tests


@pytest.fixture
def choice(ranks, tiny, tmp_path):
    """choice(folder of the run, is_cheap, ...): what `check_choice` returns, by rank."""

    def run(folder, is_cheap, **options):
        sections = {"mask": {"density": 0.05, "salience": "random"}, **options.pop("sections", {})}
        recipe = make_recipe(tiny, tmp_path / folder, **sections)
        arguments = {"recipe": recipe, "folder": tmp_path / f"{folder}-caches", "is_cheap": is_cheap}
        return ranks(2)(check_choice, **arguments, **options)

    return run


def names(made):
    return set(made["backends"].values())


@pytest.mark.parametrize("is_cheap", [True, False])
def test_rank_0s_table_decides_for_all(choice, is_cheap):
    first, second = choice("run", [is_cheap, not is_cheap])
    assert first["sha256"] == second["sha256"] and first["backends"] == second["backends"]
    assert names(first) == {"sampled" if is_cheap else "dense"}
    assert first["device"] in first["said"] and not first["measured"]


def test_one_rank_measures_and_the_others_take_it(choice):
    first, second = choice("run", [None, False])
    assert (first["measured"], second["measured"]) == ([0], []) and names(second) == {"sampled"}


def test_by_rules_nothing_is_measured_and_the_rule_is_said(choice):
    first, second = choice("run", [False, False], kernels="rules")
    assert names(first) == names(second) == {"sampled"}  # by the rule, up to 10%
    assert first["device"] is None and "rule of thumb" in first["said"] and not first["measured"]


def test_a_named_backend_needs_no_measurement(choice):
    first, _ = choice("run", [None, None], sections={"train": {"sparse_backend": "dense"}})
    assert names(first) == {"dense"} and not first["measured"] and "rule of thumb" not in first["said"]


def test_a_run_goes_on_with_the_kernels_that_it_has(choice):
    began = choice("run", [True, True], stop=2)[0]
    for is_cheap in ([False, False], [None, None]):  # the cache says another thing now, or is gone
        made = choice("next", is_cheap, checkpoint=began["checkpoint"])[1]
        assert made["sha256"] == began["sha256"] and made["backends"] == began["backends"]
        assert not made["measured"]
    by_rules = choice("rules", [False, False], checkpoint=began["checkpoint"], kernels="rules")[0]
    assert by_rules["device"] is None and "note: " in by_rules["said"]
    there = {"checkpoint": began["checkpoint"], "recorded_device": "a faster machine"}
    elsewhere = choice("elsewhere", [False, False], **there)[0]
    assert names(elsewhere) == {"dense"} and "a faster machine" in elsewhere["said"]


def test_a_run_that_began_by_rules_goes_on_by_them(choice):
    began = choice("run", [False, False], kernels="rules", stop=2)[0]
    made = choice("next", [False, False], checkpoint=began["checkpoint"])[0]
    assert made["device"] is None and names(made) == {"sampled"} == names(began)


def test_an_unknown_way_to_choose_is_every_ranks_error(ranks, tiny, tmp_path):
    recipe = make_recipe(tiny, tmp_path)
    assert ranks(2)(check_refused, recipe=recipe) == ["SPEFT_DS_KERNELS"] * 2
