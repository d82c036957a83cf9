"""What runs on every rank, of scoring. Each function is one check, called through the `ranks` fixture."""

from __future__ import annotations

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from distributed.reference import make_trainer, plain_model
from speft_ds.comm import collectives
from speft_ds.config.recipe import Recipe
from speft_ds.evaluation.eval_jobs import jobs_of


def scores_and_answers(results: dict) -> dict:
    """lm-eval's scores, and each document's prompts and answers, by task."""
    samples = {
        task: [(sample["doc_id"], sample["arguments"], sample["resps"]) for sample in rows]
        for task, rows in results["samples"].items()
    }
    return {"results": results["results"], "samples": samples}


def check_evaluation(recipe: Recipe, of: dict | None = None) -> list[dict] | None:
    """lm-eval on the live engine: each job of `before`, with its documents; on rank 0."""
    trainer = make_trainer(recipe)
    scored = list(trainer.evaluation.run(trainer.engine.module, jobs_of(recipe.eval, "before"), of or {}))
    if collectives.rank() != 0:
        return None
    return [{**scores_and_answers(each.results), "document": each.file.model_dump()} for each in scored]


def check_stock_evaluation(recipe: Recipe, num_fewshot: int | None = None) -> dict | None:
    """The same tasks by lm-eval's own HFLM on the plain model: the reference for `check_evaluation`."""
    if collectives.rank() != 0:
        return None
    model, section = plain_model(recipe), recipe.eval
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.name_or_path)
    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=section.batch_size),
        tasks=list(section.tasks),
        limit=section.limit,
        num_fewshot=num_fewshot,
        apply_chat_template=section.chat_template,
        task_manager=TaskManager(include_path=section.include_path, include_defaults=False),
    )
    return scores_and_answers(results)
