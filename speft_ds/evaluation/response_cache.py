"""A cache of the untouched base's responses: later runs on the same base need not compute them again."""

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
    """Responses to lists of requests, in files named by a hash of all that the responses depend on.

    The requests are part of the hash, and so are the prompts, few-shot examples and documents in them.

    Args:
        settings: of the model and how it is run: fingerprint, dtype, batch size, device, versions.
    Attributes:
        num_calls, num_hits: calls of `get`, and those that a file answered.
    """

    def __init__(self, settings: dict[str, Any]):
        self.settings = json.dumps(settings, sort_keys=True)
        self.num_calls = self.num_hits = 0

    def path(self, method: str, requests: list[tuple]) -> Path:
        """The file for the responses to these requests."""
        digest = hashlib.sha256(f"{self.settings}\n{method}\n".encode())
        for request in requests:
            digest.update(json.dumps(request, sort_keys=True, default=repr).encode() + b"\n")
        return cache_folder("answers") / f"{digest.hexdigest()}.json"

    def get(self, method: str, requests: list[tuple], compute: Callable[[], list]) -> list:
        """The responses, read from the file or computed and written; every rank calls this together."""
        path = self.path(method, requests)
        found = collectives.broadcast_object(read(path, len(requests)) if collectives.rank() == 0 else None)
        self.num_calls += 1
        if found is not None:
            self.num_hits += 1
            return [tuple(response) if isinstance(response, list) else response for response in found]
        responses = compute()
        collectives.run_on_rank0(lambda: write_json(path, {"settings": self.settings, "answers": responses}))
        return responses

    @property
    def has_everything(self) -> bool:
        """Whether nothing had to be computed."""
        return 0 < self.num_calls == self.num_hits


def read(path: Path, count: int) -> list | None:
    """The responses in a file; None where there is no such file, or it is damaged."""
    try:
        responses = json.loads(path.read_text(encoding="utf-8"))["answers"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return responses if isinstance(responses, list) and len(responses) == count else None
