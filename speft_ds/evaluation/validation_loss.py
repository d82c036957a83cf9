"""The loss on rows that are not trained on."""

from __future__ import annotations

import torch

from speft_ds.comm import collectives, watchdog
from speft_ds.data.collate import collate
from speft_ds.training.setup import TrainContext


class ValidationLoss:
    """The held-out rows of a recipe.

    Args:
        base: with its training rows read: the classes of a classifier are theirs.
    Attributes:
        rows: tokenised, the same on every rank.
    """

    def __init__(self, base: TrainContext):
        self.base, recipe = base, base.recipe
        # All rows of the file, whatever is chosen of the training rows.
        changes = {"path": recipe.eval.validation, "mixture": None, "select": "all", "select_rows": None}
        section = recipe.data.model_copy(update={**changes, "labels": base.classes})
        self.rows = base.read_corpus(section, lambda number: recipe.where("eval.validation"))

    @torch.no_grad()
    def loss(self) -> float:
        """Mean loss a label token (a classifier's: a row), the same on every rank and any number of them.

        The rows are cut into batches of `eval.batch_size`, dealt over the ranks; each rank runs as many
        forwards as the others, as ZeRO-3 demands.
        """
        module, size = self.base.engine.module, self.base.recipe.eval.batch_size
        rank, world_size, device = collectives.rank(), collectives.world_size(), collectives.device()
        by_length = sorted(self.rows, key=lambda row: -len(row.ids))
        batches = [by_length[start : start + size] for start in range(0, len(by_length), size)]
        sums = torch.zeros(len(batches), dtype=torch.float64, device=device)
        was_training = module.training
        module.eval()
        for first in range(0, len(batches), world_size):
            watchdog.heartbeat(f"held-out batch {first + 1} of {len(batches)}")
            number = first + rank
            rows = batches[number] if number < len(batches) else batches[0][:1]
            value = self.base.loss(module, collate(rows, self.base.pad_id, device))
            if number < len(batches):
                sums[number] = value
        module.train(was_training)
        # Summed in one order whatever the number of ranks.
        total = collectives.all_reduce(sums).cpu().sum().item()
        return total / sum(row.num_labels for row in by_length)
