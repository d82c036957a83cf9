"""The adapter's card: README.md with the hub's metadata, what was trained, scores, how to load it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from speft_ds.adapter.format import CARD, TENSORS, Adapter
from speft_ds.io import flush_to_disk, replacing

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
PIPELINES = {"causal_lm": "text-generation", "sequence_classification": "text-classification"}
AUTO_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "sequence_classification": "AutoModelForSequenceClassification",
}
# Keys of the recipe that the card shows: (section, key, what it is).
SHOWN = (
    ("mask", "salience", "weights chosen by"),
    ("mask", "schedule", "mask schedule"),
    ("optimizer", "lr", "learning rate"),
    ("train", "global_batch", "rows a step"),
    ("train", "steps", "steps"),
    ("train", "epochs", "epochs"),
)


def write_card(folder: str | Path, scores: Sequence[dict[str, Any]]) -> None:
    """Write the card of an adapter beside it, atomically.

    Args:
        folder: the adapter's.
        scores: see `card_text`.
    Raises:
        UserError: there is no whole adapter.
        OSError: it cannot be written.
    """
    adapter = Adapter.open(folder)
    text = card_text(adapter.facts, scores, (adapter.folder / TENSORS).stat().st_size)
    with replacing(adapter.folder / CARD) as temporary:
        temporary.write_text(text, encoding="utf-8")
        flush_to_disk(temporary)


def card_text(facts: dict, scores: Sequence[dict[str, Any]], num_bytes: int | None = None) -> str:
    """A model card in markdown.

    Args:
        facts: of adapter.json.
        scores: rows of the table: `task`, `metric`, `before`, `after` and `stderr`, each None where unknown.
        num_bytes: of adapter.safetensors.
    """
    base = _base_name(facts["base"])
    name = _of_recipe(facts, "name")
    title = f"{name}: sparse fine-tuning of {base}" if name else f"Sparse fine-tuning of {base}"
    parts = [
        f"---\n{_metadata(facts)}---\n\n# {title}",
        "An adapter of sparse fine-tuning: some of the base's own weights, changed. Made with speft_ds.",
        _table(("what", "value"), _what(facts, num_bytes)),
        *_scores(scores),
        _usage(facts, base),
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(facts: dict) -> str:
    """The card's YAML, but for the licence, which is the user's to choose."""
    metadata: dict[str, Any] = {"library_name": "speft_ds"}
    if is_hub_id(facts["base"]):
        metadata |= {"base_model": facts["base"], "base_model_relation": "adapter"}
    if pipeline := PIPELINES.get(facts.get("task")):
        metadata["pipeline_tag"] = pipeline
    metadata["tags"] = ["sparse-fine-tuning", "speft", "adapter"]
    if datasets := [path for path in _data_paths(facts) if is_hub_id(path)]:
        metadata["datasets"] = datasets
    return yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True) + "# license: yours to choose\n"


def _what(facts: dict, num_bytes: int | None) -> list[tuple[str, str]]:
    """What was trained, from what, and how large it is: rows of a table."""
    rows = [("base", f"{_base_name(facts['base'])}, in {facts['dtype']}"), ("changed weights", _count(facts))]
    rows += [("classes", ", ".join(map(str, facts["classes"])))] if facts.get("classes") else []
    if num_bytes is not None:
        size = f"{num_bytes / 2**20:.2f} MiB, {num_bytes / max(facts['num_entries'], 1):.2f} bytes an entry"
        rows.append(("size", size))
    if paths := _data_paths(facts):
        rows.append(("data", ", ".join(path if is_hub_id(path) else Path(path).name for path in paths)))
    for section, key, what in SHOWN:
        if (value := _of_recipe(facts, section, key)) is not None:
            rows.append((what, str(value)))
    return rows + [("made by", _step(step)) for step in _list(facts.get("history"))]


def _count(facts: dict) -> str:
    among = (facts.get("mask") or {}).get("num_target_elements")
    of_all = f" of {among:,} ({facts['num_entries'] / among:.3%})" if isinstance(among, int) and among else ""
    return f"{facts['num_entries']:,}{of_all}"


def _step(step: object) -> str:
    """One step of an adapter's history: `compress method=dare keep=0.1 of adapter`."""
    if not isinstance(step, dict):
        return str(step)
    options = " ".join(f"{key}={value}" for key, value in step.items() if key not in ("command", "of"))
    sources = [str(source.get("folder")) for source in _list(step.get("of")) if isinstance(source, dict)]
    made_of = f" of {', '.join(sources)}" if sources else ""
    return f"{step.get('command')} {options}{made_of}"


def _scores(scores: Sequence[dict[str, Any]]) -> list[str]:
    if not scores:
        return []
    heads = ("task", "metric", "before", "after", "standard error")
    rows = [
        [_cell(row.get(key)) for key in ("task", "metric", "before", "after", "stderr")] for row in scores
    ]
    return ["## Scores", _table(heads, rows)]


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _usage(facts: dict, base: str) -> str:
    """How to load it, merge it and hand it to other tools."""
    auto = AUTO_CLASSES.get(facts.get("task"), "AutoModelForCausalLM")
    labels = f", num_labels={len(facts['classes'])}" if facts.get("classes") else ""
    return f"""## Use

```python
import torch, speft_ds
from transformers import {auto}

model = {auto}.from_pretrained({json.dumps(base)}, dtype=torch.{facts["dtype"]}{labels})
speft_ds.apply_adapter(model, "ADAPTER")  # this folder
```

Only the very base that it was made for is accepted. As an ordinary checkpoint, or for PEFT:

```bash
speft merge ADAPTER merged
speft export ADAPTER for_peft --format peft
```"""


def is_hub_id(name: str) -> bool:
    """Whether it is the name of a repository, and no folder or file here."""
    return HUB_ID.fullmatch(name) is not None and not os.path.exists(name)


def _base_name(base: str) -> str:
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


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
