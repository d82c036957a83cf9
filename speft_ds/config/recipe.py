"""A recipe: its sections, the rules between them, and what a job makes of it."""

from collections.abc import Iterator
from typing import Literal

from pydantic import PrivateAttr, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from speft_ds.config.data_config import DataConfig
from speft_ds.config.eval_config import EvalConfig
from speft_ds.config.mask_config import MaskConfig
from speft_ds.config.method_config import SAMPLED, MethodConfig
from speft_ds.config.model_config import DeepSpeedSection, ModelConfig
from speft_ds.config.section import ConfigSection, broken_rule, given_keys
from speft_ds.config.train_config import OptimizerConfig, TrainConfig
from speft_ds.config.values import FilePath, Index

Job = Literal["train", "score", "evaluate"]


class Recipe(ConfigSection):
    """One experiment, checked and with every default filled in."""

    model: ModelConfig
    """the frozen base"""
    data: DataConfig = DataConfig()
    """the training rows"""
    method: MethodConfig = MethodConfig()
    """what is trained"""
    mask: MaskConfig = MaskConfig()
    """which weights are trained"""
    optimizer: OptimizerConfig = OptimizerConfig()
    """how they are trained"""
    train: TrainConfig = TrainConfig()
    """how long, and in what batches"""
    deepspeed: DeepSpeedSection = DeepSpeedSection()
    """how the base is sharded"""
    eval: EvalConfig = EvalConfig()
    """what is scored before and after"""
    output_dir: FilePath | None = None
    """the run folder; null: runs/<recipe name>"""
    seed: Index = 0
    """seeds the order of the rows, calibration, random masks and gates"""
    name: str = "recipe"
    """the file's name; not a key of the YAML"""
    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    # In the rules between sections, a section that is itself wrong is missing from `info.data`.

    @field_validator("data")
    @classmethod
    def _fits_the_task(cls, data: DataConfig, info: ValidationInfo) -> DataConfig:
        if "model" not in info.data or info.data["model"].task == "causal_lm":
            return data
        task = "model.task=sequence_classification"
        if other := [source.format for source in data.sources if source.format != "classification"]:
            fix = "data.format=classification, or model.task=causal_lm"
            raise broken_rule(f"{task} does not go with data.format={other[0]}", fix, key="data.format")
        refused = [
            ("packing", data.packing, "false"),
            ("long_rows", data.long_rows == "truncate_response", "truncate_prompt or drop"),
            ("select", data.select in ("longest", "ifd"), "random or all"),
        ]
        for key, is_wrong, others in refused:
            if is_wrong:
                what = f"data.{key}={getattr(data, key)} does not go with {task}"
                raise broken_rule(what, f"data.{key}={others}", key=f"data.{key}")
        return data

    @field_validator("method")
    @classmethod
    def _can_train_the_base(cls, method: MethodConfig, info: ValidationInfo) -> MethodConfig:
        model = info.data.get("model")
        for key in ("base_format", "add_tokens"):
            if method.name != "sparse" and model is not None and getattr(model, key) is not None:
                what = f"model.{key} goes with method.name=sparse, not with {method.name}"
                raise broken_rule(what, f"model.{key}=null, or method.name=sparse", key="method.name")
        return method

    @field_validator("mask")
    @classmethod
    def _goes_with_the_method(cls, mask: MaskConfig, info: ValidationInfo) -> MaskConfig:
        method = info.data.get("method")
        if method is not None and not method.has_mask:
            # Null switches a thing off that the method does not have anyway.
            values = {f"mask.{key}": value for key, value in mask if value is not None}
            given = sorted(values.keys() & given_keys(info))
            if given:
                what = f"method.name={method.name} has no mask, and there is {', '.join(given)}"
                raise broken_rule(what, "leave it out, or method.name=sparse", key=given[0])
        if method is not None and method.name == "sparse_lora" and mask.of_units:
            what = f"mask.granularity={mask.granularity} does not go with method.name=sparse_lora"
            raise broken_rule(what, "mask.granularity=element, or method.name=sparse", key="mask.granularity")
        return mask

    @field_validator("mask")
    @classmethod
    def _grasp_in_float32(cls, mask: MaskConfig, info: ValidationInfo) -> MaskConfig:
        dtype = info.data["model"].dtype if "model" in info.data else "float32"
        if mask.is_scored and mask.salience == "grasp" and dtype != "float32":
            what = f"mask.salience=grasp needs model.dtype=float32, not {dtype}"
            fix = "model.dtype=float32: it takes a small step along the gradient, which bfloat16 rounds away"
            raise broken_rule(what, fix, key="mask.salience")
        return mask

    @field_validator("mask")
    @classmethod
    def _has_lost_something(cls, mask: MaskConfig, info: ValidationInfo) -> MaskConfig:
        if mask.needs_original and "model" in info.data and info.data["model"].base_format is None:
            key, value = ("start", "exact") if mask.start == "exact" else ("salience", "quant_error")
            what = f"mask.{key}={value} is of what a base in few bits lost, and model.base_format is null"
            fix = f"model.base_format=nf4, or mask.{key}={MaskConfig.model_fields[key].default}"
            raise broken_rule(what, fix, key=f"mask.{key}")
        return mask

    @field_validator("train")
    @classmethod
    def _is_long_enough(cls, train: TrainConfig, info: ValidationInfo) -> TrainConfig:
        steps, mask = train.steps, info.data.get("mask")
        warmup = info.data["optimizer"].warmup_steps if "optimizer" in info.data else 0
        if steps is not None and warmup > steps:
            what = f"optimizer.warmup_steps={warmup} is more than train.steps={steps}"
            fix = f"optimizer.warmup_steps={steps // 10}, or train.steps={warmup} or more"
            raise broken_rule(what, fix, key="optimizer.warmup_steps")
        changes = mask is not None and mask.schedule in ("periodic", "drop_grow")
        if steps is not None and changes and mask.update_every >= steps:
            what = f"mask.update_every={mask.update_every}, train.steps={steps}: the mask would not change"
            sooner = mask.update_every_within(steps)
            ways = [f"mask.update_every={sooner}"] if sooner else []
            ways.append(f"train.steps={mask.update_every + 1} or more")
            raise broken_rule(what, ", or ".join(ways), key="mask.update_every")
        return train

    @field_validator("eval")
    @classmethod
    def _can_be_measured(cls, value: EvalConfig, info: ValidationInfo) -> EvalConfig:
        if value.tasks and "model" in info.data and info.data["model"].task != "causal_lm":
            what = "lm-eval tasks need a language model, and model.task=sequence_classification is none"
            raise broken_rule(what, "eval.tasks=[]; metrics.jsonl has the accuracy", key="eval.tasks")
        if value.mode == "gathered" and "model" in info.data and info.data["model"].base_format is not None:
            what = "eval.mode=gathered copies complete weights, and model.base_format has none"
            raise broken_rule(what, "eval.mode=auto", key="eval.mode")
        if value.mode == "gathered" and "method" in info.data and info.data["method"].has_lora:
            what = "eval.mode=gathered copies a plain model, which has no low-rank matrices"
            raise broken_rule(what, "eval.mode=auto", key="eval.mode")
        if "train" in info.data and info.data["train"].keep_best and value.validation is None:
            fix = "eval.validation=rows.jsonl, or train.keep_best=false"
            raise broken_rule("train.keep_best needs a validation loss to go by", fix, key="train.keep_best")
        return value

    @property
    def walks_all_layers(self) -> bool:
        """Whether a backward goes down to the embedding, not just to the lowest layer that is trained.

        It must where that is another layer every step, or where inputs need a gradient (re-entrant
        activation checkpointing).
        """
        moves = self.mask.layer_gate != "none" or self.method.name in SAMPLED
        return self.train.activation_checkpointing == "reentrant" or moves

    @property
    def needs_calibration(self) -> bool:
        """Whether weights are scored by a metric that is computed from rows."""
        return self.method.has_mask and self.mask.needs_calibration

    @property
    def has_entry_steps(self) -> bool:
        """Whether what is trained differs in how often it stepped, so that each entry has its own count."""
        return self.mask.has_entry_steps or self.method.name in SAMPLED

    def is_given(self, key: str) -> bool:
        """Whether a file or the command line gives the key a value."""
        return key in self._sources

    def where(self, key: str) -> str:
        """Where the value of a key such as `data.path` was set: file:line, command line, or default."""
        return self._sources.get(key, f"{key} (default)")

    def where_rows(self, number: int = 0) -> str:
        """Where the data set of this number is named."""
        return self.where("data.path" if self.data.mixture is None else f"data.mixture[{number}].path")


def resolve(recipe: Recipe, *, job: Job, world_size: int, fits_micro_batch: bool = False) -> Recipe:
    """The recipe that a job runs with, as far as it can be known before its ranks meet.

    A score's run folder is runs/<recipe>-score-<salience>, unless one was chosen. With `fits_micro_batch`
    (`--resume`), training takes a micro-batch that this many ranks can share; what is learnt stays the
    same. `model.dtype: auto` is left to the ranks (`model/dtype.py`).
    """
    changes: dict[str, object] = {}
    if job == "score" and not recipe.is_given("output_dir"):
        changes["output_dir"] = f"runs/{recipe.name}-score-{recipe.mask.salience}"
    micro_batch = recipe.train.shared_micro_batch(world_size)
    if job == "train" and fits_micro_batch and micro_batch != recipe.train.micro_batch:
        changes["train"] = recipe.train.model_copy(update={"micro_batch": micro_batch})
    return recipe.model_copy(update=changes) if changes else recipe


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, ConfigSection)


def _walk(section: type[ConfigSection], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every field below a section in order, by its key in full."""
    for name, field in section.model_fields.items():
        yield prefix + name, field
        if _is_section(field):
            yield from _walk(field.annotation, f"{prefix}{name}.")


SECTIONS = {key: field.annotation for key, field in _walk(Recipe) if _is_section(field)}
FIELDS = {key: field for key, field in _walk(Recipe) if key not in SECTIONS and key != "name"}
