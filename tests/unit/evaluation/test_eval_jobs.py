"""The evaluation jobs of a recipe; equivalent prompt formats: what they change, and what they leave alone."""

from pathlib import Path

import pydantic
import pytest

from speft_ds.config.eval_config import EvalConfig
from speft_ds.evaluation.eval_jobs import EvalJob, LowBits, PromptFormat, extra_jobs, jobs_of, prompt_formats

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


@pytest.mark.parametrize(
    ("limit", "fewer", "scored"),
    [
        (9, 4, 4),
        (9, 20, 9),
        (None, 4, 4),
        (9, None, 9),
        (0.5, 0.1, 0.1),
        (0.1, 0.5, 0.1),
        (0.1, 4, 4),  # nobody knows which is less
        (9, 0.1, 0.1),
    ],
)
def test_baselines_are_scored_on_fewer_documents_never_on_more(limit, fewer, scored):
    recipe = ALL.model_copy(update={"limit": limit, "manual_fewshot_limit": fewer})
    limits = {job.kind: job.limit for job in jobs_of(recipe, "before")}
    assert limits == {"main": limit, "fewshot": scored, "format": limit}


def test_nothing_that_was_not_asked_for():
    assert jobs_of(EvalConfig(), "before") == jobs_of(EvalConfig(tasks=["a"], after=False), "after") == []
    (text,) = jobs_of(EvalConfig(forgetting_text="text.txt"), "after")
    assert text.has_text and text.tasks == ()


def test_jobs_apart_from_a_run():
    label = "tuned-a+b+text-2shot-limit9"
    formats = [EvalJob(f"{label}-format-{i}", "extra", ("a", "b"), 2, 9, i) for i in (1, 2)]
    first = EvalJob(label, "extra", ("a", "b"), 2, 9, has_text=True)
    assert extra_jobs(ALL, Path("runs/a/adapter")) == [first, *formats]
    (text,) = extra_jobs(EvalConfig(forgetting_text="text.txt"), None, LowBits("bfp6", "bfp8"))
    assert text == EvalJob("base-text-weights-bfp6-activations-bfp8", "extra", (), None, None, has_text=True)
    (bits,) = extra_jobs(EvalConfig(tasks=["a"]), None, LowBits(activations="nf4"))
    assert bits.label == "base-a-activations-nf4"
    for adapter, label in ((None, "base-x_y"), (Path("adapters/before"), "adapter-before-x_y")):
        assert [job.label for job in extra_jobs(EvalConfig(tasks=["x/y"]), adapter)] == [label]


@pytest.mark.parametrize(
    ("typed", "limit"), [(3, 3), (3.0, 3), (0.1, 0.1), ("1e-1", 0.1), (1.0, 1), (None, None)]
)
def test_a_limit_is_a_number_or_a_share_as_in_lm_eval(typed, limit):
    found = EvalConfig(tasks=["a"], limit=typed).limit
    assert found == limit and type(found) is type(limit)


@pytest.mark.parametrize("typed", [0, -1, 0.0, -0.5, 1.5, "many", float("nan"), float("inf"), True])
def test_any_other_limit_is_refused(typed):
    with pytest.raises(pydantic.ValidationError, match="limit"):
        EvalConfig(tasks=["a"], limit=typed)


@pytest.mark.parametrize("idle", [{"manual_fewshot": [1]}, {"format_spread": 2}, {"slice": 5}])
def test_baselines_of_no_tasks_are_refused(idle):
    with pytest.raises(pydantic.ValidationError, match=f"eval.{next(iter(idle))}"):
        EvalConfig(**idle)


# Prompt formats

PROMPT = "Question: What is 1:2?\nAnswer: half\n\nQuestion: Why: so?\nFinal Answer:"


def test_descriptors_are_rewritten_and_nothing_else():
    rewritten = PromptFormat(str.upper, " -", "\n").rewrite(PROMPT)
    assert rewritten == "QUESTION - What is 1:2?\nANSWER - half\n\nQUESTION - Why: so?\nFINAL ANSWER -"
    assert PromptFormat(str, ":", "\n\n").rewrite("Text: a\nb\nLabel:") == "Text: a\nb\n\nLabel:"


@pytest.mark.parametrize("prompt", ["", "say cat please", "see http://a: b\n- x: y", "{'Key': 1}"])
def test_a_prompt_without_descriptors_stays(prompt):
    assert all(each.rewrite(prompt) == prompt for each in prompt_formats(40)[1:])


def test_formats_are_different_and_always_the_same_and_keep_every_word():
    formats = prompt_formats(50)
    assert formats[0] is None and prompt_formats(5) == formats[:5]  # more of them keep the first
    rewritten = [each.rewrite(PROMPT) for each in formats[1:]]
    assert len({PROMPT, *rewritten}) == 50
    words = PROMPT.lower().replace(":", " ").split()
    assert all(word in prompt.lower() for prompt in rewritten for word in words)


def test_what_ends_an_answer_is_known_in_both_forms():
    settings = {"until": ["Question:", "</s>"], "max_gen_toks": 8}
    prompt, rewritten = PromptFormat(str.upper, " -", "\n").rewrite_request((PROMPT, settings))
    assert rewritten == {"until": ["Question:", "</s>", "QUESTION -"], "max_gen_toks": 8}
    assert prompt.startswith("QUESTION - ") and settings["until"] == ["Question:", "</s>"]
