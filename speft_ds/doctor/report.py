"""All checks, started at the same time, and the report of them."""

from __future__ import annotations

import platform
import sys
import time
from concurrent.futures import Future

from rich.console import Console
from rich.text import Text

from speft_ds import __version__
from speft_ds.doctor.build import check_compiler, check_ninja, check_shared_memory, check_shm_op
from speft_ds.doctor.check import Check
from speft_ds.doctor.collective import check_collectives
from speft_ds.doctor.folders import check_caches
from speft_ds.doctor.gpus import check_gpus, list_gpus, uses_gpus
from speft_ds.doctor.limits import check_limits, check_memory_and_cores, check_slurm
from speft_ds.doctor.network import check_hub
from speft_ds.doctor.packages import check_deepspeed, check_packages, check_python, check_torch
from speft_ds.doctor.processes import ask, in_thread

DEADLINE_S = 300  # of the whole report; each process has a shorter one
TORCH_S, HUB_S = 180, 60  # most of it is the import, which takes long on a busy machine
COLORS = {"ok": "green", "warning": "yellow", "problem": "bold red", "skipped": "dim"}


def examine() -> list[Check]:
    """Check everything, at the same time where that is possible; returns within DEADLINE_S seconds."""
    deadline = time.monotonic() + DEADLINE_S
    asked, listed = in_thread(lambda: ask("torch", TORCH_S)), in_thread(list_gpus)
    facts = asked.result  # waited for in the threads that need it
    groups = {
        "python": check_python,
        "packages": check_packages,
        "torch": lambda: check_torch(facts()),
        "GPUs": lambda: check_gpus(facts(), *listed.result()),
        "deepspeed": lambda: check_deepspeed(facts()),
        "compiler": check_compiler,
        "ninja": check_ninja,
        "shared-memory op": lambda: check_shm_op(facts()),
        "/dev/shm": lambda: check_shared_memory(uses_gpus(facts())),
        "hub": lambda: check_hub(ask("hub", HUB_S)),
        "caches": lambda: check_caches(facts()),
        "memory": check_memory_and_cores,
        "limits": lambda: check_limits(uses_gpus(facts())),
        "collectives": lambda: check_collectives(facts()),
        "SLURM": check_slurm,
    }
    started = {name: in_thread(check) for name, check in groups.items()}
    return [check for name, future in started.items() for check in _outcome(name, future, deadline)]


def print_report(checks: list[Check]) -> None:
    """Print one line a check, its fix below it, and a verdict; in colour on a terminal, else plain text."""
    width = max((len(check.name) for check in checks), default=0) + 2
    console = Console(highlight=False, force_terminal=sys.stdout.isatty())  # FORCE_COLOR is not for files

    def line(text: str, mark: str = "", style: str = "") -> None:
        console.print(Text.assemble((mark, style), text), soft_wrap=True)

    line(f"speft doctor: speft_ds {__version__}, {platform.platform()}")
    for check in checks:
        line(f"{check.name:<{width}}{check.what}", f"{check.status:<9}", COLORS[check.status])
        if check.fix:
            line(f"{'':<{9 + width}}fix: {check.fix}")
    line("", _verdict(checks), "bold")


def exit_code(checks: list[Check]) -> int:
    """1 where there is a problem, else 0: a warning does not fail."""
    return int(any(check.status == "problem" for check in checks))


def _verdict(checks: list[Check]) -> str:
    problems, warned = (sum(check.status == status for check in checks) for status in ("problem", "warning"))
    answer = f"NOT ready: {_count(problems, 'problem')} to fix" if problems else "ready to run"
    return f"verdict: {answer}; {_count(warned, 'warning')}"


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def _outcome(name: str, future: Future, deadline: float) -> list[Check]:
    """The checks of a group; a group that fails or hangs becomes a problem, so that there is a report."""
    try:
        return future.result(timeout=max(0.0, deadline - time.monotonic()))
    except TimeoutError:
        return [Check(name, "problem", "no answer in time", "look for network drives that do not answer")]
    except Exception as error:
        return [Check(name, "problem", f"could not be checked: {error!r}", "report it with this text")]
