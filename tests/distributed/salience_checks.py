"""What each rank does in the tests of scores: against dense ones, and that scoring leaves nothing behind."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from distributed import dense_scores
from distributed.dense_scores import Llama, Weights
from distributed.reference import make_trainer, plain_model, whole_weights
from speft_ds.comm import collectives
from speft_ds.config.mask_config import NEEDS_DATA
from speft_ds.config.recipe import Recipe
from speft_ds.data.dataset import Row
from speft_ds.data.sampler import permutation
from speft_ds.errors import UserError
from speft_ds.model.fingerprint import fingerprint
from speft_ds.selection.calibration import Scorer
from speft_ds.selection.salience import score
from speft_ds.training.setup import choose_mask, make_scorer
from speft_ds.training.trainer import Trainer
from speft_ds.zero.shards import shard_of

# What fp32 makes of a gradient and of all that is computed from it, relative to the largest of its weight.
# Seen: 1.1e-6; the hand-written forward is in fp64.
ROUNDING = 5e-6
# Relative to the largest score of all weights. Two errors of central differences meet here: one falls with
# the square of the step; the other, fp32's rounding of two almost equal gradients, grows as the step shrinks.
# Seen, at the step where the gradient changes by about 1%: 2.3e-4.
GRASP_ERROR = 5e-4
LIFT_RANK = 3

# score of weight w with gradient g; the error that an error of g makes grows with abs(g)
OF_GRADIENT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gradient": lambda w, g: g.abs(),
    "snip": lambda w, g: (w * g).abs(),
    "force": lambda w, g: -w * g,
    "taylor_fo": lambda w, g: (w * g) ** 2,
    "grad_low_magnitude": lambda w, g: g.abs() / (w.abs() + 1e-8),
}


def calibration_rows(trainer: Trainer) -> list[Row]:
    """The rows that a run calibrates on."""
    recipe = trainer.recipe
    order = permutation(len(trainer.rows), recipe.seed, "calibration")
    return [trainer.rows[number] for number in order[: recipe.mask.calibration_samples]]


def scorer_of(trainer: Trainer, **changes) -> Scorer:
    """The run's scorer with other keys in its mask section; metrics without data get none."""
    scorer = make_scorer(trainer.context)
    mask = scorer.recipe.model_copy(update={"lift_rank": LIFT_RANK, **changes})
    calibration = scorer.calibration if mask.salience in NEEDS_DATA else None
    return replace(scorer, recipe=mask, calibration=calibration)


def bits(tensor: Tensor) -> Tensor:
    """A copy of the tensor's bits: two zeros of unlike sign differ."""
    return tensor.detach().clone().view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().view(torch.uint8)


def never(x: Tensor, grad_y: Tensor) -> None:
    raise AssertionError("a sink of training was fed while scoring")


@contextmanager
def untouched(trainer: Trainer) -> Iterator[None]:
    """What runs inside leaves the weights' bits, the sinks, the modules and their modes as they were."""
    model, sinks = trainer.engine.module, {name: partial(never) for name in trainer.targets}
    before = {name: as_bytes(shard_of(parameter)) for name, parameter in model.named_parameters()}
    modes = [(module.training, vars(module).get("forward")) for module in model.modules()]
    for name, linear in trainer.targets.items():
        linear.weight_grad_hook = sinks[name]
    yield
    for name, linear in trainer.targets.items():
        assert linear.weight_grad_hook is sinks[name], f"{name}: another sink"
        linear.weight_grad_hook = None
    for (name, module), mode in zip(model.named_modules(), modes, strict=True):
        assert (module.training, vars(module).get("forward")) == mode, f"{name}: another mode or forward"
    for name, parameter in model.named_parameters():
        assert torch.equal(as_bytes(shard_of(parameter)), before[name]), f"{name}: the shard changed"
    if not trainer.context.quantised:
        assert fingerprint(model) == trainer.context.fingerprint, "another fingerprint"
    whole = whole_weights(model)  # what the next forward would see: no copy of changed weights is left
    for name, parameter in plain_model(trainer.recipe).named_parameters():
        assert torch.equal(bits(whole[name]), bits(parameter)), f"{name}: a stale copy"


def input_squares(trainer: Trainer, rows: list[Row]) -> Weights:
    """weight -> [in] sum of the squares of each input, by hooks on a plain model, a row at a time."""
    model, inputs = plain_model(trainer.recipe), {}
    for name in trainer.targets:
        module = model.get_submodule(name.removesuffix(".weight"))
        module.register_forward_pre_hook(lambda _, args, n=name: inputs.update({n: args[0]}))
    squares = dict.fromkeys(trainer.targets, 0.0)
    for row in rows:
        model(input_ids=torch.tensor([row.ids]))
        predicts = torch.tensor([*row.loss_mask[1:], False])
        for name in squares:
            seen = inputs[name][0, predicts] if name == "lm_head.weight" else inputs[name][0]
            squares[name] = squares[name] + seen.detach().double().square().sum(0)
    return squares


def lost_by_few_bits(trainer: Trainer, llama: Llama, rows: list[Row]) -> Weights:
    """Mean square of each input times what the weight lost, squared."""
    name_or_path, num_tokens = trainer.recipe.model.name_or_path, sum(len(row.ids) for row in rows)
    original = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=torch.float32)
    before = {name: weight.detach() for name, weight in original.named_parameters()}
    lost = {name: (before[name] - weight.detach()).square() for name, weight in llama.targets.items()}
    return {n: lost[n] * square / num_tokens for n, square in input_squares(trainer, rows).items()}


def expected_scores(trainer: Trainer, metric: str, llama: Llama, rows: list[Row]) -> tuple[Weights, Weights]:
    """The scores in fp64, and how far fp32 ones may be from them, of whole weights."""
    weights = {name: weight.detach() for name, weight in llama.targets.items()}
    if metric in OF_GRADIENT:
        function, scores, slack = OF_GRADIENT[metric], {}, {}
        for name, gradient in llama.gradient(rows).items():
            scores[name] = function(weights[name], gradient)
            off = gradient.abs() + ROUNDING * gradient.abs().max()
            slack[name] = function(weights[name], off).abs() - scores[name].abs() + 1e-6 * scores[name].abs()
        return scores, slack
    if metric in ("magnitude", "low_magnitude"):
        sign = {"magnitude": 1, "low_magnitude": -1}[metric]
        return {n: sign * w.abs() for n, w in weights.items()}, {n: 0 * w for n, w in weights.items()}
    if metric == "lift":
        scores = dense_scores.lift(llama, LIFT_RANK)  # 1e-7 each: both are in fp64 and rounded to fp32
        return scores, {name: 1e-7 * s + 1e-12 for name, s in scores.items()}
    if metric == "wanda":
        squares = input_squares(trainer, rows)
        scores = {n: weight.abs() * squares[n].sqrt() for n, weight in weights.items()}
        return scores, {name: 1e-5 * s + ROUNDING * s.max() for name, s in scores.items()}
    if metric == "quant_error":
        scores = lost_by_few_bits(trainer, llama, rows)
        return scores, {name: 1e-5 * s + ROUNDING * s.max() for name, s in scores.items()}
    scores = getattr(dense_scores, metric)(llama, rows)
    largest = {name: s.abs().max() for name, s in scores.items()}
    if metric == "grasp":
        return scores, dict.fromkeys(scores, GRASP_ERROR * max(largest.values()))
    return scores, {name: ROUNDING * most for name, most in largest.items()}  # synflow: of no flow, exactly 0


def compare(trainer: Trainer, got: dict[str, Tensor], expected: Weights, slack: Weights) -> None:
    """This rank's scores against its part of whole weights' expected ones."""
    assert list(got) == list(trainer.targets), list(got)
    for name, linear in trainer.targets.items():
        mine = slice(*linear.own_range)
        assert got[name].dtype == torch.float32 and got[name].numel() == mine.stop - mine.start, name
        error = (got[name].cpu().double() - expected[name].reshape(-1)[mine]).abs()
        allowed = slack[name].expand_as(expected[name]).reshape(-1)[mine]
        assert bool((error <= allowed).all()), (
            f"{name}: {float((error / allowed).max())} times what is allowed"
        )


def check_scores(recipe: Recipe, metrics: list[str]) -> None:
    """Scores equal dense ones, and scoring changes nothing; `score_device=host` gives the same scores."""
    trainer = make_trainer(recipe)
    trainer.engine.module.train()  # without dropout it computes the same, and has to be found so again
    llama, rows = Llama(plain_model(recipe), list(trainer.targets)), calibration_rows(trainer)
    for metric in metrics:
        with untouched(trainer):
            scores = score(scorer_of(trainer, salience=metric))
        try:
            compare(trainer, scores, *expected_scores(trainer, metric, llama, rows))
        except AssertionError as error:
            raise AssertionError(f"{metric}: {error}") from error
        on_host = score(scorer_of(trainer, salience=metric, score_device="host"))
        for name, value in scores.items():
            assert on_host[name].device.type == "cpu" and torch.equal(on_host[name], value.cpu()), metric


class Interrupted(Exception):
    pass


def failing_at(scorer: Scorer, call: int) -> Scorer:
    """The scorer, whose loss raises when it is computed for the `call`-th time, counted from 1."""
    calls = []

    def loss(module, batch, temperature=1.0):
        calls.append(None)
        value = scorer.loss(module, batch, temperature)
        if len(calls) == call:
            raise Interrupted
        return value

    return replace(scorer, loss=loss)


def is_interrupted(scorer: Scorer) -> bool:
    """Whether scoring ends by `Interrupted`."""
    try:
        score(scorer)
    except Interrupted:
        return True
    return False


def check_interrupted(recipe: Recipe) -> None:
    """`grasp` with a loss that raises, `synflow` with a layer that raises: all is as it was.

    Scoring again afterwards gives what it gave before.
    """
    trainer = make_trainer(recipe)
    trainer.engine.module.train()
    scorers = {metric: scorer_of(trainer, salience=metric) for metric in ("grasp", "synflow")}
    scores = {metric: score(scorer) for metric, scorer in scorers.items()}
    call, again = 2, True
    while again:  # at every third batch: some in each of the gradients that are taken
        with untouched(trainer):
            again = is_interrupted(failing_at(scorers["grasp"], call))
        call += 3
    assert call >= 11, "to be interrupted at calls 2 and 5 at least"

    def interrupt(*_) -> None:
        raise Interrupted

    layers = trainer.engine.module.model.layers
    for module in (layers[0].self_attn.o_proj, layers[1].mlp.act_fn, trainer.engine.module.lm_head):
        hook = module.register_forward_hook(interrupt)
        with untouched(trainer):
            assert is_interrupted(scorers["synflow"]), "the module was not called"
        hook.remove()
    for metric, expected in scores.items():
        again = score(scorers[metric])
        assert all(torch.equal(again[name], value) for name, value in expected.items()), metric


def check_zero_gradient(recipe: Recipe) -> str:
    """The message of the UserError that `grasp` raises where the loss is flat; nothing has changed."""
    trainer = make_trainer(recipe)
    scorer = scorer_of(trainer, salience="grasp")
    flat = replace(scorer, loss=lambda *arguments: scorer.loss(*arguments) * 0.0)
    with untouched(trainer):
        try:
            score(flat)
        except UserError as error:
            return str(error)
    return ""


def check_bits(recipe: Recipe, changes: dict[str, dict]) -> dict[str, str]:
    """Hashes of the whole scores' bits with other keys in the mask section, by name."""
    trainer = make_trainer(recipe)
    hashes = {}
    for name, change in changes.items():
        digest = hashlib.sha256()
        for value in score(scorer_of(trainer, **change)).values():
            for piece in collectives.all_gather_objects(value.cpu().numpy().tobytes()):
                digest.update(piece)
        hashes[name] = digest.hexdigest()
    return hashes


def check_masks(recipe: Recipe, choices: dict[str, dict]) -> dict[str, str]:
    """The hashes of the masks that a run chooses with other keys in its mask section, by name."""
    trainer = make_trainer(recipe)
    masks = {}
    with untouched(trainer):
        for name, choice in choices.items():
            mask = recipe.mask.model_copy(update={"lift_rank": LIFT_RANK, **choice})
            context = replace(trainer.context, recipe=recipe.model_copy(update={"mask": mask}))
            masks[name] = choose_mask(context, trainer.timings)
    assert all(mask.num_trainable > 0 for mask in masks.values()), "an empty mask"
    return {name: mask.sha256 for name, mask in masks.items()}


def check_calibration(recipe: Recipe) -> list[str]:
    """The hashes of the first two masks that a run chooses, the second on fresh rows."""
    trainer = make_trainer(recipe)
    return [choose_mask(trainer.context, trainer.timings, number).sha256 for number in (0, 1)]
