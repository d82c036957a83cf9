"""What the checks before torch is imported find."""

import pytest

from speft_ds.errors import RecipeError
from speft_ds.jobs.preflight import check_inputs


def problems_of(recipe, world_size=1, needs_training_rows=True):
    with pytest.raises(RecipeError) as caught:
        check_inputs(recipe, world_size, needs_training_rows)
    return str(caught.value)
