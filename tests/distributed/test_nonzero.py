"""Masks of a pruned base against a dense choice among the weights that are not zero."""

import math
from dataclasses import replace

import pytest
import torch

from distributed.reference import make_trainer, whole_weights
from distributed.selection_checks import choose
from speft_ds.comm import collectives
from speft_ds.config.recipe import Recipe
from speft_ds.selection.salience import score
from speft_ds.training.setup import choose_mask, make_scorer

LOWEST = -math.inf
CHOICES = [
    {"salience": salience, "budget": budget, "density": density}
    # `low_magnitude` would choose zeros first, `force` before half of the others.
    for salience in ("gradient", "low_magnitude", "random", "force")
    for budget, density in (("global", 0.05), ("per_layer", 0.3), ("per_row", 0.1))
]


def check_masks(recipe: Recipe, choices: list[dict]) -> list[str]:
    """The hashes of the masks, each of which is the dense one."""
    trainer = make_trainer(recipe)
    context, hashes = trainer.context, []
    weights = whole_weights(trainer.engine.module)
    is_zero = {name: (weights[name] == 0).flatten().tolist() for name in context.shapes}
    for choice in choices:
        section = recipe.mask.model_copy(update=choice)
        made = replace(context, recipe=recipe.model_copy(update={"mask": section}))
        wanted = round(choice["density"] * sum(map(len, is_zero.values())))
        by_weight = []
        for name, own in score(make_scorer(made)).items():
            scores = torch.cat(collectives.all_gather_objects(own.cpu())).tolist()
            by_weight.append(
                [
                    (name, [i], LOWEST if zero else value)
                    for i, (value, zero) in enumerate(zip(scores, is_zero[name], strict=True))
                ]
            )
        expected = choose(by_weight, context.shapes, wanted, choice["budget"])
        mask = choose_mask(replace(made, num_trainable=wanted), trainer.timings)
        assert {name: index.tolist() for name, index in mask.index.items()} == expected, choice
        assert not any(is_zero[name][i] for name, chosen in expected.items() for i in chosen), choice
        hashes.append(mask.sha256)
    return hashes


@pytest.mark.parametrize("model", [{}, {"base_format": "nf4"}])
def test_no_zero_is_chosen(ranks, recipe, model):
    made = recipe("pruned", mask={"only_nonzero": True}, model=model)
    sizes = [size for size in (1, 2, 4) if not ranks.why_not(size)]
    answers = [each for size in sizes for each in ranks(size)(check_masks, recipe=made, choices=CHOICES)]
    assert all(answer == answers[0] for answer in answers)
