"""What selection decides before and within one rank: counts, quotas, keys and ties."""

import math
from fractions import Fraction

import pytest
import torch
from distributed.selection_checks import cut, shares
from hypothesis import given, settings
from hypothesis import strategies as st

from speft_ds.config.mask_config import MaskConfig
from speft_ds.errors import UserError
from speft_ds.selection.radix import sortable_key
from speft_ds.selection.topk import budget_counts, min_trainable, num_trainable, top_of_rows

SHAPE = st.tuples(st.integers(1, 40), st.integers(1, 40))
SHAPES = st.lists(SHAPE, min_size=1, max_size=5).map(lambda s: {f"w{i}": shape for i, shape in enumerate(s)})
UNITS = st.sampled_from(["element", "block", "row", "column"])
BUDGETS = st.sampled_from(["global", "per_layer", "per_row"])
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def numel(shapes: dict) -> dict[str, int]:
    return {name: rows * columns for name, (rows, columns) in shapes.items()}


@given(SHAPES, st.floats(1e-6, 1))
def test_a_density_is_one_of_the_targeted_weights(shapes, density):
    total = sum(numel(shapes).values())
    if round(density * total) == 0:
        with pytest.raises(UserError):
            num_trainable(MaskConfig(density=density), shapes)
    else:
        assert num_trainable(MaskConfig(density=density), shapes) == round(density * total)


def test_more_entries_than_there_are_is_refused():
    shapes = {"a": (3, 4), "b": (1, 5)}
    assert num_trainable(MaskConfig(num_trainable=17), shapes) == 17
    with pytest.raises(UserError) as caught:
        num_trainable(MaskConfig(num_trainable=18), shapes)
    assert "mask.num_trainable=17" in caught.value.fix


@pytest.mark.parametrize(
    ("choice", "least", "part"),
    [
        ({"density": 1e-4}, 1, "a single tile"),
        ({"num_trainable": 255, "granularity": "block"}, 256, "a single tile"),
        ({"density": 0.01, "granularity": "row"}, 100, "a single tile"),
        ({"num_trainable": 39, "granularity": "column"}, 40, "a single tile"),
        ({"num_trainable": 10, "budget": "per_layer"}, 11, "every layer"),
        ({"num_trainable": 881, "budget": "per_layer", "granularity": "row"}, 882, "every layer"),
        ({"num_trainable": 26, "budget": "per_row"}, 27, "every row"),
    ],
)
def test_too_few_for_all_parts_is_refused(choice, least, part):
    """Any tile; a tile of `small`, which has 410 of the 4,410 entries; more than half an entry of 82."""
    shapes = {"large": (40, 100), "small": (5, 82)}
    with pytest.raises(UserError) as caught:
        num_trainable(MaskConfig(**choice), shapes)
    assert caught.value.where == ("mask.density" if "density" in choice else "mask.num_trainable")
    assert part in caught.value.what and f"mask.num_trainable={least} at least" in caught.value.fix
    changed = MaskConfig(**{**choice, "density": None, "num_trainable": least})
    assert num_trainable(changed, shapes) == least


@given(SHAPES, UNITS, BUDGETS, st.integers(2, 50))
def test_the_least_gives_every_part_something_and_one_less_does_not(shapes, granularity, budget, block_size):
    if budget == "per_row":
        granularity = "element"
    size = {"block_size": block_size} if granularity == "block" else {}
    least = min_trainable(MaskConfig(granularity=granularity, budget=budget, **size), shapes)
    total = sum(numel(shapes).values())
    largest = {name: max(map(len, cut(shape, granularity, block_size))) for name, shape in shapes.items()}
    if budget == "global":
        assert least == max(largest.values())
    elif budget == "per_layer":
        counts = shares(list(numel(shapes).values()), least)
        assert all(count >= most for count, most in zip(counts, largest.values(), strict=True))
        assert any((least - 1) * numel(shapes)[name] < largest[name] * total for name in shapes)
    else:
        quotas = [round(Fraction(least * columns, total)) for _, columns in shapes.values()]
        assert min(quotas) >= 1
        assert min(round(Fraction((least - 1) * columns, total)) for _, columns in shapes.values()) == 0


@given(SHAPES, st.data())
def test_budgets_are_shared_by_size(shapes, data):
    sizes = numel(shapes)
    wanted = data.draw(st.integers(0, sum(sizes.values())))
    group, counts = budget_counts(sizes, "per_layer", wanted)
    assert [counts[group[name]] for name in sizes] == shares(list(sizes.values()), wanted)
    assert sum(counts) == wanted and all(counts[group[name]] <= sizes[name] for name in sizes)
    group, counts = budget_counts(sizes, "global", wanted)
    assert counts == [wanted] and set(group.values()) == {0} and list(group) == list(sizes)


@given(st.lists(FLOATS, min_size=1))
def test_keys_have_the_order_of_the_scores(values):
    keys = sortable_key(torch.tensor(values)).tolist()
    for value, key in zip(values, keys, strict=True):
        for other, other_key in zip(values, keys, strict=True):
            assert (value < other) == (key < other_key) and (value == other) == (key == other_key)


def test_keys_at_the_edges_of_fp32():
    ascending = [-math.inf, -3.4e38, -1.0, -(2.0**-149), 0.0, 2.0**-149, 1.0, 3.4e38, math.inf]
    keys = sortable_key(torch.tensor(ascending)).tolist()
    assert keys == sorted(set(keys)) and keys[4] == sortable_key(torch.tensor([-0.0])).item()


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.data())
def test_top_of_rows_is_a_sort_of_each(rows, columns, data):
    value = st.sampled_from([-2.0, -0.0, 0.0, 0.5, 2.0])  # few values: many ties
    scores = data.draw(st.lists(value, min_size=rows * columns, max_size=rows * columns))
    k = data.draw(st.integers(1, columns))
    chosen = top_of_rows(torch.tensor(scores).view(rows, columns), k)
    for row in range(rows):
        own = scores[row * columns :][:columns]
        best = sorted(range(columns), key=lambda column: (-own[column], column))[:k]
        assert chosen[row].nonzero()[:, 0].tolist() == sorted(best)
