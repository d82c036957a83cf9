"""Files of low-rank matrices that are not what they should be."""

import pytest
import torch
from safetensors.torch import save_file

from speft_ds.adapter.low_rank import PEFT_TENSORS, LowRankMatrices
from speft_ds.io import sha256_of

MODULE = "base_model.model.layers.0.q"
A, B = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"
GOOD = {A: torch.ones(2, 6), B: torch.ones(4, 2)}


def matrices(folder, tensors):
    save_file(tensors, folder / PEFT_TENSORS)
    facts = {"rank": 2, "scaling": 0.5, "sha256": sha256_of(folder / PEFT_TENSORS)}
    return LowRankMatrices(folder, facts)


def test_good_ones_are_read(tmp_path):
    found = matrices(tmp_path, GOOD)
    assert found.shape == {"layers.0.q.weight": (4, 6)}
    assert torch.equal(found.merged("layers.0.q.weight", torch.zeros(4, 6)), torch.ones(4, 6))


@pytest.mark.parametrize(
    "damage",
    [
        {A: torch.ones(2, 6).to(torch.float8_e4m3fn)},
        {A: torch.ones(2, 6, dtype=torch.int64)},
        {A: torch.full((2, 6), torch.nan)},
        {A: torch.ones(3, 6)},
        {A: torch.ones(12)},
        {"other.weight": torch.ones(2)},
        {f"{MODULE}.lora_magnitude_vector": torch.ones(5)},
    ],
)
def test_others_are_refused(tmp_path, damage):
    with pytest.raises(ValueError):
        matrices(tmp_path, GOOD | damage)
