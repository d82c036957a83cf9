"""A method beside the floor, taking turns: times, losses and bytes; and whether it trained at all.

Imports no torch.
"""

from __future__ import annotations

from statistics import median

from groups import Case, Failure, Group, say

WARM_UP = 2
OVER_FLOOR = ("step_over_floor", "cpu_over_floor", "peak_over_floor", "saved_over_floor")
# Of ours alone.
SIZES = ("state_bytes", "adapter_bytes")
SENT = ("sent_bytes", "sent_weights_bytes")
TIMES = ("step_ms", "floor_ms", "rounds_ms")
# The part of one process's fall of the loss that may be missing: in bfloat16, peers under DeepSpeed round
# their adapters, which PEFT keeps in float32.
MAY_MISS = {"float32": 0.02, "bfloat16": 0.5}


class Runner:
    """A group at work.

    Attributes:
        seconds: of every timed step, of its slowest rank; cpu_seconds: of the rank that computed longest.
        losses: of every step.
        facts: what the method says of itself.
    """

    def __init__(self, group: Group):
        self.group = group
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.losses: list[float] = []
        self.facts = self.ask("ready")
        for _ in range(WARM_UP):
            self.losses.append(self.ask("step")["loss"])

    def ask(self, order: str) -> dict:
        """The ranks' answers as one: the largest of each value."""
        answers = self.group(order)
        return {name: max(answer[name] for answer in answers) for name in answers[0]}

    def step(self) -> None:
        answer = self.ask("step")
        self.losses.append(answer["loss"])
        self.seconds.append(answer["seconds"])
        self.cpu_seconds.append(answer["cpu_seconds"])

    def count(self) -> dict[str, int]:
        """Bytes by kind, of the rank that has most; takes two steps."""
        counted = self.ask("count_saved")
        self.losses.append(counted.pop("loss"))
        counted |= self.ask("count_peak")
        self.losses.append(counted.pop("loss"))
        return counted


class Floor:
    """The frozen lower bound, alive while methods are measured beside it; use it in a `with` block.

    Raises:
        Failure: it does not run.
    """

    def __init__(self, case: Case, world_size: int, limit_s: float):
        self.case, self.world_size, self.limit_s = case, world_size, limit_s

    def __enter__(self) -> Floor:
        self.group = Group("floor", self.case, self.world_size, self.limit_s).__enter__()
        try:
            self.runner = Runner(self.group)
            self.counted = self.runner.count()
        except BaseException:
            self.group.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.group.__exit__()

    def own_row(self) -> dict:
        """The row of the floor itself, after all rounds beside it."""
        over = dict.fromkeys(OVER_FLOOR, 1.0)
        sent = {key: self.counted[key] for key in SENT}
        seconds = self.runner.seconds
        return self._row("floor") | self.runner.facts | over | sent | times(seconds, seconds)

    def measure(self, method: str, rounds: int, case: Case | None = None, name: str | None = None) -> dict:
        """The row of a method; one that fails has its error in it, and no figures.

        Args:
            rounds: of one step of the floor and one of the method; ratios are of medians of the same rounds.
            case: of the method, where it is not the floor's.
            name: of the row, where it is not the method's.
        """
        row, start = self._row(name or method), len(self.runner.seconds)
        with Group(method, case or self.case, self.world_size, self.limit_s) as group:
            try:
                runner = Runner(group)
                for number in range(rounds):
                    for one in (self.runner, runner) if number % 2 else (runner, self.runner):
                        one.step()
                counted = runner.count()
            except Failure as failure:
                say(f"{method}, {self.world_size} rank(s): {failure}\n{failure.details}")
                return {**row, "error": str(failure)}
        row["num_trainable"] = runner.facts["num_trainable"]
        row |= times(runner.seconds, self.runner.seconds[start:])
        row |= {"step_over_floor": row["step_ms"] / row["floor_ms"], "losses": runner.losses}
        row["cpu_over_floor"] = median(runner.cpu_seconds) / median(self.runner.cpu_seconds[start:])
        for what in ("peak", "saved"):
            row[f"{what}_over_floor"] = counted[f"{what}_bytes"] / self.counted[f"{what}_bytes"]
        row |= {key: counted[key] for key in SENT}
        row |= {key: runner.facts.get(key) for key in SIZES}
        say(
            f"{method}, {self.world_size} rank(s): {row['step_over_floor']:.3f} x the floor's "
            f"{row['floor_ms']:.0f} ms"
        )
        wrong = does_not_fall(runner.losses)
        return failed(row, wrong) if wrong else row

    def _row(self, method: str) -> dict:
        num_weights = self.runner.facts["num_weights"]
        return {**empty_row(method, self.world_size), "num_weights": num_weights}


def times(seconds: list[float], floor: list[float]) -> dict:
    """Medians, and every round."""
    each = [1000 * value for value in seconds]
    return {"step_ms": median(each), "floor_ms": 1000 * median(floor), "rounds_ms": each}


def empty_row(method: str, world_size: int, error: str | None = None) -> dict:
    """A row without figures."""
    figures = dict.fromkeys(("num_trainable", "num_weights", *OVER_FLOOR, *SENT, *SIZES, *TIMES))
    return {"method": method, "world_size": world_size, **figures, "losses": [], "error": error}


def failed(row: dict, error: str) -> dict:
    """A row whose figures are worth nothing."""
    return {**row, **dict.fromkeys((*OVER_FLOOR, *SENT, *SIZES, *TIMES)), "error": error}


def does_not_fall(losses: list[float]) -> str | None:
    """What is wrong with losses on one batch, that many steps were made for."""
    if losses[-1] < losses[0]:
        return None
    return f"trains nothing: the loss goes from {losses[0]:.5f} to {losses[-1]:.5f}"


def differs_from_alone(row: dict, alone: dict, dtype: str) -> str | None:
    """What is wrong with a method on several ranks, which should train as it does in one process.

    Args:
        alone: its row of one process.
    """
    if row["num_trainable"] != alone["num_trainable"]:
        return f"trains {row['num_trainable']:,} weights, in one process {alone['num_trainable']:,}"
    here, there = row["losses"], alone["losses"]
    missing = max(one - other for one, other in zip(here, there, strict=True))
    if missing <= MAY_MISS[dtype] * (there[0] - there[-1]):
        return None
    return (
        f"does not train as in one process: the loss goes from {here[0]:.5f} to {here[-1]:.5f}, "
        f"there from {there[0]:.5f} to {there[-1]:.5f}"
    )
