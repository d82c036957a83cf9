"""The card of an adapter, or of a checkpoint merged with it: README.md with the hub's metadata.

It says what was trained, its scores, what it is for and what is not known, the licences, and how to load it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from jinja2 import Environment
from markupsafe import Markup

from speft_ds.adapter.format import CARD, Adapter
from speft_ds.config.limited_yaml import load, read_text
from speft_ds.config.method_config import LORA, WITH_MASK, MethodConfig
from speft_ds.hub import dataset_folder, is_hub_id, model_folder, public_name
from speft_ds.io import write_text
from speft_ds.untrusted import in_markdown, printable

TASKS = {  # by name: the hub's pipeline, and the class that loads the base
    "causal_lm": ("text-generation", "AutoModelForCausalLM"),
    "sequence_classification": ("text-classification", "AutoModelForSequenceClassification"),
}
# Keys of the recipe that make most of a result, and what they are.
HYPERPARAMETERS = {
    "method.name": "method",
    "method.alpha": "alpha",
    "method.lora_share": "low-rank part of the budget",
    "mask.salience": "weights chosen by",
    "mask.density": "density",
    "mask.granularity": "granularity",
    "mask.budget": "budget",
    "mask.schedule": "mask schedule",
    "mask.layer_gate": "layer gate",
    "mask.calibration_samples": "calibration rows",
    "optimizer.name": "optimizer",
    "optimizer.lr": "learning rate",
    "optimizer.schedule": "learning rate schedule",
    "optimizer.warmup_steps": "warmup steps",
    "optimizer.weight_decay": "weight decay",
    "optimizer.clip_norm": "gradient clipping",
    "train.steps": "steps",
    "train.epochs": "epochs",
    "train.global_batch": "rows per step",
    "train.stash": "stashed activations",
    "data.max_length": "tokens per row, at most",
    "data.packing": "packing",
    "model.dtype": "dtype",
    "model.base_format": "base in few bits",
    "seed": "seed",
}
# Those that only some methods have; what is named `sparse` goes without saying.
OF_METHODS = {
    "method.name": set(get_args(MethodConfig.model_fields["name"].annotation)) - {"sparse"},
    "method.alpha": {*LORA, "sparse_lora"},
    "method.lora_share": {"sparse_lora"},
}


def write_card(folder: str | Path, scores: Sequence[dict[str, Any]]) -> None:
    """Write the card of the adapter in a folder beside it, atomically; `scores` as in `card_text`.

    Raises:
        UserError: there is no complete adapter.
        OSError: it cannot be written.
    """
    adapter = Adapter.open(folder)
    write_text(adapter.folder / CARD, card_text(adapter.facts, scores, adapter.num_bytes))


def card_text(
    facts: dict, scores: Sequence[dict[str, Any]], num_bytes: int, merged: str | None = None
) -> str:
    """A model card in markdown, whose metadata huggingface_hub accepts.

    Args:
        facts: of adapter.json.
        scores: of the run, by `evaluation.scores.card_scores`.
        num_bytes: of the weights that the card is of.
        merged: None: the card is of the adapter; else of a merged checkpoint: how it was made.
    """
    environment = Environment(trim_blocks=True, keep_trailing_newline=True, finalize=_as_markdown)
    environment.filters["code"] = lambda value: Markup(json.dumps(value).replace("`", "\\u0060"))
    template = Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8")
    base, name = public_name(facts["base"]), _of_recipe(facts, "name")
    kind = "low-rank" if facts.get("low_rank") and not facts["num_entries"] else "sparse"
    title = f"{name}: {kind} fine-tuning of {base}" if name else f"{kind.capitalize()} fine-tuning of {base}"
    return environment.from_string(template).render(
        facts=facts,
        scores=[score for score in scores if score["role"] == "task"],
        forgetting=[score for score in scores if score["role"] == "forgetting"],
        metadata=Markup(_metadata(facts, scores, title, merged is not None)),
        title=title,
        rows=_rows(facts, base, num_bytes, merged),
        licences=_licences(facts),
        auto_class=TASKS.get(facts.get("task"), TASKS["causal_lm"])[1],
        base=base,
        data=data_names(facts.get("recipe")),
        seed=_of_recipe(facts, "seed"),
        is_merged=merged is not None,
        kind=kind,
        has_matrices=bool(facts.get("low_rank")),
    )


def hyperparameters(recipe: Any) -> list[tuple[str, Any]]:
    """(what, value) of the main ones of a nested recipe; without those that are not set, or switched off."""
    facts = {"recipe": recipe}
    method = _of_recipe(facts, "method", "name")
    has_none = () if method is None or method in WITH_MASK else ("mask.",)
    unused = [key for key, methods in OF_METHODS.items() if method not in methods]
    found = [
        (what, _of_recipe(facts, *key.split(".")))
        for key, what in HYPERPARAMETERS.items()
        if not key.startswith((*has_none, *unused))
    ]
    return [(what, value) for what, value in found if value not in (None, "none") and value is not False]


def data_names(recipe: Any) -> list[str]:
    """The data sets of a nested recipe, as `hub.public_name` has them."""
    return [public_name(path) for path in _data_paths({"recipe": recipe})]


def _metadata(facts: dict, scores: Sequence[dict[str, Any]], title: str, is_merged: bool) -> str:
    """The card's YAML, but for the licence, which is the user's to choose."""
    from huggingface_hub import EvalResult, ModelCardData  # late: it takes its time

    has_entries = bool(facts["num_entries"]) or not facts.get("low_rank")
    pipeline = TASKS[facts["task"]][0] if facts.get("task") in TASKS else None
    results = [
        EvalResult(
            task_type=pipeline or "other",
            dataset_type=_one_line(score["task"]),
            dataset_name=_one_line(score["task"]),
            metric_type=_one_line(score["metric"]),
            metric_value=score["value"],
            dataset_args={"num_few_shot": score["num_fewshot"]} if score["num_fewshot"] is not None else None,
        )
        for score in scores
        if math.isfinite(score["value"])
    ]
    related = {"base_model": facts["base"], "base_model_relation": "finetune" if is_merged else "adapter"}
    return ModelCardData(
        library_name="transformers" if is_merged else "speft_ds" if has_entries else "peft",
        pipeline_tag=pipeline,
        tags=[
            *(["sparse-fine-tuning"] if has_entries else []),
            *(["lora"] if facts.get("low_rank") else []),
            *["speft", *([] if is_merged else ["adapter"])],
        ],
        datasets=[path for path in _data_paths(facts) if is_hub_id(path)] or None,
        model_name=_one_line(title) if results else None,
        eval_results=results or None,
        **(related if is_hub_id(facts["base"]) else {}),
    ).to_yaml(line_break="\n")


def _one_line(text: object) -> str:
    return " ".join(printable(text).split()) or "-"


def _rows(facts: dict, base: str, num_bytes: int, merged: str | None) -> list[tuple[str, Any]]:
    """What was trained, from what, and how large it is."""
    from speft_ds.model.codecs import base_in_words  # late: it imports torch

    count, targets = facts["num_entries"], (facts.get("mask") or {}).get("num_target_elements")
    share = f" of {targets:,} ({count / targets:.3%})" if isinstance(targets, int) and targets else ""
    stored = base_in_words(facts["dtype"], facts.get("base_format"), len(facts.get("quantised") or []))
    rows = [("base", f"{base}, in {stored}")]
    low_rank = facts.get("low_rank")
    if count or not low_rank:
        rows.append(("changed weights", f"{count:,}{share}"))
    if low_rank:
        rows.append(("low-rank matrices", f"rank {low_rank['rank']}, scaled by {low_rank['scaling']:.4g}"))
    if facts.get("classes"):
        rows.append(("classes", ", ".join(facts["classes"])))
    if facts.get("new_tokens"):
        rows.append(("new tokens", ", ".join(facts["new_tokens"])))
    each = "" if merged or low_rank else f", {num_bytes / max(count, 1):.2f} bytes per entry"
    rows.append(("size", f"{num_bytes / 2**20:.2f} MiB{each}"))
    if names := data_names(facts.get("recipe")):
        rows.append(("data", ", ".join(names)))
    rows += [(what, str(value)) for what, value in hyperparameters(facts.get("recipe"))]
    rows += [("made by", _step(step)) for step in _list(facts.get("history"))]
    return rows + ([("merged", merged)] if merged else [])


def _step(step: object) -> str:
    """One step of an adapter's history: `compress method=dare keep=0.1 of adapter`."""
    if not isinstance(step, dict):
        return str(step)
    options = " ".join(f"{key}={value}" for key, value in step.items() if key not in ("command", "of"))
    made_of = [source.get("folder") for source in _list(step.get("of")) if isinstance(source, dict)]
    sources = [Path(str(folder)).name for folder in made_of]
    return f"{step.get('command')} {options}" + (f" of {', '.join(sources)}" if sources else "")


def _licences(facts: dict) -> list[tuple[str, str]]:
    """(of what, which) for base and data, as far as cards on this machine say."""
    found = [(f"base, {public_name(facts['base'])}", _licence_in(model_folder(facts["base"])))]
    for path in _data_paths(facts):
        found.append((f"data, {public_name(path)}", _licence_in(dataset_folder(path))))
    unknown = "not known: no card on the machine that wrote this names one"
    return [(what, f"{licence}, as its card says" if licence else unknown) for what, licence in found]


def _licence_in(folder: Path | None) -> str | None:
    """The licence that the card in a folder names; None where there is no card, or it names none."""
    try:
        text = read_text(folder / CARD) if folder else ""
        front = load(text.split("---\n", 2)[1]) if text.startswith("---\n") else {}
    except (OSError, ValueError, yaml.YAMLError):
        return None
    named = front if isinstance(front, Mapping) else {}
    licence = named.get("license_name") if named.get("license") == "other" else named.get("license")
    names = [name for name in (licence if isinstance(licence, list) else [licence]) if isinstance(name, str)]
    return ", ".join(names) or None


def _as_markdown(value: object) -> str:
    """What a file says is text, and never markup."""
    if isinstance(value, Markup):
        return value
    return in_markdown("-" if value is None else f"{value:,}" if type(value) is int else value)


def _data_paths(facts: dict) -> list[str]:
    mixture = _list(_of_recipe(facts, "data", "mixture"))
    sources = [source.get("path") for source in mixture if isinstance(source, dict)]
    return [path for path in (_of_recipe(facts, "data", "path"), *sources) if isinstance(path, str)]


def _list(value: object) -> list:
    """A fact that should be a list."""
    return value if isinstance(value, list) else []


def _of_recipe(facts: dict, *keys: str) -> Any:
    """A value of the recipe, None where it has none."""
    value: Any = facts.get("recipe")
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
