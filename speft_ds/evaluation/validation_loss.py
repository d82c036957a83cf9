"""Loss on rows that are not trained on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from speft_ds.comm import collectives, watchdog
from speft_ds.data.collate import collate
from speft_ds.data.dataset import TokenizedDataset


class ValidationLoss:
    """The mean loss per label token (per row for a classifier) on rows that are the same on every rank.

    They are cut into batches of `batch_size`, which do not depend on the number of ranks.
    """

    def __init__(self, rows: TokenizedDataset, batch_size: int, pad_id: int):
        self.rows, self.batch_size, self.pad_id = rows, batch_size, pad_id

    @torch.no_grad()
    def measure(self, module: nn.Module, loss: Callable[[nn.Module, dict[str, Tensor]], Tensor]) -> float:
        """The loss with the current weights: the same on every rank, and for any number of ranks.

        Every rank runs the same number of forwards, as ZeRO-3 demands.

        Args:
            loss: (module, batch) -> summed loss.
        """
        rank, world_size, device = collectives.rank(), collectives.world_size(), collectives.device()
        rows, size = sorted(self.rows, key=lambda row: -len(row.ids)), self.batch_size
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        sums = torch.zeros(len(batches), dtype=torch.float64, device=device)
        was_training = module.training
        module.eval()
        for first in range(0, len(batches), world_size):
            watchdog.heartbeat(f"validation batch {first + 1} of {len(batches)}")
            number = first + rank
            batch = batches[number] if number < len(batches) else batches[0][:1]
            value = loss(module, collate(batch, self.pad_id, device))
            if number < len(batches):
                sums[number] = value
        module.train(was_training)
        # On the CPU: summed in the same order for any number of ranks.
        total = collectives.all_reduce(sums).cpu().sum().item()
        return total / sum(row.num_labels for row in rows)
