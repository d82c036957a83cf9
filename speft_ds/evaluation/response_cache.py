"""Answers of the untouched base, kept: the next run on it need not ask again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from speft_ds.comm import collectives
from speft_ds.env import cache_folder
from speft_ds.io import write_json


class ResponseCache:
    """Answers to lists of requests, in files named by all that they depend on.

    The requests themselves are part of the name: prompts, few-shot examples and documents of another
    version of a task, or of its data, have other answers.

    Args:
        settings: of the model and how it is run: fingerprint, dtype, batch size, device, versions.
    Attributes:
        num_found, num_asked: calls that were answered from here; and in all.
    """

    def __init__(self, settings: dict[str, Any]):
        self.settings = json.dumps(settings, sort_keys=True)
        self.num_found = self.num_asked = 0

    def path(self, method: str, arguments: list[tuple]) -> Path:
        """Where the answers to these requests are, or would be."""
        digest = hashlib.sha256(f"{self.settings}\n{method}\n".encode())
        for each in arguments:
            digest.update(json.dumps(each, sort_keys=True, default=repr).encode() + b"\n")
        return cache_folder("answers") / f"{digest.hexdigest()}.json"

    def get(self, method: str, arguments: list[tuple], compute: Callable[[], list]) -> list:
        """The answers, from the file or else computed and written; every rank enters this together."""
        path = self.path(method, arguments)
        found = collectives.broadcast_object(read(path, len(arguments)) if collectives.rank() == 0 else None)
        self.num_asked += 1
        if found is not None:
            self.num_found += 1
            return [tuple(answer) if isinstance(answer, list) else answer for answer in found]
        answers = compute()
        collectives.run_on_rank0(lambda: write_json(path, {"settings": self.settings, "answers": answers}))
        return answers

    @property
    def all_found(self) -> bool:
        """Whether nothing had to be computed."""
        return 0 < self.num_asked == self.num_found


def read(path: Path, count: int) -> list | None:
    """The answers of a file; None where there is none, or it is damaged."""
    try:
        answers = json.loads(path.read_text(encoding="utf-8"))["answers"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return answers if isinstance(answers, list) and len(answers) == count else None
