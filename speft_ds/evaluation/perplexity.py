"""How well the model still predicts general text: a number that forgetting raises."""

from __future__ import annotations

import json
import math
from pathlib import Path

from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from speft_ds.config.eval_config import EvalConfig
from speft_ds.errors import UserError
from speft_ds.evaluation.lm import EngineLM

WINDOW = 1024  # tokens that a token is predicted from, at most: the same for models of any context length


def text_perplexity(lm: EngineLM, recipe: EvalConfig) -> dict:
    """Perplexity of `eval.forgetting_text`, the same on every rank.

    The text is cut into disjoint windows of 1,024 tokens; a window's first token is predicted from the one
    before it, as by lm-eval's rolling log-likelihood.

    Returns:
        `text`, `num_bytes`, `num_tokens`, `window`, `token_perplexity`, `byte_perplexity`, `bits_per_byte`.
    Raises:
        UserError: there is no text in the file.
    """
    text = read_text(Path(recipe.forgetting_text), recipe.forgetting_bytes)
    tokens = lm.tok_encode(text)
    windows = get_rolling_token_windows(tokens, lm.prefix_token_id, min(WINDOW, lm.max_length), 1)
    requests = [(None, *make_disjoint_window(window)) for window in windows]

    def compute() -> list[float]:
        return [answer[0] for answer in lm._loglikelihood_tokens(requests)]

    sums = lm.answers.get("windows", [request[1:] for request in requests], compute) if lm.answers else None
    nll = -math.fsum(compute() if sums is None else sums)
    num_bytes = len(text.encode())
    return {
        "text": recipe.forgetting_text,
        "num_bytes": num_bytes,
        "num_tokens": len(tokens),
        "window": WINDOW,
        "token_perplexity": math.exp(nll / len(tokens)),
        "byte_perplexity": math.exp(nll / num_bytes),
        "bits_per_byte": nll / num_bytes / math.log(2),
    }


def read_text(path: Path, num_bytes: int) -> str:
    """The beginning of a text file; of a .jsonl file, of its rows' `text`, one a paragraph.

    Raises:
        UserError: it cannot be read, or has no text.
    """
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix == ".jsonl":
                pieces, size = [], 0
                for line in file:
                    pieces.append(json.loads(line)["text"])
                    size += len(pieces[-1].encode()) + 1
                    if size >= num_bytes:
                        break
                text = "\n".join(pieces)
            else:
                text = file.read(num_bytes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        fix = 'a UTF-8 text, or a .jsonl file of {"text": ...}'
        raise UserError(f"{path} cannot be read as text: {error}", "eval.forgetting_text", fix) from error
    text = text.encode()[:num_bytes].decode(errors="ignore")
    if not text.strip():
        raise UserError(f"{path} has no text", "eval.forgetting_text", "name another file")
    return text
