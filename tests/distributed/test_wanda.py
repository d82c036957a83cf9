"""`wanda` of weights that are no plain linears: transposed ones, and experts with tokens of their own."""

import pytest
import torch
from families import make_family

from distributed.reference import make_recipe, make_trainer, plain_model
from speft_ds.comm import collectives
from speft_ds.config.recipe import Recipe
from speft_ds.data.sampler import permutation
from speft_ds.selection.salience import score
from speft_ds.training.setup import make_scorer

IS_TRANSPOSED = {"gpt2": True, "qwen3_moe": False, "gpt_oss": True}


def expected_scores(recipe: Recipe, rows: list, names: list[str]) -> dict[str, torch.Tensor]:
    """Of linears and of the experts' first weights, by the inputs of a plain model's modules."""
    model, seen, squares = plain_model(recipe), {}, {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda _, args, n=name: seen.update({n: args}))
    names = [name for name in names if not name.endswith("experts.down_proj")]
    for row in rows:
        model(input_ids=torch.tensor([row.ids]))
        for name in names:
            weight, args = model.get_parameter(name), seen[name.rpartition(".")[0]]
            x = args[0].detach().double().flatten(0, -2)
            if weight.dim() == 2:
                own = x.square().sum(0)
            else:  # args[1]: [tokens, k] the experts of each token
                own = torch.stack([x[(args[1] == e).any(1)].square().sum(0) for e in range(len(weight))])
            squares[name] = squares.get(name, 0.0) + own
    is_transposed = IS_TRANSPOSED[model.config.model_type]
    scores = {}
    for name, square in squares.items():
        weight = model.get_parameter(name).detach().double().abs()
        is_linear = isinstance(modules[name.rpartition(".")[0]], torch.nn.Linear)
        norms = square.sqrt().unsqueeze(-1 if is_transposed and not is_linear else -2)
        scores[name] = weight * norms
    return scores


def check_wanda(recipe: Recipe) -> int:
    trainer = make_trainer(recipe)
    order = permutation(len(trainer.rows), recipe.seed, "calibration")
    rows = [trainer.rows[number] for number in order[: recipe.mask.calibration_samples]]
    expected = expected_scores(recipe, rows, list(trainer.targets))
    for name, own in score(make_scorer(trainer.context)).items():
        found = torch.cat(collectives.all_gather_objects(own.cpu())).double()
        if name in expected:
            torch.testing.assert_close(found, expected[name].flatten(), rtol=1e-5, atol=1e-7)
        assert found.any(), name
    return len(expected)


@pytest.mark.parametrize("family", IS_TRANSPOSED)
def test_scores_of_a_family(ranks, tiny, tmp_path, family):
    base = make_family(tmp_path / "base", family)
    mask = {"salience": "wanda", "calibration_samples": 7, "calibration_batch": 3}
    recipe = make_recipe(tiny, tmp_path / "run", model={"name_or_path": str(base)}, mask=mask)
    assert min(ranks(2)(check_wanda, recipe=recipe)) >= 8
