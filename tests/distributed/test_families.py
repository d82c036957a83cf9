"""Families of models: a dozen here, all that build tiny by `make sweep`, which writes docs/models.md."""

import pytest
from families import TESTED_FAMILIES, make_family

from distributed.family_checks import check_family
from distributed.reference import make_recipe

ONE_STEP = {
    "mask": {"density": 0.05, "calibration_samples": 4},
    "optimizer": {"name": "sgd", "lr": 1.0, "warmup_steps": 0, "clip_norm": None},
    "train": {"steps": 1, "global_batch": 8, "micro_batch": 2},
}
COPIES = ("applied", "merged", "gathered")
LOWEST_COVERAGE = {"mamba": 0.85}
REFUSED = {"bert": "not causal"}


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("families"), {}

    def make(name: str):
        if name not in made:
            made[name] = make_family(folder / name, name)
        return made[name]

    return make


@pytest.mark.parametrize("name", TESTED_FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_family_trains_as_autograd_says_and_is_one_model(ranks, family, tiny, tmp_path, name, dtype):
    """On 2 ranks; `make sweep` has them on 1, too."""
    model = {"name_or_path": str(family(name)), "dtype": dtype}
    recipe = make_recipe(tiny, tmp_path, model=model, **ONE_STEP)
    found = ranks(2)(check_family, recipe=recipe)[0]
    if name in REFUSED:
        assert REFUSED[name] in found["refused"]
        return
    assert found["gradient_error"] < (1e-5 if dtype == "float32" else 0.05), found
    assert all(found[copy] for copy in COPIES), found
    assert found["coverage"] > LOWEST_COVERAGE.get(name, 0.9), found
