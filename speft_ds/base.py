"""The frozen base on its engine: what is scored, trained and evaluated."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from speft_ds import data, distributed
from speft_ds.calibration import CalibrationSet, Scorer
from speft_ds.ds_config import load_ds_config
from speft_ds.engine import build_engine
from speft_ds.errors import UserError
from speft_ds.mask import Mask
from speft_ds.metrics import Timings, say
from speft_ds.model import (
    find_targets,
    fingerprint,
    layer_number,
    load_base,
    target_shapes,
    tied_targets,
)
from speft_ds.rows import read_pairs
from speft_ds.salience import score
from speft_ds.schema import Recipe
from speft_ds.selection import entries_wanted, select
from speft_ds.sparse import adapt


class Base:
    """A recipe's model, sharded by ZeRO-3, and its tokenizer; nothing trains yet.

    Args:
        recipe: the whole recipe.
        timings: where the seconds of scoring and selection are added.

    Attributes (after `load`):
        engine: `SparseEngine` over the frozen base.
        targets: weight name -> linear whose weight may be trained; `shapes`: weight name -> (out, in).
        num_trainable: entries that are asked for, over all ranks; what a selection comes to may differ by
            the rounding of units and row quotas.
        fingerprint: of the weights as they are loaded.
        fingerprint_bfloat16: of the weights rounded to bfloat16: one for all dtypes that a checkpoint may be
            loaded in.
    """

    def __init__(self, recipe: Recipe, timings: Timings):
        from transformers import AutoTokenizer

        self.recipe, self.timings = recipe, timings
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(recipe.model.name_or_path)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load the tokenizer: {error}", where="model.name_or_path") from error
        # Padding is never looked at (right padding, causal attention, labels by length): any id will do.
        self.pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0

    def read_rows(self, path: str) -> list[data.Row]:
        """The tokenised rows of a file, with the columns and template of the `data` section."""
        recipe = self.recipe.data
        pairs = read_pairs(path, recipe.prompt_column, recipe.response_column)
        return data.tokenize(pairs, self.tokenizer, recipe.chat_template, recipe.max_length, path)

    def read_calibration_rows(self, training_rows: list[data.Row] | None) -> None:
        """Set up what scores are computed from; nothing, where no metric of this recipe needs data.

        Raises:
            UserError: fewer rows than `mask.calibration_samples`.
        """
        recipe = self.recipe.mask
        self.calibration_rows: list[data.Row] = []
        if not recipe.needs_calibration:
            return
        path = recipe.calibration_path or self.recipe.data.path
        is_training = path == self.recipe.data.path and training_rows is not None
        self.calibration_rows = training_rows if is_training else self.read_rows(path)
        if recipe.calibration_samples > len(self.calibration_rows):
            raise UserError(
                f"{recipe.calibration_samples} calibration samples are asked for, "
                f"{path} has {len(self.calibration_rows)} rows",
                where="mask.calibration_samples",
                fix=f"mask.calibration_samples={len(self.calibration_rows)}",
            )

    def load(self, loaded: Mask | None = None) -> None:
        """Load the weights, sharded, and build the engine.

        Args:
            loaded: the mask to train, which says what the targets are; None to choose by the recipe.
        """
        recipe = self.recipe
        ds_config = load_ds_config(recipe, distributed.world_size())
        model = load_base(recipe.model.name_or_path, recipe.model.dtype, ds_config)
        self.targets = self._find_targets(model, loaded)
        self.can_keep_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        values = model.config.to_dict().items()
        if dropout := {name: value for name, value in values if "drop" in name and value}:
            say(f"note: the model trains with dropout {dropout}: other world sizes draw other masks")
        if recipe.train.activation_checkpointing != "none":
            reentrant = recipe.train.activation_checkpointing == "reentrant"
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        self.shapes = target_shapes(self.targets)
        self.num_trainable = loaded.num_trainable if loaded else entries_wanted(recipe.mask, self.shapes)
        self._check_lift_rank()
        self._check_gate_layers()
        self.fingerprint = fingerprint(model)
        is_bfloat16 = recipe.model.dtype == "bfloat16"
        self.fingerprint_bfloat16 = self.fingerprint if is_bfloat16 else fingerprint(model, torch.bfloat16)
        self.engine = build_engine(model, ds_config, self.targets)
        for linear in self.targets.values():
            adapt(linear)

    def identity(self) -> dict[str, str]:
        """Which base this is, for files made from it: masks and adapters."""
        return {
            "base": self.recipe.model.name_or_path,
            "dtype": self.recipe.model.dtype,
            "fingerprint": self.fingerprint,
            "fingerprint_bfloat16": self.fingerprint_bfloat16,
        }

    def _find_targets(self, model: nn.Module, loaded: Mask | None) -> dict[str, nn.Linear]:
        recipe = self.recipe.mask
        if loaded is None:
            targets = find_targets(model, recipe.targets, recipe.layers)
        else:
            linears = find_targets(model, ["*"])
            targets = {name: linears[name] for name in loaded.shape if name in linears}
            if target_shapes(targets) != loaded.shape:
                odd = [n for n in loaded.shape if target_shapes(targets).get(n) != loaded.shape[n]]
                raise UserError(
                    f"the mask is for another model: {odd[0]} is not a linear weight of "
                    f"{self.recipe.model.name_or_path}, or has another shape",
                    where=f"mask.load: {recipe.load}",
                    fix="train the model that the mask was scored on, or score this one: speft score",
                )
        if tied := tied_targets(model, targets):
            raise UserError(
                f"{', '.join(tied)} shares its weight with another module (tied embeddings)",
                where="mask.targets",
                fix="target layers of the decoder only",
            )
        return targets

    def _check_lift_rank(self) -> None:
        smallest = min(min(shape) for shape in self.shapes.values())
        if self.recipe.mask.salience == "lift" and self.recipe.mask.lift_rank >= smallest:
            raise UserError(
                f"an approximation of rank {self.recipe.mask.lift_rank} leaves a weight with {smallest} "
                "rows or columns as it is",
                where="mask.lift_rank",
                fix=f"mask.lift_rank={max(1, smallest // 2)}, or leave out small weights by mask.targets",
            )

    def _check_gate_layers(self) -> None:
        recipe = self.recipe.mask
        layers = {layer_number(name) for name in self.shapes} - {None}
        if recipe.layer_gate == "sampled" and recipe.gate_layers >= len(layers):
            raise UserError(
                f"a gate that opens {recipe.gate_layers} of {len(layers)} layers shuts nothing",
                where="mask.gate_layers",
                fix=f"mask.gate_layers={max(1, len(layers) // 4)}, or mask.layer_gate=none",
            )

    def token_loss(self, module: nn.Module, batch: dict[str, Tensor], temperature: float = 1.0) -> Tensor:
        """Summed cross-entropy of a batch's label tokens; `module` is the engine or its module."""
        # Logits over the prompts would be thrown away, and cost a fifth of a small model's step.
        keep = data.num_logits(batch["labels"]) if self.can_keep_logits else 0
        options = {"logits_to_keep": keep} if keep else {}
        logits = module(input_ids=batch["input_ids"], use_cache=False, **options).logits
        return data.summed_loss(logits, batch["labels"][:, -keep:], temperature)

    def scorer(self, number: int = 0) -> Scorer:
        """What the (re)selection of this number, from 0, scores with: fresh rows and seed each time."""
        recipe = self.recipe.mask
        seed = self.recipe.seed if recipe.calibration_seed is None else recipe.calibration_seed
        order = data.permutation(len(self.calibration_rows), seed, "calibration", number)
        rows = [self.calibration_rows[row] for row in order[: recipe.calibration_samples]]
        calibration = CalibrationSet(rows, recipe.calibration_batch, self.pad_id) if rows else None
        fresh = data.hash_seed(self.recipe.seed, "salience", number) if number else self.recipe.seed
        return Scorer(self.engine, self.targets, recipe, fresh, calibration, self.token_loss)

    def choose_mask(self, number: int = 0) -> Mask:
        """Score the targeted weights as they are now, and select; `number` counts the selections of a run."""
        recipe, module = self.recipe.mask, self.engine.module
        # Without dropout, unless checkpointing (which transformers does in training mode only) is asked for.
        in_training = module.training
        module.train(self.recipe.train.activation_checkpointing != "none")
        try:
            with self.timings.stage("salience"):
                scores = score(self.scorer(number))
        finally:
            module.train(in_training)
        with self.timings.stage("selection"):
            granularity = (recipe.granularity, recipe.block_size)
            return select(scores, self.shapes, self.num_trainable, recipe.budget, *granularity)
