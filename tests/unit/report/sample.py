"""Masks, and run folders like those of real runs, made of numbers that a test can compute again."""

import json
import math
import random

import torch
import yaml

from speft_ds.adapter.format import write_adapter
from speft_ds.config.load_recipe import load_recipe
from speft_ds.sparse.mask import Mask
from unit.saved import save
from unit.written import MINIMAL

MODULES = {"self_attn.q_proj": (24, 24), "self_attn.v_proj": (8, 24), "mlp.up_proj": (40, 24)}
NUM_STEPS, NUM_LAYERS = 60, 6


def score(task, value, stderr=0.01, metric="acc", **changes):
    known = {"num_documents": 500, "num_fewshot": 0, "version": 1.0}
    return {"task": task, "metric": metric, "value": value, "stderr": stderr, **known, **changes}


def evaluation(label, model, kind, scores, perplexity=None, **settings):
    settings = {"num_fewshot": 0, "limit": 500, "mode": "sharded", "lm_eval": "0.4.13", **settings}
    facts = {"perplexity": perplexity, "seconds": 61.5, "cached": label == "before"}
    return {"label": label, "model": model, "kind": kind, "settings": settings, "scores": scores, **facts}


def evaluations(gain=0.2):
    """All kinds that a run may have, by file name."""
    text = {"text": "general.txt", "num_tokens": 20_000}
    files = {}
    for label, model, arc, ppl in (("before", "base", 0.41, 15.0), ("after", "tuned", 0.41 + gain, 15.6)):
        is_base = model == "base"
        json_score = (0.0, 0.0) if is_base else (0.992, 0.004)
        scores = [
            score("arc_easy", arc, 0.022),
            score("arc_easy", arc + 0.03, 0.022, metric="acc_norm", is_main=False),
            score("json_task", *json_score, metric="exact_match", filter="strict-match"),
            score("winogrande", 0.52 if is_base else 0.525, 0.014),
            score("wikitext", 0.9 if is_base else 0.95, metric="bits_per_byte", higher_is_better=False),
            score("piqa", 0.68 if is_base else 0.61, 0.011, role="forgetting"),
        ]
        perplexity = {**text, "token_perplexity": ppl, "byte_perplexity": 1 + ppl / 20}
        files[label] = evaluation(label, model, "main", scores, perplexity)
        for number, difference in enumerate((-0.02, 0.01), 1):
            spread = [score("arc_easy", arc + difference * (2 if is_base else 1), 0.022)]
            name = f"{label}-format-{number}"
            files[name] = evaluation(name, model, "format", spread, format=number)
    for shots, value in ((1, 0.43), (4, 0.47), (16, 0.46)):
        name = f"before-{shots}shot"
        scores = [score("arc_easy", value, 0.022, num_fewshot=shots)]
        files[name] = evaluation(name, "base", "fewshot", scores, num_fewshot=shots)
    files["mmlu"] = evaluation("mmlu", "tuned", "extra", [score("mmlu", 0.27, 0.012, num_fewshot=5)])
    return files


def answers(model):
    """Documents of json_task: one becomes right, one wrong, one stays wrong. The file of each label."""
    right = (0, 1, 0) if model == "base" else (1, 0, 0)
    for number, value in enumerate(right):
        texts = {"arguments": [[f"question {number}", {}]], "target": f"target {number}"}
        answer = {"resps": [[f"{model} says {number}"]], "doc_hash": f"hash {number}"}
        yield {"doc_id": number, "filter": "strict-match", "exact_match": value, **texts, **answer}


def metrics(seed=0, num_steps=NUM_STEPS):
    """One line per step, with everything that a line may have."""
    draw = random.Random(seed)
    lines = []
    for step in range(1, num_steps + 1):
        loss = 0.3 + 2.0 * math.exp(-step / 12) + 0.1 * draw.random()
        line = {
            "step": step, "loss": loss, "lr": 1e-3 * min(step / 6, (num_steps + 1 - step) / num_steps),
            "grad_norm": 1.0 + 4 * math.exp(-step / 8) * draw.random(), "num_skipped": int(step >= 30),
            "num_tokens": 1600 + draw.randrange(200), "step_ms": 4000 + draw.random() * 300,
            "peak_memory_gib": 4.8 if step < 30 else 4.9,
        }  # fmt: skip
        line["tokens_per_s"] = 1000 * line["num_tokens"] / line["step_ms"]
        if step % 10 == 0:
            line |= {"validation_loss": loss + 0.1, "scores": {"arc_easy acc": 0.4 + step / 400}}
        if step == 30:
            line |= {"loss": None, "grad_norm": None}
        lines.append(line)
    return lines


def facts(**changes):
    """run.json"""
    rows = {name: rows * columns for name, (rows, columns) in shapes().items()}
    return {
        "run_id": "mine", "finished": True,
        "recipe": "mine",
        "starts": [
            {
                "step": 0, "world_size": 2,
                "date": "2026-01-02 03:04 UTC", "commits": {"speft_ds": "abc-dirty"},
                "command": "launch/train.py --recipe mine data.path=/home/me/rows.jsonl 'x=a b'",
            },
            {"step": 20, "world_size": 1, "date": "2026-01-03 03:04 UTC"},
        ],
        "versions": {"python": "3.11.7", "speft_ds": "0.1.0", "torch": "2.13.0", "lm_eval": "0.4.13"},
        "machine": {"device": "cpu", "cpu": "AMD EPYC", "num_cores": 2, "gpu": None},
        "world_size": 2, "global_batch": 16, "micro_batch": 4, "num_steps": NUM_STEPS,
        "data": {
            "rows_read": 1050, "left_out": {"empty": 30, "too long": 20}, "truncated": {}, "rows": 1000,
            "packs": None, "label_tokens": 54_321, "epochs": 0.96,
        },
        "mask": {
            "salience": "gradient", "granularity": "element", "budget": "global", "schedule": "periodic",
            "layer_gate": "none", "loaded_from": None, "calibration_samples": 32, "sha256": "ab" * 32,
            "num_trainable": 120 * NUM_LAYERS, "num_target_elements": sum(rows.values()),
            "compute": 0.321, "num_used_columns": 150, "num_columns": 432, "entries_by_rank": [400, 320],
            "changes": [
                {"step": step, "dropped": 50, "grown": 50, "overlap_with_first": 1 - step / 100}
                for step in (20, 40)
            ],
        },
        "method": "sparse", "whole": 0, "sparse_backends": ["dense", "sampled"],
        "kernels_chosen": {"by": "measured costs", "device": "a CPU, 2 threads", "sha256": "c" * 64},
        "resources": [
            {
                "peak_bytes": 2**29 + 2**21 * n,
                "memory_breakdown": {"base shard": 2**20 * (n + 1), "gradient": 0, "delta": 3000},
                "comm_volume": {"gradient": 2048},
            }
            for n in range(2)
        ],
        "base": {"name_or_path": "owner/name", "fingerprint": "f" * 64},
        "timings_s": {
            "tasks": 1.2, "data": 3.1, "model": 4.2, "eval_before": 68.8, "salience": 16.7, "selection": 0.55,
            "training": 260.0, "validation": 12.0, "checkpoints": 2.5, "save": 0.05, "eval_after": 50.2,
            "total": 410.0,
        },
        "tokens_per_s": 408.0,
        **changes,
    }  # fmt: skip


def shapes(num_layers=NUM_LAYERS):
    return {f"model.layers.{n}.{m}.weight": s for n in range(num_layers) for m, s in MODULES.items()}


def decoder(num_layers, *others):
    """A mask of random densities over a decoder, and over other weights of 100 elements."""
    generator = torch.Generator().manual_seed(0)
    shape = shapes(num_layers) | dict.fromkeys(others, (10, 10))
    index = {}
    for name, (rows, columns) in shape.items():
        density = 0.1 * torch.rand(1, generator=generator)
        chosen = torch.rand(rows * columns, generator=generator) < density
        index[name] = chosen.nonzero()[:, 0].to(torch.int32)
    return Mask(index=index, shape=shape)


def make_adapter(folder):
    entries = [(name, index, torch.ones(len(index))) for name, index in decoder(NUM_LAYERS).index.items()]
    known = {"base": "owner/name", "dtype": "bfloat16", "fingerprint": "f" * 64, "task": "causal_lm"}
    write_adapter(folder, entries, {**known, "shapes": shapes(), "recipe": None})


def make_run(folder, *overrides, gain=0.2, seed=0, **changes):
    """A finished run with scores of every kind, two checkpoints, a restart and a skipped step.

    Args:
        overrides: of the recipe; gain: of arc_easy by training; seed: of recipe and numbers; changes: to
            run.json.
    """
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(MINIMAL)
    own = [f"output_dir={folder}", f"seed={seed}", f"train.steps={NUM_STEPS}"]
    recipe = load_recipe(str(folder / "recipe.yaml"), [*own, *overrides])
    nested = recipe.model_dump(mode="json", exclude={"name"})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(nested, sort_keys=False))
    write_json(folder / "run.json", facts(**changes))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics(seed)))
    for name, document in evaluations(gain).items():
        write_json(folder / "eval" / f"{name}.json", document)
    for label, model in (("before", "base"), ("after", "tuned")):
        (folder / "eval" / label).mkdir()
        lines = "".join(json.dumps(line) + "\n" for line in answers(model))
        (folder / "eval" / label / "json_task.jsonl").write_text(lines)
    make_adapter(folder / "adapter")
    for step in (40, NUM_STEPS):
        save(folder, step, run_id="mine")
    return folder


def write_json(path, document):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
