"""Suggestions for a run that does not fit: changes that take less memory, and the fewest ranks that fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from speft_ds.tools.plan.memory_model import Setup, peak_bytes

MAX_RANKS = 4096
Change = tuple[str, Callable[[Setup], Setup]]  # what to type, and the setup after it


@dataclass(frozen=True)
class Suggestion:
    """A change that takes less memory: what to type, and the peak per rank after it."""

    change: str
    num_bytes: int


def smallest_world_size(setup: Setup, limit: int) -> int | None:
    """The fewest ranks that fit and share the global batch; None where no number does."""
    train = setup.recipe.train
    micro_batches = train.global_batch // train.micro_batch
    for ranks in range(1, min(micro_batches, MAX_RANKS) + 1):
        if micro_batches % ranks == 0 and peak_bytes(replace(setup, world_size=ranks)) <= limit:
            return ranks
    return None


def suggest(setup: Setup, num_bytes: int, limit: int, smallest: int | None) -> list[Suggestion]:
    """Changes that help, each by itself, best first; then, if none is enough, the first of them together.

    Args:
        num_bytes: what the setup needs; limit: what there is.
        smallest: the smallest world size.
    """
    helpful = []
    for text, change in _changes(setup, smallest):
        size = peak_bytes(change(setup))
        if size < 0.99 * num_bytes:
            helpful.append((size, text, change))
    helpful.sort(key=lambda one: one[0])
    found = [Suggestion(text, size) for size, text, _ in helpful]
    if not helpful or helpful[0][0] <= limit:
        return found
    together, texts, best = setup, [], num_bytes
    for _, text, change in helpful:
        size = peak_bytes(change(together))
        if size < best:
            together, best = change(together), size
            texts.append(text)
        if best <= limit:
            break
    return [*found, Suggestion(" ".join(texts), best)] if len(texts) > 1 else found


def _changes(setup: Setup, smallest: int | None) -> Iterator[Change]:
    """Everything that could take less memory with this recipe."""
    train, data, mask = setup.recipe.train, setup.recipe.data, setup.recipe.mask
    if smallest is not None and smallest > setup.world_size:
        yield _ranks(smallest)
    elif train.global_batch // train.micro_batch % (2 * setup.world_size) == 0:
        yield _ranks(2 * setup.world_size)
    if train.activation_checkpointing == "none":
        yield _keys({"train.activation_checkpointing": "non_reentrant"})
    one_row = {"train.micro_batch": 1} if train.micro_batch > 1 else {}
    if mask.needs_calibration and mask.calibration_batch > 1:
        one_row["mask.calibration_batch"] = 1
    if one_row:
        yield _keys(one_row)
    if data.max_length >= 64:
        yield _keys({"data.max_length": data.max_length // 2})
    if mask.is_scored and mask.score_device == "device" and setup.device == "cuda":
        yield _keys({"mask.score_device": "host"})
    if not setup.is_offloaded and setup.device == "cuda":
        yield _zero("offload_param.device=cpu", offload_param={"device": "cpu"})
    small = {"stage3_prefetch_bucket_size": 1_000_000, "stage3_max_reuse_distance": 0}
    yield _zero(", ".join(f"{key}={value}" for key, value in small.items()), **small)


def _ranks(number: int) -> Change:
    return f"--world {number}", lambda setup: replace(setup, world_size=number)


def _zero(text: str, **values) -> Change:
    """Keys of the DeepSpeed configuration set to values."""
    return f"DeepSpeed: {text}", lambda setup: replace(setup, zero={**setup.zero, **values})


def _keys(values: dict[str, object]) -> Change:
    """Recipe keys set to values."""

    def change(setup: Setup) -> Setup:
        recipe = setup.recipe
        for name, value in values.items():
            section, _, key = name.partition(".")
            changed = getattr(recipe, section).model_copy(update={key: value})
            recipe = recipe.model_copy(update={section: changed})
        return replace(setup, recipe=recipe)

    return " ".join(f"{name}={value}" for name, value in values.items()), change
