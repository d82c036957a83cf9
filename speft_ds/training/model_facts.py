"""Which base a run is of, and which model its scores are of: facts for masks, adapters and scores."""

from __future__ import annotations

import hashlib
import json

from speft_ds.training.run_data import classifies
from speft_ds.training.setup import TrainContext


def base_facts(context: TrainContext) -> dict:
    """Which base this is, for files made from it: masks and adapters."""
    recipe, data = context.recipe, context.data
    classifier = {"classes": data.classes, "pad_token_id": data.pad_id, "row_ends_with_eos": True}
    few_bits = {"base_format": recipe.model.base_format, "quantised": context.quantised}
    few_bits["start"] = recipe.mask.start
    return {
        **context.new_tokens.facts(),
        **(classifier if classifies(recipe) else {}),
        **(few_bits if context.quantised else {}),
        "task": recipe.model.task,
        "base": recipe.model.name_or_path,
        "dtype": recipe.model.dtype,
        "fingerprint": context.fingerprint,
        "fingerprint_bfloat16": context.fingerprint_bfloat16,
    }


def scored_model_facts(context: TrainContext, adapter: str | None = None) -> dict[str, str | None]:
    """What answers depend on, whatever the model is called: weights, tokenizer, configuration.

    Args:
        adapter: hash of the adapter whose weights these are; None: the untouched base.
    """
    model, tokenizer = context.engine.module, context.data.tokenizer
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "dtype")}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    written = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    flags = [getattr(tokenizer, f"add_{which}_token", None) for which in ("bos", "eos")]
    parts = [config, model.generation_config.to_dict(), tokenizer.special_tokens_map, flags]
    text = json.dumps([*parts, tokenizer.chat_template, written], sort_keys=True, default=str)
    own = context.recipe.model
    return {
        "fingerprint": context.fingerprint,
        "dtype": own.dtype,
        **({"attention": own.attention} if own.attention != "auto" else {}),
        **({"base_format": own.base_format} if own.base_format else {}),
        # Its base is a residual, whose sum with the matrices is rounded.
        **({"method": "pissa"} if context.low_rank and context.low_rank.start else {}),
        "settings": hashlib.sha256(text.encode()).hexdigest(),
        "adapter": adapter,
    }
