"""Asking what can crash or hang: in processes with a time limit, in threads that nobody has to wait for."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Literal

TOOL_S = 20


def run_tool(command: list[str], timeout_s: float = TOOL_S) -> tuple[str, str | None]:
    """A command's output, and None or the reason why it failed."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    try:
        done = subprocess.run(command, **pipes, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as late:
        return (late.stdout or b"").decode(errors="replace"), f"no answer in {timeout_s:g} s"
    except OSError as error:
        return "", str(error)
    output, messages = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    return output, why_failed(done.returncode, messages or output) if done.returncode else None


def why_failed(code: int, messages: str) -> str:
    """Why a process failed: the signal, the last line that looks like an error, or the last line."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = [line.strip() for line in messages.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror:|\w(Error|Exception)\b", line)]
    return (errors or lines or [f"exit code {code}"])[-1][:300]


def probe_command(*arguments: str) -> list[str]:
    """The command that runs a part of `probes.py`."""
    return [sys.executable, "-m", "speft_ds.doctor.probes", *arguments]


def ask(topic: Literal["torch", "hub"], timeout_s: float) -> dict:
    """What a Python process of its own finds out about a topic; `error` says why something is missing."""
    output, error = run_tool(probe_command(topic), timeout_s)
    facts = {"error": error} if error else {}
    for line in output.splitlines():
        if line.startswith('{"'):  # libraries print lines of their own
            facts |= json.loads(line)
    return facts


def in_thread(function: Callable) -> Future:
    """Start the function; its thread does not keep this process alive, whatever it hangs on."""
    future = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future
