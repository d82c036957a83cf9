"""Forward and backward over the calibration set, and what is summed of it, sharded like the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from speft_ds.comm import collectives, watchdog
from speft_ds.data.collate import collate
from speft_ds.data.dataset import Row
from speft_ds.errors import UserError
from speft_ds.model.kinds.target import Target
from speft_ds.model.weight_grad_hooks import WeightGradHook, weight_grad_hooks
from speft_ds.sparse.kernels.torch_backends import matmul_fp32
from speft_ds.zero.engine import SparseEngine
from speft_ds.zero.shards import shard_numel, shard_range

Scores = dict[str, Tensor]
# (labels [rows, tokens], x [rows, tokens, in], grad_y [rows, tokens, out]) -> dense [out, in]
Dense = Callable[..., Tensor]


@dataclass
class CalibrationSet:
    """The rows that scores are computed from, in batches of a fixed composition.

    The batches are the same at every world size, and so is what is summed over them.

    Attributes:
        may_stop: whether a rank that is asked to stop stops here. Between steps it may; within one, what the
            steps before have learnt would be lost.
    """

    rows: list[Row]  # in order; cut into batches of `batch_size`
    batch_size: int
    pad_id: int  # any token id, see `collate.collate`
    may_stop: bool = False

    @property
    def num_labels(self) -> int:
        return sum(row.num_labels for row in self.rows)

    def batches(self) -> Iterator[tuple[dict[str, Tensor], bool]]:
        """This rank's batches, dealt in order; where there is none, a filler and False.

        Every rank gets the same number, since each takes part in every collective.
        """
        size = self.batch_size
        batches = [self.rows[start : start + size] for start in range(0, len(self.rows), size)]
        rank, world_size = collectives.rank(), collectives.world_size()
        for first in range(0, len(batches), world_size):
            watchdog.heartbeat(f"calibration, batch {first + 1} of {len(batches)}")
            if self.may_stop:
                collectives.raise_if_stop_requested()
            mine = first + rank < len(batches)
            batch = batches[first + rank] if mine else batches[0]
            yield collate(batch, self.pad_id, collectives.device()), mine


@dataclass
class Scorer:
    """What a salience metric may look at."""

    engine: SparseEngine  # over the frozen base; its weights are those of the moment
    targets: dict[str, Target]  # weight name -> adapted target
    recipe: object  # the `mask` section of a recipe
    seed: int  # of this scoring (a later one of the same run has another)
    calibration: CalibrationSet | None  # None where the recipe gives no rows: only for metrics without data
    loss: Callable[[nn.Module, dict[str, Tensor], float], Tensor]  # (module, batch, temperature) -> token sum

    def device_of(self, target: Target) -> torch.device:
        """Where the scores of this weight are kept: with its shard, or in host memory."""
        return torch.device("cpu") if self.recipe.score_device == "host" else target.device

    def gradient(self, temperature: float = 1.0) -> Scores:
        """Gradient of the mean token loss over the calibration set, of this rank's shards.

        The logits are divided by `temperature`.
        """
        scale = 1.0 / self.rows().num_labels
        return self.accumulate(lambda labels, *factors: weight_gradient(*factors), scale, temperature)

    def rows(self) -> CalibrationSet:
        """The calibration set. Raises UserError where there is none."""
        if self.calibration is None:
            raise UserError(
                f"{self.recipe.salience} needs calibration data, and there is none",
                where="mask.salience",
                fix="set data.path or mask.calibration_path, or choose a metric without data: magnitude",
            )
        return self.calibration

    def accumulate(self, dense: Dense, scale: float = 1.0, temperature: float = 1.0) -> Scores:
        """Sum `dense(labels, *factors)` of every target over the calibration batches of all ranks.

        Args:
            dense: what one backward of one layer contributes, from the factors that its hook is called with
                (see `WeightGradHook`); the loss is the batch's summed token loss times `scale`.
        Returns:
            weight -> [local elements] fp32 sum, this rank's shard of it. The weights do not change.
        Raises:
            UserError: there are no calibration rows.
        """
        sums = {n: ShardSum(target.numel, self.device_of(target)) for n, target in self.targets.items()}
        batch: dict[str, Tensor] = {}

        def make_hook(total: ShardSum) -> WeightGradHook:
            return lambda *factors: total.add(dense(batch["labels"], *factors))

        with weight_grad_hooks(self.targets, {name: make_hook(total) for name, total in sums.items()}):
            for batch, mine in self.rows().batches():
                loss = self.loss(self.engine.module, batch, temperature)
                (loss * (scale if mine else 0.0)).backward()
                self.engine.after_plain_backward()
        return {name: total.value for name, total in sums.items()}

    def input_squares(self, targets: dict[str, Target]) -> Scores:
        """weight -> [1, in] fp32: sum of the squares of each input, over the calibration set's tokens.

        Of a stack of experts [experts, in], each over its own tokens, in batches of one row; of the head over
        the tokens that predict a label. The batches are added in order, whichever rank had them, so the bits
        are those of one rank.
        """
        parts: dict[str, list[Tensor]] = {name: [] for name in targets}
        for batch, mine in self.rows().batches():
            length = batch["input_ids"].shape[1]
            is_real = (torch.arange(length) < batch["lengths"][:, None]).flatten().to(collectives.device())

            def add(name: str, *factors: Tensor, is_real=is_real, mine=mine) -> None:
                is_swapped = targets[name].rows_are_inputs
                parts[name].append(_squares(*factors, is_real=is_real, is_swapped=is_swapped) * mine)

            with weight_grad_hooks(targets, {name: partial(add, name) for name in targets}):
                self.loss(self.engine.module, batch, 1.0).backward()
                self.engine.after_plain_backward()
        return {name: _in_order(torch.stack(of_rank)) for name, of_rank in parts.items()}


def _squares(
    columns: Tensor, rows: Tensor, ends: Tensor | None = None, *, is_real: Tensor, is_swapped: bool
) -> Tensor:
    """[1 or experts, in] summed squares of a layer's inputs in one backward.

    Args:
        columns, rows, ends: as a `WeightGradHook` is called with.
        is_real: [tokens] of the batch, whether it is no padding.
        is_swapped: whether the rows are the inputs.
    """
    x, grad_y = (rows, columns) if is_swapped else (columns, rows)
    squares = x.reshape(-1, x.shape[-1]).float().square()
    if ends is not None:
        return torch.stack([squares[a:b].sum(0) for a, b in pairwise([0, *ends.tolist()])])
    if len(squares) != len(is_real):  # the head's: it sees the tokens from about the first label on
        is_real = grad_y.reshape(-1, grad_y.shape[-1]).any(1)
    return (squares * is_real[:, None]).sum(0, keepdim=True)


def _in_order(parts: Tensor) -> Tensor:
    """The sum over ranks of [batches of a rank, ...], as if one rank had added all batches in order."""
    size = collectives.world_size()
    by_rank = torch.stack(collectives.all_gather_padded(parts.reshape(-1), [parts.numel()] * size))
    total = parts.new_zeros(parts.shape[1:])
    for part in by_rank.view(size, *parts.shape).transpose(0, 1).flatten(0, 1):
        total += part
    return total


def weight_gradient(x: Tensor, grad_y: Tensor, ends: Tensor | None = None) -> Tensor:
    """The dense [out, in] gradient of a linear's weight from x [..., in] and grad_y [..., out]: fp32.

    On a CPU in bfloat16 it is rounded to bfloat16, as autograd's is: torch has no product with an fp32
    result there but that of fp32 copies. Sums over batches and ranks are fp32 all the same.

    Args:
        ends: [experts] of a stack: where each expert's tokens end; the gradients are on top of each other.
    """
    if ends is not None:
        bounds = [0, *ends.tolist()]
        return torch.cat([weight_gradient(x[a:b], grad_y[a:b]) for a, b in pairwise(bounds)])
    x, grad_y = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1])
    return matmul_fp32(grad_y.t(), x) if x.is_cuda else grad_y.t() @ x


class ShardSum:
    """A sum over ranks and batches of dense [out, in] values of one weight, kept as this rank's shard.

    The dense values of one layer are alive at a time. Ranks' contributions are added in rank order, and
    calibration batches are dealt to ranks in order, so their sum runs over the batches in one and the
    same order at every world size.

    Args:
        numel: elements of the weight.
        device: where the sum is kept.
    """

    def __init__(self, numel: int, device: torch.device):
        world_size = collectives.world_size()
        self.size = shard_numel(numel, world_size)
        self.padding = self.size * world_size - numel
        start, stop = shard_range(numel, collectives.rank(), world_size)
        self.value = torch.zeros(stop - start, dtype=torch.float32, device=device)

    def add(self, dense: Tensor) -> None:
        """Add every rank's dense [out, in] contribution; all ranks call this together."""
        dense = dense.reshape(-1)
        if self.padding:
            dense = torch.cat([dense, dense.new_zeros(self.padding)])
        contributions = collectives.all_to_all(dense.view(-1, self.size))
        total = self.value.to(contributions.device)  # where the sum is in host memory, it comes and goes once
        for contribution in contributions:
            total += contribution[: total.numel()]
        if total is not self.value:
            self.value.copy_(total)
