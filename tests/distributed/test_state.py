"""A run that is taken up from its state is the uninterrupted run, bit for bit, under every schedule."""

import pytest

from distributed import state_checks
from distributed.reference import make_recipe

PERIODIC = {"schedule": "periodic", "update_every": 4}
SFT_AG = {"schedule": "drop_grow", "growth": "sft_ag", "update_every": 5, "growth_steps": 3}
CASES = {  # mask section, step to stop after
    "static": ({}, 4),
    "periodic before its first change": (PERIODIC, 3),
    "periodic after two changes": (PERIODIC, 9),
    "sft_ag between windows": (SFT_AG, 6),
    "sft_ag within a window": (SFT_AG, 9),
    "sft_ma": ({"schedule": "drop_grow", "growth": "sft_ma", "update_every": 4}, 6),
    "grad_topk": ({"schedule": "grad_topk", "topk_fraction": 0.3}, 5),
    "sampled": ({"layer_gate": "sampled", "gate_layers": 1, "gate_every": 3}, 4),
    "half and periodic": ({**PERIODIC, "layer_gate": "half", "gate_every": 3}, 7),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_resumed_is_uninterrupted(ranks, tiny, tmp_path, case, dtype):
    mask, stop = CASES[case]
    recipe = make_recipe(tiny, tmp_path, mask=mask, model={"dtype": dtype}, train={"steps": 14})
    changes = ranks(2)(state_checks.check_resume, recipe=recipe, stop=stop)[0]
    assert len(changes) == {"periodic": 3, "drop_grow": 3 if "sft_ma" in case else 2}.get(
        mask.get("schedule"), 0
    )
