"""The frozen base on its engine: what is scored, trained and evaluated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from speft_ds.comm import collectives
from speft_ds.comm.collectives import log_rank0
from speft_ds.config.data_config import DataConfig
from speft_ds.config.deepspeed_config import load_ds_config
from speft_ds.config.model_config import HEAD
from speft_ds.config.recipe import Recipe
from speft_ds.data.dataset import Row, TokenizedDataset
from speft_ds.data.dataset_cache import DatasetSpec, prepare
from speft_ds.data.sampler import Sampler, hash_seed
from speft_ds.data.tokenize import load_tokenizer
from speft_ds.errors import UserError
from speft_ds.model.fingerprint import fingerprint
from speft_ds.model.linear import adapt, weight_grad_hooks
from speft_ds.model.load_model import fill_head, load_base
from speft_ds.model.loss import NextToken, RowClass
from speft_ds.model.targets import find_targets, target_shapes, tied_targets
from speft_ds.selection.calibration import CalibrationSet, Scorer
from speft_ds.selection.salience import score
from speft_ds.selection.topk import num_trainable, select
from speft_ds.sparse.mask import Mask
from speft_ds.training.checks import check_shapes
from speft_ds.training.metrics import Timings
from speft_ds.zero.engine import build_engine


class TrainContext:
    """A recipe's model, sharded by ZeRO-3, and its tokenizer; nothing trains yet.

    Args:
        recipe: the whole recipe.
        timings: where the seconds of scoring and selection are added.

    Attributes (after `load`):
        engine: `SparseEngine` over the frozen base.
        targets: weight name -> linear whose weight may be trained; `shapes`: weight name -> (out, in).
        heads: weight name -> linear that is trained whole: a classifier's head; `classes`: their names.
        num_trainable: entries that are asked for, over all ranks; what a selection comes to may differ by
            the rounding of units and row quotas.
        fingerprint: of the weights as they are loaded.
        fingerprint_bfloat16: of the weights rounded to bfloat16: one for all dtypes that a checkpoint may be
            loaded in.
    """

    def __init__(self, recipe: Recipe, timings: Timings):
        self.recipe, self.timings = recipe, timings
        self.tokenizer = load_tokenizer(recipe.model.name_or_path, recipe.where("model.name_or_path"))
        self.classifies = recipe.model.task == "sequence_classification"
        self.classes = recipe.data.labels
        self.pad_id = self._choose_pad_id()

    def _choose_pad_id(self) -> int:
        """A token id to pad with, which every model has an embedding for.

        Padding is never looked at (right padding, causal attention, labels by position), so any will do; but
        a classifier looks for the last token that is no padding, and has to find the row's EOS. It keeps the
        tokenizer's own padding where that is possible: users of the adapter will pad with it.
        """
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        if self.classifies and pad is not None and pad != eos and pad < self.tokenizer.vocab_size:
            return pad
        return int(self.classifies and eos == 0)

    def read_corpus(self, section: DataConfig, where: Callable[[int], str] | None = None) -> TokenizedDataset:
        """The tokenised rows of a data section, the same on every rank; made once a node.

        Args:
            where: number of a source -> where it is named; None: in the data section.
        Raises:
            UserError: see `prepare.prepare`; or the nodes do not have the same rows.
        """
        recipe = self.recipe
        where = where or recipe.where_rows
        request = DatasetSpec(section, recipe.model.name_or_path, self.classifies, recipe.seed, where)
        if section.select == "ifd":
            log_rank0("note: scoring rows takes long on a CPU; `speft data RECIPE` does it ahead of a run")
        made: list[TokenizedDataset] = []
        collectives.local_rank0_first(
            lambda: made.append(prepare(request, lambda: self.tokenizer, log_rank0))
        )
        corpus = made[0] if made else prepare(request, lambda: self.tokenizer, log_rank0)
        if not collectives.same_on_all_ranks(corpus.facts["sha256"]):
            fix = "have one copy of the data and of the tokenizer for all nodes, or the same everywhere"
            raise UserError("the ranks' nodes have different rows", where(0), fix)
        return corpus

    def read_training_rows(self) -> TokenizedDataset:
        """The training rows; a classifier's classes are theirs."""
        corpus = self.read_corpus(self.recipe.data)
        self.classes = corpus.facts["classes"]
        return corpus

    def read_calibration_rows(self, training: TokenizedDataset | None) -> None:
        """Set up what scores are computed from; nothing, where no metric of this recipe needs data.

        Args:
            training: the training rows, where they are at hand.
        Raises:
            UserError: fewer rows than `mask.calibration_samples`.
        """
        recipe, section = self.recipe.mask, self.recipe.data
        self.calibration_rows: Sequence[Row] = []
        self.calibration_sha256 = None
        if not recipe.needs_calibration:
            return
        weights = section.weights
        if self.classifies and self.classes is None and section.sources:
            training = training or self.read_training_rows()
        if recipe.calibration_path is not None:
            other = {"path": recipe.calibration_path, "mixture": None, "select": "all", "select_rows": None}
            # A file without one of the classes must not number the others anew.
            section, weights = section.model_copy(update={**other, "labels": self.classes}), None
            training = self.read_corpus(section, lambda number: self.recipe.where("mask.calibration_path"))
        elif training is None:
            training = self.read_training_rows()
        corpus = training
        seed = self.recipe.seed if recipe.calibration_seed is None else recipe.calibration_seed
        self.calibration_rows, self.calibration_sha256 = corpus.rows(), corpus.facts["sha256"]
        self.calibration_order = Sampler(corpus.row_sizes, weights, seed, "calibration")
        if recipe.calibration_samples > len(self.calibration_order):
            raise UserError(
                f"{recipe.calibration_samples} calibration samples are asked for, "
                f"{recipe.calibration_path or 'an epoch'} has {len(self.calibration_order)} rows",
                where="mask.calibration_samples",
                fix=f"mask.calibration_samples={len(self.calibration_order)}",
            )

    def load(self, loaded: Mask | None = None) -> None:
        """Load the weights, sharded, and build the engine; for a classifier, after its rows are read.

        Args:
            loaded: the mask to train, which says what the targets are; None to choose by the recipe.
        Raises:
            UserError: the model cannot be loaded, or does not fit the recipe.
        """
        recipe = self.recipe
        ds_config = load_ds_config(recipe, collectives.world_size())
        if self.classifies and self.classes is None:
            fix = "data.labels=[...], the names of the classes"
            raise UserError("without rows nobody knows the classes", "data.labels", fix)
        num_classes = len(self.classes) if self.classifies else None
        model = load_base(recipe.model.name_or_path, recipe.model.dtype, ds_config, num_classes)
        self.heads = self._prepare_head(model) if self.classifies else {}
        self.targets = self._find_targets(model, loaded)
        values = model.config.to_dict().items()
        if dropout := {name: value for name, value in values if "drop" in name and value}:
            log_rank0(f"note: the model trains with dropout {dropout}: other world sizes draw other masks")
        if recipe.train.activation_checkpointing != "none":
            reentrant = recipe.train.activation_checkpointing == "reentrant"
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        self.shapes = target_shapes(self.targets)
        self.num_trainable = loaded.num_trainable if loaded else num_trainable(recipe.mask, self.shapes)
        check_shapes(recipe, self.shapes)
        self.fingerprint = fingerprint(model)
        is_bfloat16 = recipe.model.dtype == "bfloat16"
        self.fingerprint_bfloat16 = self.fingerprint if is_bfloat16 else fingerprint(model, torch.bfloat16)
        trained = self.targets | self.heads
        self.engine = build_engine(model, ds_config, trained, recipe.walks_all_layers)
        for linear in trained.values():
            adapt(linear, recomputes_input=recipe.train.activation_checkpointing == "none")
        self.objective = RowClass() if self.classifies else NextToken(model, recipe.data.packing)

    def _prepare_head(self, model: nn.Module) -> dict[str, nn.Linear]:
        """Weight name -> the classification head, filled."""
        config = model.config.get_text_config()
        config.pad_token_id = self.pad_id  # what the model takes for padding when it looks for a row's end
        std = getattr(config, "initializer_range", None) or getattr(config, "init_std", 0.02)
        fill_head(model.score, std, hash_seed(self.recipe.seed, "head"))
        return {HEAD: model.score}

    def scored_model(self, adapter: str | None = None) -> dict[str, str | None]:
        """What answers depend on, whatever the model is called: weights, tokenizer, configuration.

        Args:
            adapter: hash of the adapter whose weights these are; None: the untouched base.
        """
        model, tokenizer = self.engine.module, self.tokenizer
        config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "dtype")}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        written = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
        flags = [getattr(tokenizer, f"add_{which}_token", None) for which in ("bos", "eos")]
        parts = [config, model.generation_config.to_dict(), tokenizer.special_tokens_map, flags]
        text = json.dumps([*parts, tokenizer.chat_template, written], sort_keys=True, default=str)
        return {
            "fingerprint": self.fingerprint,
            "dtype": self.recipe.model.dtype,
            "settings": hashlib.sha256(text.encode()).hexdigest(),
            "adapter": adapter,
        }

    def identity(self) -> dict:
        """Which base this is, for files made from it: masks and adapters."""
        classifier = {"classes": self.classes, "pad_token_id": self.pad_id, "row_ends_with_eos": True}
        return {
            **(classifier if self.classifies else {}),
            "task": self.recipe.model.task,
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

    def loss(self, module: nn.Module, batch: dict[str, Tensor], temperature: float = 1.0) -> Tensor:
        """Summed loss of a batch; `module` is the engine or its module."""
        return self.objective(module, batch, temperature)[0]

    def scorer(self, number: int = 0) -> Scorer:
        """What the (re)selection of this number, from 0, scores with: fresh rows and seed each time."""
        recipe, calibration = self.recipe.mask, None
        if self.calibration_rows:
            ids = self.calibration_order.epoch(number)[: recipe.calibration_samples]
            rows = [self.calibration_rows[row] for row in ids]
            calibration = CalibrationSet(rows, recipe.calibration_batch, self.pad_id, number == 0)
        seed = hash_seed(self.recipe.seed, "salience", number) if number else self.recipe.seed
        return Scorer(self.engine, self.targets, recipe, seed, calibration, self.loss)

    def choose_mask(self, number: int = 0) -> Mask:
        """Score the targeted weights as they are now, and select; `number` counts the selections of a run."""
        recipe, module = self.recipe.mask, self.engine.module
        # Without dropout, unless checkpointing (which transformers does in training mode only) is asked for.
        in_training = module.training
        module.train(self.recipe.train.activation_checkpointing != "none")
        try:
            # A head learns nothing from what only scores.
            with self.timings.stage("salience"), weight_grad_hooks(self.heads, dict.fromkeys(self.heads)):
                scores = score(self.scorer(number))
        finally:
            module.train(in_training)
        with self.timings.stage("selection"):
            granularity = (recipe.granularity, recipe.block_size)
            return select(scores, self.shapes, self.num_trainable, recipe.budget, *granularity)
