"""The evaluation jobs of a recipe."""

import pydantic
import pytest

from speft_ds.config.eval_config import EvalConfig
from speft_ds.evaluation.eval_jobs import EvalJob, extra_jobs, jobs_of

ALL = EvalConfig(
    tasks=["a", "b"],
    num_fewshot=2,
    limit=9,
    manual_fewshot=[0, 4],
    format_spread=3,
    forgetting_tasks=["b", "c"],
    forgetting_text="text.txt",
)


def test_every_baseline_before_and_what_can_change_after():
    main = EvalJob("before", "main", ("a", "b", "c"), 2, 9, has_text=True)
    shots = [EvalJob(f"before-{k}shot", "fewshot", ("a", "b"), k, 9) for k in (0, 4)]
    formats = [EvalJob(f"before-format-{i}", "format", ("a", "b"), 2, 9, i) for i in (1, 2)]
    assert jobs_of(ALL, "before") == [main, *shots, *formats]
    assert [job.label for job in jobs_of(ALL, "after")] == ["after", "after-format-1", "after-format-2"]


@pytest.mark.parametrize(("limit", "fewer", "scored"), [(9, 4, 4), (9, 20, 9), (None, 4, 4), (9, None, 9)])
def test_baselines_are_scored_on_fewer_documents_never_on_more(limit, fewer, scored):
    recipe = ALL.model_copy(update={"limit": limit, "manual_fewshot_limit": fewer})
    limits = {round.kind: round.limit for round in jobs_of(recipe, "before")}
    assert limits == {"main": limit, "fewshot": scored, "format": limit}


def test_nothing_that_was_not_asked_for():
    assert jobs_of(EvalConfig(), "before") == jobs_of(EvalConfig(tasks=["a"], after=False), "after") == []
    (text,) = jobs_of(EvalConfig(forgetting_text="text.txt"), "after")
    assert text.has_text and text.tasks == ()


def test_jobs_apart_from_a_run():
    label = "tuned-a+b-2shot-limit9"
    formats = [EvalJob(f"{label}-format-{i}", "extra", ("a", "b"), 2, 9, i) for i in (1, 2)]
    assert extra_jobs(ALL, "tuned") == [EvalJob(label, "extra", ("a", "b"), 2, 9), *formats]
    assert [job.label for job in extra_jobs(EvalConfig(tasks=["x/y"]), "base")] == ["base-x_y"]


@pytest.mark.parametrize("idle", [{"manual_fewshot": [1]}, {"format_spread": 2}, {"slice": 5}])
def test_baselines_of_no_tasks_are_refused(idle):
    with pytest.raises(pydantic.ValidationError, match=f"eval.{next(iter(idle))}"):
        EvalConfig(**idle)
