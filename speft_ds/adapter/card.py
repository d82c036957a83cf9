"""The adapter's card: README.md with the hub's metadata, what was trained, scores, how to load it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment
from markupsafe import Markup

from speft_ds.adapter.format import CARD, Adapter
from speft_ds.hub import is_hub_id
from speft_ds.io import write_text
from speft_ds.untrusted import in_markdown

TASKS = {  # by name: the hub's pipeline, and the class that loads the base
    "causal_lm": ("text-generation", "AutoModelForCausalLM"),
    "sequence_classification": ("text-classification", "AutoModelForSequenceClassification"),
}
# Keys of the recipe that the card shows: (section, key, what it is).
SHOWN = (
    ("mask", "salience", "weights chosen by"),
    ("mask", "schedule", "mask schedule"),
    ("optimizer", "lr", "learning rate"),
    ("train", "global_batch", "rows per step"),
    ("train", "steps", "steps"),
    ("train", "epochs", "epochs"),
)


def write_card(folder: str | Path, scores: Sequence[dict[str, Any]]) -> None:
    """Write the card of the adapter in a folder beside it, atomically; `scores` as in `card_text`.

    Raises:
        UserError: there is no complete adapter.
        OSError: it cannot be written.
    """
    adapter = Adapter.open(folder)
    write_text(adapter.folder / CARD, card_text(adapter.facts, scores, adapter.num_bytes))


def card_text(facts: dict, scores: Sequence[dict[str, Any]], num_bytes: int) -> str:
    """A model card in markdown.

    Args:
        facts: of adapter.json.
        scores: rows of the table: `task`, `metric`, `before`, `after` and `stderr`, each None where unknown.
        num_bytes: of adapter.safetensors.
    """
    environment = Environment(trim_blocks=True, keep_trailing_newline=True, finalize=_as_markdown)
    environment.filters["code"] = lambda value: Markup(json.dumps(value).replace("`", "\\u0060"))
    template = Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8")
    base, name = _public_name(facts["base"]), _of_recipe(facts, "name")
    return environment.from_string(template).render(
        facts=facts,
        scores=scores,
        metadata=Markup(_metadata(facts)),
        title=f"{name}: sparse fine-tuning of {base}" if name else f"Sparse fine-tuning of {base}",
        rows=_rows(facts, base, num_bytes),
        auto_class=TASKS.get(facts.get("task"), TASKS["causal_lm"])[1],
        base=base,
    )


def _metadata(facts: dict) -> str:
    """The card's YAML, but for the licence, which is the user's to choose."""
    metadata: dict[str, Any] = {"library_name": "speft_ds"}
    if is_hub_id(facts["base"]):
        metadata |= {"base_model": facts["base"], "base_model_relation": "adapter"}
    if facts.get("task") in TASKS:
        metadata["pipeline_tag"] = TASKS[facts["task"]][0]
    metadata["tags"] = ["sparse-fine-tuning", "speft", "adapter"]
    if datasets := [path for path in _data_paths(facts) if is_hub_id(path)]:
        metadata["datasets"] = datasets
    return yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)


def _rows(facts: dict, base: str, num_bytes: int) -> list[tuple[str, Any]]:
    """What was trained, from what, and how large it is."""
    count, targets = facts["num_entries"], (facts.get("mask") or {}).get("num_target_elements")
    share = f" of {targets:,} ({count / targets:.3%})" if isinstance(targets, int) and targets else ""
    rows = [("base", f"{base}, in {facts['dtype']}"), ("changed weights", f"{count:,}{share}")]
    if facts.get("classes"):
        rows.append(("classes", ", ".join(facts["classes"])))
    rows.append(("size", f"{num_bytes / 2**20:.2f} MiB, {num_bytes / max(count, 1):.2f} bytes per entry"))
    if paths := _data_paths(facts):
        rows.append(("data", ", ".join(path if is_hub_id(path) else Path(path).name for path in paths)))
    shown = [(what, _of_recipe(facts, section, key)) for section, key, what in SHOWN]
    rows += [(what, str(value)) for what, value in shown if value is not None]
    return rows + [("made by", _step(step)) for step in _list(facts.get("history"))]


def _step(step: object) -> str:
    """One step of an adapter's history: `compress method=dare keep=0.1 of adapter`."""
    if not isinstance(step, dict):
        return str(step)
    options = " ".join(f"{key}={value}" for key, value in step.items() if key not in ("command", "of"))
    made_of = [source.get("folder") for source in _list(step.get("of")) if isinstance(source, dict)]
    sources = [Path(str(folder)).name for folder in made_of]
    return f"{step.get('command')} {options}" + (f" of {', '.join(sources)}" if sources else "")


def _as_markdown(value: object) -> str:
    """What a file says is text, and never markup."""
    if isinstance(value, Markup):
        return value
    return in_markdown("-" if value is None else f"{value:.4f}" if isinstance(value, float) else value)


def _public_name(base: str) -> str:
    """A hub name as it is; of a local folder its last part, which says nothing of the machine."""
    return base if is_hub_id(base) else Path(base).name or base


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
