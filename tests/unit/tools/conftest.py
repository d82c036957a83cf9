import pytest
from tiny import make_model

from speft_ds.config.recipe import Recipe


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(model, tmp_path):
    """A function: sections that differ -> a recipe."""

    def make(**sections) -> Recipe:
        values = {
            "model": {"name_or_path": str(model), "dtype": "float32"},
            "data": {"path": str(tmp_path / "rows.jsonl"), "max_length": 16},
            "mask": {"num_trainable": 301},
            "train": {"global_batch": 12, "micro_batch": 2, "epochs": 3.0},
            "deepspeed": {"config": "zero3_cpu"},
        }
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section}
        return Recipe.model_validate(values)

    return make
