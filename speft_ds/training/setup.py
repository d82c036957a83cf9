"""What a job works with: its rows, the sharded base on its engine, and the mask that is chosen for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from speft_ds.comm import collectives
from speft_ds.config.deepspeed_config import load_ds_config
from speft_ds.config.model_config import HEAD
from speft_ds.config.recipe import Recipe
from speft_ds.data.sampler import hash_seed
from speft_ds.env import log_rank0
from speft_ds.errors import UserError
from speft_ds.model.attention import FlashInputs, check_device
from speft_ds.model.fingerprint import fingerprint
from speft_ds.model.kinds import find_weights
from speft_ds.model.kinds.parameter import ParameterTarget
from speft_ds.model.kinds.target import Target
from speft_ds.model.linear_cross_entropy import find_head_loss
from speft_ds.model.load_model import fill_head, load_base
from speft_ds.model.longrope import rotate_by_row
from speft_ds.model.loss import NextToken, RowClass
from speft_ds.model.low_rank import LowRank, num_elements
from speft_ds.model.new_tokens import NewTokens, add_tokens
from speft_ds.model.quantise import load_config, quantise
from speft_ds.model.targets import (
    all_weights,
    target_shapes,
    weight_elements,
)
from speft_ds.model.weight_grad_hooks import weight_grad_hooks
from speft_ds.selection.calibration import CalibrationSet, Scorer
from speft_ds.selection.columns import confine
from speft_ds.selection.nonzero import require_nonzero, select_nonzero
from speft_ds.selection.salience import score
from speft_ds.selection.topk import select
from speft_ds.selection.units import Units, find_units, parts_of, select_units
from speft_ds.sparse.kernels.costs import KernelCosts
from speft_ds.sparse.mask import Mask
from speft_ds.sparse.storage import InPlace, Overlay, storage_of
from speft_ds.training.low_rank import linears_beside, make_low_rank, num_entries
from speft_ds.training.metrics import Timings
from speft_ds.training.run_data import RunData, classifies
from speft_ds.training.trained_weights import find_trained, keep_reached
from speft_ds.zero.engine import SparseEngine, build_engine
from speft_ds.zero.shards import stack_size


@dataclass(frozen=True)
class TrainContext:
    """A recipe's model, sharded by ZeRO-3 and frozen, on its engine; nothing trains yet.

    Attributes:
        targets: weight name -> weight that may have entries; `shapes`: weight name -> (rows, columns).
        whole: weight name -> weight that is trained whole: by the method, `mask.dense`, a classifier's head.
        new_tokens: of which rows are trained beside the mask.
        mixes_rows: whether the gradient of a target cannot be told apart by rows, as that of experts.
        num_trainable: entries that are asked for, over all ranks; what a selection comes to may differ by
            the rounding of tiles and row quotas.
        units: the heads or channels that are chosen among; None: others are.
        fingerprint: of the weights as they are loaded.
        fingerprint_bfloat16: of the weights rounded to bfloat16: one for all dtypes that a checkpoint may be
            loaded in.
        quantised: names of the weights that are in `model.base_format`.
        low_rank: the matrices beside frozen linears, all of which are in `whole`.
        objective: (module, batch, temperature) -> summed loss, and the number of correct classes or None.
        costs: what `train.sparse_backend: auto` chooses by, the same on all ranks; None: rules of thumb.
    """

    recipe: Recipe
    data: RunData
    engine: SparseEngine
    targets: dict[str, Target]
    whole: dict[str, Target]
    new_tokens: NewTokens
    shapes: dict[str, tuple[int, int]]
    mixes_rows: bool
    num_trainable: int
    units: list[Units] | None
    fingerprint: str
    fingerprint_bfloat16: str
    quantised: list[str]
    objective: NextToken | RowClass
    costs: KernelCosts | None = None
    low_rank: LowRank | None = None

    @property
    def trained(self) -> dict[str, Target]:
        return self.targets | self.new_tokens.targets | self.whole

    def storage(self, name: str, target: Target) -> InPlace | Overlay:
        """Where the entries of a weight live."""
        is_new = name in self.new_tokens.targets
        return storage_of(target, self.new_tokens.num_pretrained if is_new else None)

    def with_new_rows(self, mask: Mask) -> Mask:
        """A mask with the rows of new tokens behind its entries."""
        return mask.with_rows(self.new_tokens.rows, target_shapes(self.new_tokens.targets))

    @property
    def whole_of_base(self) -> dict[str, Target]:
        """What is trained whole, without low-rank matrices."""
        added = self.low_rank.targets if self.low_rank else {}
        return {name: target for name, target in self.whole.items() if name not in added}

    @cached_property
    def order(self) -> list[str]:
        """The names of what is trained in the order of the model."""
        return [name for name in weight_elements(self.engine.module) if name in self.trained]

    @property
    def num_stacked(self) -> dict[str, int]:
        """Weight that is a stack -> matrices on top of each other: experts."""
        sizes = {name: stack_size(target.weight) for name, target in self.trained.items()}
        return {name: size for name, size in sizes.items() if size is not None}

    def loss(self, module: nn.Module, batch: dict[str, Tensor], temperature: float = 1.0) -> Tensor:
        """Summed loss of a batch; `module` is the engine or its module."""
        return self.objective(module, batch, temperature)[0]


def load_context(
    recipe: Recipe,
    data: RunData,
    loaded: Mask | None = None,
    trains: bool = True,
    costs: KernelCosts | None = None,
) -> TrainContext:
    """Load the weights, sharded, and build the engine.

    Args:
        loaded: the mask to train, which says what the targets are; None to choose by the recipe.
        trains: False for a job that takes no steps: the recipe's batch does not matter then.
        costs: see `TrainContext`.
    Raises:
        UserError: the model cannot be loaded, or does not fit the recipe.
    """
    train, ds_config = recipe.train, load_ds_config(recipe, collectives.world_size(), trains)
    base_format = recipe.model.base_format
    model, head = _load_model(recipe, data, load_config(ds_config) if base_format else ds_config)
    own = fingerprint(model)
    rounded = own if recipe.model.dtype == "bfloat16" else fingerprint(model, torch.bfloat16)
    quantised = []
    if base_format is not None:
        quantised = quantise(model, base_format, ds_config, recipe.mask.needs_original)
    new = add_tokens(model, data.tokenizer, recipe.model.add_tokens or [], ds_config)
    targets, whole = find_trained(model, loaded, new, recipe)
    whole |= head
    linears, rank = linears_beside(model, targets, loaded, recipe)
    low_rank = make_low_rank(model, linears, rank, recipe, ds_config) if linears and trains else None
    whole |= low_rank.targets if low_rank else {}
    _note_noise(model)
    if train.activation_checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": train.activation_checkpointing == "reentrant"})
    trained = [*(targets | whole | new.targets).values()]
    written = [weight for target in trained for weight in target.written]
    keep = recipe.deepspeed.keep_unpartitioned
    engine = build_engine(model, ds_config, written, recipe.walks_all_layers, keep)
    _adapt(all_weights(model) | head, trained, train.activation_checkpointing == "none")
    targets, whole, reach = keep_reached(engine, targets, whole, loaded, recipe, low_rank)
    shapes = target_shapes(targets)
    units = None
    if recipe.mask.of_units and recipe.mask.is_scored:
        units = find_units(engine.module, targets, recipe.mask.granularity)
    entries = num_entries(recipe, loaded, shapes, num_elements(linears, rank), parts_of(units))
    if recipe.mask.only_nonzero and recipe.mask.is_scored:
        require_nonzero(targets, shapes, entries, recipe.mask.budget)
    return TrainContext(
        recipe=recipe,
        data=data,
        engine=engine,
        targets=targets,
        whole=whole,
        new_tokens=new,
        shapes=shapes,
        mixes_rows=not reach.mixed.isdisjoint(targets),
        num_trainable=entries,
        units=units,
        fingerprint=own,
        fingerprint_bfloat16=rounded,
        quantised=quantised,
        objective=_make_objective(engine, recipe),
        costs=costs,
        low_rank=low_rank,
    )


def _adapt(weights: dict[str, Target], trained: list[Target], recomputes_input: bool) -> None:
    """Have the modules of weights call hooks, but for those whose gradient autograd makes.

    All, not what is trained alone: torch's own linear would keep the gathered weight until its backward.
    """
    by_autograd = {id(target.weight) for target in trained if isinstance(target, ParameterTarget)}
    for target in weights.values():
        if id(target.weight) not in by_autograd:
            target.adapt(recomputes_input)


def _make_objective(engine: SparseEngine, recipe: Recipe) -> NextToken | RowClass:
    switch = rotate_by_row(engine.module)
    if classifies(recipe):
        return RowClass(switch, FlashInputs.of(engine.module))
    head_loss = find_head_loss(engine.module)
    if head_loss is None:
        name = type(engine.module).__name__
        log_rank0(f"note: {name} changes its logits in a way of its own: all of a batch are alive at once")
    how = {"switch": switch, "head_loss": head_loss}
    objective = NextToken(engine.module, recipe.data.packing, engine.after_plain_backward, **how)
    engine.forget_trace()
    return objective


def _load_model(recipe: Recipe, data: RunData, ds_config: dict) -> tuple[nn.Module, dict[str, Target]]:
    """The model, and weight name -> a classifier's head, filled."""
    name, dtype, attention = recipe.model.name_or_path, recipe.model.dtype, recipe.model.attention
    check_device(attention, collectives.device().type, recipe.where("model.attention"))
    if not classifies(recipe):
        return load_base(name, dtype, ds_config, attention=attention), {}
    if data.classes is None:
        fix = "data.labels=[...], the names of the classes"
        raise UserError("without rows nobody knows the classes", "data.labels", fix)
    model = load_base(name, dtype, ds_config, len(data.classes), attention)
    config = model.config.get_text_config()
    config.pad_token_id = data.pad_id  # what the model takes for padding when it looks for a row's end
    std = getattr(config, "initializer_range", None) or getattr(config, "init_std", 0.02)
    fill_head(model.score, std, hash_seed(recipe.seed, "head"))
    return model, {HEAD: find_weights(model.score)["weight"]}


def _note_noise(model: nn.Module) -> None:
    """Say which noise the model trains with."""
    values = {**model.config.to_dict(), **model.config.get_text_config().to_dict()}.items()
    noise = {
        name: value
        for name, value in values
        if isinstance(value, float) and value and any(word in name for word in ("drop", "jitter", "noise"))
    }
    if noise:
        log_rank0(f"note: the model trains with noise {noise}: other world sizes draw other values")


def make_scorer(context: TrainContext, number: int = 0) -> Scorer:
    """What the (re)selection of this number, from 0, scores with: fresh rows and seed each time."""
    mask, data, calibration = context.recipe.mask, context.data, None
    if data.calibration is not None:
        ids = data.calibration_order.epoch(number)[: mask.calibration_samples]
        chosen = [data.calibration[row] for row in ids]
        # Fisher information is a sum over rows of squares; Wanda must tell padding from tokens.
        by_row = mask.salience in ("fisher", "wanda") and context.mixes_rows
        size = 1 if by_row else mask.calibration_batch
        calibration = CalibrationSet(chosen, size, data.pad_id, number == 0)
    seed = hash_seed(context.recipe.seed, "salience", number) if number else context.recipe.seed
    return Scorer(context.engine, context.targets, mask, seed, calibration, context.loss)


def choose_mask(context: TrainContext, timings: Timings, number: int = 0) -> Mask:
    """Score the targeted weights as they are now, and select.

    Args:
        number: of the selection in this run, from 0.
    """
    mask, module = context.recipe.mask, context.engine.module
    if not context.targets:
        return Mask({}, {})
    # Without dropout, unless checkpointing (which transformers does in training mode only) is asked for.
    was_training = module.training
    module.train(context.recipe.train.activation_checkpointing != "none")
    try:
        # Whole weights and new rows learn nothing from what only scores.
        others = context.whole | context.new_tokens.targets
        with timings.stage("salience"), weight_grad_hooks(others, dict.fromkeys(others)):
            scores = score(make_scorer(context, number))
    finally:
        module.train(was_training)
    with timings.stage("selection"):
        if mask.compute is not None:
            confine(scores, context.shapes, context.num_trainable, mask.budget, mask.compute)
        how = (context.shapes, context.num_trainable, mask.budget)
        if context.units is not None:
            return select_units(scores, context.units, *how)
        if mask.only_nonzero:
            return select_nonzero(scores, context.targets, *how)
        return select(scores, *how, mask.granularity, mask.block_size)
