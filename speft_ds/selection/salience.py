"""Scores of the weights, sharded like the weights: which entries are worth training.

One function a metric, registered by its name. It gets a `Scorer` and returns, for each targeted weight,
the fp32 scores of this rank's shard (padding left out); the highest are chosen. w: the weight; g: the
gradient of the mean token loss over the calibration set, summed over all batches and ranks before all else.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from speft_ds.comm import collectives
from speft_ds.config.mask_config import CHANGE_WEIGHTS
from speft_ds.data.collate import IGNORED
from speft_ds.errors import UserError
from speft_ds.model.fingerprint import mix64
from speft_ds.model.kinds.quantised import QuantisedTarget
from speft_ds.model.kinds.target import Target
from speft_ds.model.quantise import dense_weights, plain_parameters
from speft_ds.model.weight_grad_hooks import weight_grad_hooks
from speft_ds.selection.calibration import Scorer, Scores, weight_gradient
from speft_ds.selection.synflow import absolute_weights, linear_network
from speft_ds.zero.shards import changing_shards, global_norm, shard_numel

SALIENCE: dict[str, Callable[[Scorer], Scores]] = {}
GRASP_TEMPERATURE = 200.0  # Wang et al., "Picking Winning Tickets Before Training", section 4
GRASP_PROBE = 2.0**-18  # length of a first difference step over that of the weights
GRASP_CHANGE = 2.0**-7  # relative change of the gradient over the step taken; the error is about its square
TINY = 1e-8  # keeps a quotient finite where the weight is exactly zero


def metric(function: Callable[[Scorer], Scores]) -> Callable[[Scorer], Scores]:
    """Register a metric under its function's name."""
    SALIENCE[function.__name__] = function
    return function


def score(scorer: Scorer) -> Scores:
    """The scores that `mask.salience` asks for. Weights are bit-identical afterwards.

    Raises:
        UserError: the metric needs data and there is none; or what the metric itself raises.
    """
    metric = SALIENCE[scorer.recipe.salience]
    if scorer.recipe.salience not in CHANGE_WEIGHTS:
        return metric(scorer)
    with dense_weights(scorer.engine.module):
        scorer.engine.forget_trace()
        scores = metric(scorer)
    scorer.engine.forget_trace()
    return scores


def own_weights(scorer: Scorer) -> Scores:
    """Fp32 copies of this rank's shards, where scores are kept."""
    return {
        name: target.own_values().to(scorer.device_of(target), torch.float32, copy=True)
        for name, target in scorer.targets.items()
    }


def combine(function: Callable[[Tensor, Tensor], Tensor], one: Scores, two: Scores) -> Scores:
    """`function` of both, weight by weight; both are used up, so that one set of scores stays alive."""
    return {name: function(one.pop(name), two.pop(name)) for name in list(one)}


@metric
def gradient(scorer: Scorer) -> Scores:
    """abs(g). SPEFT (Refining Salience-Aware Sparse Fine-Tuning Strategies, 2024)."""
    return {name: value.abs_() for name, value in scorer.gradient().items()}


@metric
def magnitude(scorer: Scorer) -> Scores:
    """abs(w), no data. Han et al., Learning both Weights and Connections, 2015."""
    return {name: value.abs_() for name, value in own_weights(scorer).items()}


@metric
def low_magnitude(scorer: Scorer) -> Scores:
    """-abs(w), no data: the smallest weights, which GaLLoP argues carry least of what the base knows."""
    return {name: value.abs_().neg_() for name, value in own_weights(scorer).items()}


@metric
def snip(scorer: Scorer) -> Scores:
    """abs(w * g): change of the loss when w goes to zero, to first order. SNIP, Lee et al., 2019."""
    return combine(lambda w, g: g.mul_(w).abs_(), own_weights(scorer), scorer.gradient())


@metric
def force(scorer: Scorer) -> Scores:
    """-w * g: weights whose removal would raise the loss. FORCE, de Jorge et al., 2021 (skeletonization)."""
    return combine(lambda w, g: g.mul_(w).neg_(), own_weights(scorer), scorer.gradient())


@metric
def taylor_fo(scorer: Scorer) -> Scores:
    """(w * g)^2: squared first-order Taylor term. Molchanov et al., 2019. The same order as `snip`."""
    return combine(lambda w, g: g.mul_(w).square_(), own_weights(scorer), scorer.gradient())


@metric
def grad_low_magnitude(scorer: Scorer) -> Scores:
    """abs(g) / (abs(w) + 1e-8): large gradient, small weight. GaLLoP, Choudhary et al., 2025.

    The quotient, not the product of ranks: ranks would need a sort of all the model's scores, while a
    quotient is local to a shard, and orders the weights of equal gradient as the ranks do.
    """
    return combine(lambda w, g: g.abs_().div_(w.abs_().add_(TINY)), own_weights(scorer), scorer.gradient())


@metric
def fisher(scorer: Scorer) -> Scores:
    """Mean over samples of g_s^2, g_s the gradient of sample s's own mean token loss.

    The diagonal of the empirical Fisher information: FISH mask, Sung et al., 2021. The gradients are taken
    one sample at a time within a layer's backward: g_s = grad_y[s]^T x[s] / labels of s. Where a layer sees
    the tokens of several samples mixed (experts), a batch has one.
    """
    num_samples = len(scorer.rows().rows)

    def squares(labels: Tensor, x: Tensor, grad_y: Tensor, *ends: Tensor) -> Tensor:
        # A class is one label a row.
        counts = (labels != IGNORED).sum(1).tolist() if labels.dim() == 2 else [1] * len(labels)
        samples = [(x, grad_y, *ends)] if len(labels) == 1 else zip(x, grad_y, strict=True)
        total = None
        for count, factors in zip(counts, samples, strict=True):
            sample = weight_gradient(*factors).float().div_(count)
            total = torch.zeros_like(sample) if total is None else total
            total.addcmul_(sample, sample, value=1.0 / num_samples)
        return total

    return scorer.accumulate(squares)


@metric
def synflow(scorer: Scorer) -> Scores:
    """abs(w * dR/dw), R = sum of the logits of the net with abs weights on one all-ones input. No data.

    SynFlow, Tanaka et al., 2020. The net is linear in each weight: activations pass their input on, norms
    only scale by the factor that they have at this input. One token is enough, since attention averages
    over equal tokens; for the same reason query and key weights score zero, exactly.
    """
    model, found = scorer.engine.module, {}

    def keep(name: str, target: Target, *factors: Tensor) -> None:
        start, stop = target.own_range  # every rank has the same gradient: keep our part
        own = weight_gradient(*factors).reshape(-1)[start:stop]
        found[name] = own.to(scorer.device_of(target), torch.float32)

    hooks = {name: partial(keep, name, target) for name, target in scorer.targets.items()}
    in_training = model.training
    model.eval()
    try:
        with (
            weight_grad_hooks(scorer.targets, hooks),
            absolute_weights(plain_parameters(model)),
            linear_network(model) as all_ones,
        ):
            model(inputs_embeds=all_ones, use_cache=False).logits.float().sum().backward()
            scorer.engine.after_plain_backward()
    finally:
        model.train(in_training)
    return combine(lambda w, g: g.mul_(w).abs_(), own_weights(scorer), found)


@metric
def grasp(scorer: Scorer) -> Scores:
    """w * (H g), H and g of the loss at temperature 200: weights that carry the gradient's flow.

    GraSP, Wang et al., 2020 (whose score, -w H g, is the one to remove the highest of). H g is the central
    difference of gradients, (g(w + e g) - g(w - e g)) / 2e, over the targeted weights, since double
    backward is not dependable under ZeRO-3. A first small step tells how fast the gradient changes, and e is
    chosen by that: a step relative to the weights that suits one model is noise on another. e is a power of
    two, the same at every world size.

    Raises:
        UserError: the gradient vanishes.
    """
    direction = scorer.gradient(GRASP_TEMPERATURE)
    saved = own_weights(scorer)
    length, size = norm(direction), norm(saved)
    if length == 0:
        raise UserError("the calibration gradient is zero", "mask.salience=grasp", "look at the rows")
    step = 2.0 ** round(math.log2(GRASP_PROBE * size / length))
    try:
        set_weights(scorer, saved, direction, step)
        change = norm(combine(Tensor.sub_, scorer.gradient(GRASP_TEMPERATURE), dict(direction))) / length
        step *= 2.0 ** round(math.log2(GRASP_CHANGE / change)) if change else 1.0
        set_weights(scorer, saved, direction, step)
        product = scorer.gradient(GRASP_TEMPERATURE)
        set_weights(scorer, saved, direction, -step)
        product = combine(Tensor.sub_, product, scorer.gradient(GRASP_TEMPERATURE))
    finally:
        set_weights(scorer, saved, direction, 0.0)
    return combine(lambda w, hg: hg.mul_(w).div_(2 * step), saved, product)


def norm(values: Scores) -> float:
    """L2 norm over all weights and ranks: that of the weights' norms."""
    by_weight = [torch.linalg.vector_norm(value, dtype=torch.float64) for value in values.values()]
    return global_norm(torch.stack(by_weight).to(collectives.device()))


@torch.no_grad()
def set_weights(scorer: Scorer, origin: Scores, direction: Scores, step: float) -> None:
    """Set this rank's fp32 shards to origin + step * direction; step 0 is exact."""
    with changing_shards([weight for target in scorer.targets.values() for weight in target.written]):
        for name, target in scorer.targets.items():
            target.own_values().copy_(origin[name] + direction[name] * step if step else origin[name])


@metric
def quant_error(scorer: Scorer) -> Scores:
    """E[x_j^2] (w_ij - q_ij)^2: what the output of a layer loses by the weight's few bits, entry by entry.

    x_j: an input of the layer; q: the decoded weight. OWQ, Lee et al., 2024, whose weak columns are
    `mask.granularity=column` with it. A weight that is stored as it is loses nothing.

    Raises:
        UserError: no target is in few bits.
    """
    in_few_bits = {n: target for n, target in scorer.targets.items() if isinstance(target, QuantisedTarget)}
    if not in_few_bits:
        what = "none of the targets is in few bits: every entry would score 0"
        raise UserError(what, "mask.salience=quant_error", "mask.targets=null, or another mask.salience")
    num_tokens = sum(len(row.ids) for row in scorer.rows().rows)
    squares, scores = scorer.input_squares(in_few_bits), {}
    for name, target in scorer.targets.items():
        start, stop = target.own_range
        device = scorer.device_of(target)
        if name not in squares:
            scores[name] = torch.zeros(stop - start, device=device)
            continue
        mean = own_inputs(squares[name] / num_tokens, target)
        error = target.own_error().to(mean.device)
        scores[name] = error.square_().mul_(mean).to(device)
    return scores


@metric
def wanda(scorer: Scorer) -> Scores:
    """abs(w_ij) * norm(x_j), x_j the j-th inputs of all calibration tokens. Wanda, Sun et al., 2024, eq. 1.

    There it ranks the weights of one output against each other: `mask.budget=per_row`.
    """
    norms, scores = scorer.input_squares(scorer.targets), own_weights(scorer)
    for name, target in scorer.targets.items():
        scores[name].abs_().mul_(own_inputs(norms.pop(name).sqrt_(), target).to(scores[name].device))
    return scores


def own_inputs(values: Tensor, target: Target) -> Tensor:
    """[local elements] of [1 or experts, in] values of a weight's inputs, that of each element's input."""
    rows, columns = target.shape
    index = torch.arange(*target.own_range, device=values.device)
    row, column = index // columns, index % columns
    if target.rows_are_inputs:
        return values.view(-1)[row]
    return values[row // (rows // len(values)), column]


@metric
def random(scorer: Scorer) -> Scores:
    """Uniform in [0, 1), a function of (seed, weight name, global index) alone: the control. No data."""
    return {
        name: uniform(scorer.seed, name, *target.own_range, scorer.device_of(target))
        for name, target in scorer.targets.items()
    }


def uniform(seed: int, name: str, start: int, stop: int, device: torch.device) -> Tensor:
    """[stop - start] fp32 in [0, 1) with 24 random bits, by counter: no generator state, no order."""
    key = zlib.crc32(f"{seed} {name}".encode())
    counter = torch.arange(start, stop, dtype=torch.int64, device=device)
    bits = mix64(mix64(counter + (key << 31)) + key) >> 8 & 0xFFFFFF
    return bits.to(torch.float32) / 2**24


@metric
def lift(scorer: Scorer) -> Scores:
    """abs(W_r), W_r the best approximation of W of rank `mask.lift_rank`. LIFT, Liu et al., 2025. No data.

    A round takes one weight a rank: its shards are sent to that rank, approximated there, and the scores
    sent back. So each rank holds one gathered weight at a time.
    """
    names, scores = list(scorer.targets), {}
    rank, world_size = collectives.rank(), collectives.world_size()
    for first in range(0, len(names), world_size):
        round_names, mine = names[first : first + world_size], None
        for owner, name in enumerate(round_names):
            weight = scorer.targets[name].gather(owner)
            if weight is not None:
                mine = low_rank_shards(weight, world_size, scorer.recipe.lift_rank)
        for owner, name in enumerate(round_names):
            target = scorer.targets[name]
            size = shard_numel(target.numel, world_size)
            own = collectives.scatter(mine if owner == rank else None, owner, size)
            start, stop = target.own_range
            scores[name] = own[: stop - start].to(scorer.device_of(target))
    return scores


def low_rank_shards(weight: Tensor, world_size: int, rank: int) -> Tensor:
    """[..., out, in] a weight -> [world_size, shard] abs(its rank-r approximation), fp32, as it is sharded.

    Of a stack [experts, out, in], each expert is approximated by itself.
    """
    size = shard_numel(weight.numel(), world_size)
    scores = weight.new_zeros(size * world_size, dtype=torch.float32)
    matrices = weight.reshape(-1, *weight.shape[-2:])
    found = torch.cat([low_rank(matrix, rank).abs().reshape(-1) for matrix in matrices])
    scores[: weight.numel()] = found
    return scores.view(world_size, size)


def low_rank(weight: Tensor, rank: int) -> Tensor:
    """The best rank-r approximation (Eckart-Young) of a [out, in] weight, computed in fp64.

    W_r = U_r U_r^T W, U_r the leading eigenvectors of W W^T: several times cheaper than a full SVD.
    """
    wide = weight if weight.shape[0] <= weight.shape[1] else weight.t()
    wide = wide.double()
    leading = torch.linalg.eigh(wide @ wide.t()).eigenvectors[:, -rank:]
    approximation = leading @ (leading.t() @ wide)
    return approximation if wide.shape == weight.shape else approximation.t()
