"""The states of a rank's random generators (dropout), in its part of a checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor

from speft_ds.comm import collectives
from speft_ds.training.checkpoint.folder import Checkpoint
from speft_ds.training.checkpoint.parts import Parts


def random_states() -> dict[str, Tensor]:
    """Name -> state of this rank's generators, uint8."""
    states = {"random_cpu": torch.get_rng_state()}
    if collectives.device().type == "cuda":
        states["random_cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(checkpoint: Checkpoint) -> None:
    """Set this rank's states, where as many ranks wrote the checkpoint. All else draws by seed and step.

    Raises:
        UserError: a state is missing, or of another size.
    """
    if checkpoint.manifest["world_size"] != collectives.world_size():
        return
    parts = Parts(checkpoint)
    with parts.refusing(RuntimeError):  # of a state of another size
        own = parts.own(collectives.rank())
        torch.set_rng_state(own["random_cpu"])
        if "random_cuda" in own and collectives.device().type == "cuda":
            torch.cuda.set_rng_state(own["random_cuda"])
