"""Perplexity of general text: a number that forgetting raises."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from speft_ds.config.eval_config import EvalConfig
from speft_ds.errors import UserError
from speft_ds.evaluation.lm import EngineLM
from speft_ds.evaluation.scores import Perplexity
from speft_ds.io import parse_json

WINDOW = 1024  # tokens that a token is predicted from, at most: the same for models of any context length
MAX_LOGITS = 2**26  # per batch: lm-eval keeps the logits of all positions, and two fp32 copies (0.75 GiB)


def text_perplexity(lm: EngineLM, section: EvalConfig) -> Perplexity:
    """The perplexity of `eval.forgetting_text`, the same on every rank.

    The text is cut into disjoint windows of 1,024 tokens; a window's first token is predicted from the one
    before it, as in lm-eval's rolling log-likelihood.

    Raises:
        UserError: there is no text in the file.
    """
    text = read_text(Path(section.forgetting_text), section.forgetting_bytes)
    tokens, num_bytes = lm.tok_encode(text), len(text.encode())
    rolling = get_rolling_token_windows(tokens, lm.prefix_token_id, min(WINDOW, lm.max_length), 1)
    windows = [make_disjoint_window(window) for window in rolling]

    def compute() -> list[float]:
        requests = [(None, *window) for window in windows]
        batch_size = max(1, MAX_LOGITS // (WINDOW * lm.vocab_size))
        # lm-eval adds up likelihoods in the model's dtype: of a window, bfloat16 would keep two digits.
        own, lm.softmax_dtype = lm.softmax_dtype, torch.float32
        try:
            responses = lm._loglikelihood_tokens(requests, override_bs=batch_size)
        finally:
            lm.softmax_dtype = own
        return [log_likelihood for log_likelihood, _ in responses]

    nll = -math.fsum(lm.cached("windows in float32", windows, compute))
    return Perplexity(
        text=section.forgetting_text,
        num_bytes=num_bytes,
        num_tokens=len(tokens),
        window=WINDOW,
        token_perplexity=math.exp(nll / len(tokens)),
        byte_perplexity=math.exp(nll / num_bytes),
        bits_per_byte=nll / num_bytes / math.log(2),
    )


def read_text(path: Path, num_bytes: int) -> str:
    """The beginning of a text file, or of the `text` of a .jsonl file's rows, one per line.

    Raises:
        UserError: the file cannot be read, or has no text.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would keep us waiting
            raise OSError("it is not a file")
        with path.open(encoding="utf-8") as file:
            if path.suffix == ".jsonl":
                rows, size = [], 0
                while size < num_bytes and (line := file.readline()):
                    rows.append(parse_json(line)["text"])
                    size += len(rows[-1].encode()) + 1
                text = "\n".join(rows)
            else:
                text = file.read(num_bytes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # TypeError: JSON of a list
        fix = 'a UTF-8 text, or a .jsonl file of {"text": ...}'
        raise UserError(f"{path} cannot be read as text: {error}", "eval.forgetting_text", fix) from error
    text = text.encode()[:num_bytes].decode(errors="ignore")
    if not text.strip():
        raise UserError(f"{path} has no text", "eval.forgetting_text", "name another file")
    return text
