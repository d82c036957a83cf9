"""What a search varies: keys of a recipe, each with a range or with choices. Imports no torch.

`KEY=LOW..HIGH` is a range, by its logarithm where it spans a decade; `KEY=A,B,C` are choices.
"""

from __future__ import annotations

from collections.abc import Sequence

import yaml
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from speft_ds.config import limited_yaml
from speft_ds.config.load_recipe import as_override, guess_key, load_recipe
from speft_ds.config.recipe import FIELDS, Recipe
from speft_ds.errors import RecipeError, UserError

Space = dict[str, BaseDistribution]
DECADE = 10.0  # of a range, from which on it is drawn from by its logarithm
# What trials must have in common to be compared.
FIXED = ("output_dir", "seed", "train.steps", "train.epochs", "eval.")


def default_space(recipe: Recipe) -> list[str]:
    """What is varied unless anything else is asked for: as it would be typed."""
    lr, mask = recipe.optimizer.lr, recipe.mask
    texts = [f"optimizer.lr={lr / 10:g}..{lr * 10:g}"]
    if mask.load is not None or not recipe.method.has_mask:
        return texts
    if mask.density is not None:
        texts.append(f"mask.density={mask.density / 4:g}..{min(mask.compute or 1.0, mask.density * 4):g}")
    else:
        texts.append(f"mask.num_trainable={max(1, mask.num_trainable // 4)}..{mask.num_trainable * 4}")
    salience = dict.fromkeys([mask.salience, "gradient", "low_magnitude"])
    return [*texts, f"mask.salience={','.join(salience)}"]


def read_space(texts: Sequence[str], name: str, overrides: Sequence[str]) -> Space:
    """The keys of `KEY=VALUES` texts, each with its range or choices.

    Args:
        name, overrides: of the recipe, that must take every choice and both ends of every range.
    Raises:
        RecipeError: all that is wrong with the texts.
    """
    space, problems = {}, []
    for text in texts:
        key, _, written = text.partition("=")
        where = f"command line: --over {text}"
        try:
            if key in space:
                raise UserError(f"{key} is given twice", where, "keep one")
            space[key] = _distribution(key, written, where)
            for value in _ends(space[key]):
                load_recipe(name, [*overrides, *as_overrides({key: value})])
        except RecipeError as error:
            problems += [UserError(each.what, where, each.fix) for each in error.problems]
        except UserError as error:
            problems.append(error)
    if problems:
        raise RecipeError(problems, "search")
    return space


def _distribution(key: str, written: str, where: str) -> BaseDistribution:
    if key not in FIELDS:
        raise UserError(f"unknown key {key}", where, guess_key(key))
    if key.startswith(FIXED):
        what = f"{key} is the same for all trials, or they could not be compared"
        raise UserError(what, where, f"leave it out, or set it for all of them: {key}=...")
    low, dots, high = written.partition("..")
    if dots:
        try:
            number = int if low.strip("-").isdigit() and high.strip("-").isdigit() else float
            ends = number(low), number(high)
            is_log = ends[0] > 0 and ends[1] >= DECADE * ends[0]
            return (IntDistribution if number is int else FloatDistribution)(*ends, log=is_log)
        except ValueError:
            fix = f"two numbers, the lower one first, like {key}=1e-4..1e-2"
            raise UserError(f"{written!r:.100} is not a range", where, fix) from None
    try:
        values = limited_yaml.load(f"[{written}]")
    except (yaml.YAMLError, ValueError):
        values = []
    if not values:
        fix = f"a range, {key}=LOW..HIGH, or choices, {key}=A,B; a list among them in brackets"
        raise UserError(f"{written!r:.100} names no values", where, fix)
    # As texts: Optuna stores no lists.
    return CategoricalDistribution([as_override("", value)[1:] for value in values])


def _ends(values: BaseDistribution) -> Sequence[object]:
    return values.choices if isinstance(values, CategoricalDistribution) else (values.low, values.high)


def as_overrides(params: dict[str, object]) -> list[str]:
    """`key=value` of each, a float with three digits."""
    return [
        f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in params.items()
    ]
