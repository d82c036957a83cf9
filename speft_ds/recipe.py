"""Recipes: one YAML file an experiment. The closed schema, loading, and the checks that need no torch.

Precedence: default < YAML < `key.sub=value`. Every problem is collected and shown at once.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from speft_ds.errors import RecipeError, UserError, closest, did_you_mean, explain

ROOT = Path(__file__).resolve().parent.parent
RECIPES_DIR = ROOT / "recipes"
DS_CONFIGS_DIR = ROOT / "ds_configs"
CACHE = "~/.cache/speft_ds"


def expand_path(path: str) -> str:
    """Expand `~`; `~/.cache` follows XDG_CACHE_HOME where that is set."""
    cache = os.environ.get("XDG_CACHE_HOME")
    if cache and (path == "~/.cache" or path.startswith("~/.cache/")):
        return cache.rstrip("/") + path.removeprefix("~/.cache")
    return os.path.expanduser(path)


def _number(value: Any) -> Any:
    # YAML 1.1, which PyYAML speaks, reads 1e-3 as text: a float there needs a dot and a signed exponent.
    is_exponent = isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value)
    return float(value) if is_exponent else value


def _exactly_one(value: Any, info: ValidationInfo, section: str, other: str) -> Any:
    """Refuse both and neither. Silent where `other` is itself wrong: that is reported already."""
    if other in info.data and (value is None) == (info.data[other] is None):
        both = f"{section}.{info.field_name} and {section}.{other} are both"
        if value is None:
            raise _broken_rule(f"{both} null: one is needed", f"give {section}.{other} a value")
        fix = f"keep one; on the command line, {section}.{other}=null switches the other off"
        raise _broken_rule(f"{both} given, and they exclude each other", fix)
    return value


def _broken_rule(message: str, fix: str, **context: str) -> PydanticCustomError:
    return PydanticCustomError("rule", "{message}", {"message": message, "fix": fix, **context})


Text = Annotated[str, Field(min_length=1)]
FilePath = Annotated[Text, AfterValidator(expand_path)]
Float = Annotated[float, BeforeValidator(_number)]
Count = Annotated[int, Field(ge=1)]
Beta = Annotated[Float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Beta, Beta], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]


def divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)


class _Section(BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Model(_Section):
    name_or_path: FilePath = Field(description="a local model folder, or a hub id like owner/name")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="the dtype of the base weights")


class Data(_Section):
    path: FilePath = Field(description="a .json or .jsonl file of training rows")
    prompt_column: Text = Field("prompt", description="the column of the prompt")
    response_column: Text = Field("response", description="the column of the response, the loss's labels")
    chat_template: bool = Field(True, description="wrap prompt and response in the tokenizer's chat template")
    max_length: int = Field(1024, ge=8, description="the most tokens that a row may have")


class Mask(_Section):
    salience: Literal["gradient", "magnitude", "random"] = Field(
        "gradient", description="how each weight is scored"
    )
    density: Float | None = Field(0.005, gt=0, le=1, description="the fraction of the targets to train")
    num_trainable: Count | None = Field(
        None, validate_default=True, description="how many weights to train, in place of density"
    )
    budget: Literal["global", "per_layer"] = Field("global", description="one threshold for all, or one each")
    targets: list[Text] | None = Field(
        None, min_length=1, description="module name patterns; null: every nn.Linear of the decoder layers"
    )
    calibration_samples: Count = Field(64, description="rows that the gradient salience is computed from")
    calibration_batch: Count = Field(
        4, description="rows a calibration micro-batch, fixed so that the mask does not depend on the ranks"
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _count_switches_density_off(cls, data: Any) -> Any:
        counted = isinstance(data, dict) and data.get("num_trainable") is not None
        return {"density": None, **data} if counted else data

    @field_validator("num_trainable")
    @classmethod
    def _one_budget(cls, value: int | None, info: ValidationInfo) -> int | None:
        return _exactly_one(value, info, "mask", "density")


class Optimizer(_Section):
    name: Literal["adamw"] = Field("adamw", description="the optimizer of the trained entries")
    lr: Float = Field(1e-3, gt=0, description="the peak learning rate")
    betas: Betas = Field((0.9, 0.999), description="the two decay rates of the moments, each in [0, 1)")
    eps: Float = Field(1e-8, gt=0, description="added to the denominator of the update")
    weight_decay: Float = Field(0.0, ge=0, description="decoupled weight decay")
    clip_norm: Float | None = Field(1.0, gt=0, description="the largest global gradient norm; null: any")
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="lr after the warm-up")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")


class Train(_Section):
    steps: Count | None = Field(None, description="optimizer steps, in place of epochs")
    epochs: Float | None = Field(1.0, gt=0, validate_default=True, description="passes over the data")
    global_batch: Count = Field(16, description="rows an optimizer step, over all ranks")
    micro_batch: Count = Field(
        4, validate_default=True, description="rows a rank takes in one forward; must divide global_batch"
    )
    activation_checkpointing: Literal["none", "reentrant", "non_reentrant"] = Field(
        "none", description="recompute activations in the backward: less memory, more time"
    )
    sparse_backend: Literal["auto", "dense", "sampled"] = Field(
        "auto", description="how the sparse weight gradient is computed"
    )
    reduce_bucket: Count = Field(16_777_216, description="entries reduced between ranks in one call")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _steps_switch_epochs_off(cls, data: Any) -> Any:
        counted = isinstance(data, dict) and data.get("steps") is not None
        return {"epochs": None, **data} if counted else data

    @field_validator("epochs")
    @classmethod
    def _one_length(cls, value: float | None, info: ValidationInfo) -> float | None:
        return _exactly_one(value, info, "train", "steps")

    @field_validator("micro_batch")
    @classmethod
    def _divides(cls, value: int, info: ValidationInfo) -> int:
        batch = info.data.get("global_batch", value)  # absent where it is itself wrong
        if batch % value:
            message = f"train.micro_batch={value} does not divide train.global_batch={batch}"
            fix = f"train.micro_batch= one of {divisors(batch)}"
            raise _broken_rule(message, fix)
        return value


class DeepSpeed(_Section):
    config: FilePath = Field("zero3_bf16", description="a name in ds_configs/, or a path to a JSON file")


class Eval(_Section):
    tasks: list[Text] = Field([], description="lm-eval task names; empty: no evaluation")
    include_path: FilePath | None = Field(None, description="a folder of task files of your own")
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(None, description="null: the task's own")
    limit: Count | None = Field(None, description="documents a task; null: all")
    batch_size: Count = Field(16, description="documents a rank scores at once")
    chat_template: bool = Field(True, description="wrap the prompts in the tokenizer's chat template")
    before: bool = Field(True, description="score the untouched model")
    after: bool = Field(True, description="score the trained model")


class Recipe(_Section):
    """One experiment, checked and with every default filled in."""

    model: Model = Field(description="the frozen base")
    data: Data = Field(description="the training rows")
    mask: Mask = Field(Mask(), description="which weights are trained")
    optimizer: Optimizer = Field(Optimizer(), description="how they are trained")
    train: Train = Field(Train(), description="how long, and in what batches")
    deepspeed: DeepSpeed = Field(DeepSpeed(), description="how the base is sharded")
    eval: Eval = Field(Eval(), description="what is scored before and after")
    output_dir: FilePath | None = Field(None, description="the run folder; null: runs/<recipe name>")
    seed: int = Field(0, ge=0, description="seeds the order of the rows and the random mask")
    name: str = Field("recipe", description="the file's name; not a key of the YAML")
    _sources: dict[str, str] = pydantic.PrivateAttr(default_factory=dict)

    @field_validator("train")
    @classmethod
    def _warmup_fits(cls, train: Train, info: ValidationInfo) -> Train:
        warmup = info.data["optimizer"].warmup_steps if "optimizer" in info.data else 0
        if train.steps is not None and warmup > train.steps:
            message = f"optimizer.warmup_steps={warmup} is more than train.steps={train.steps}"
            fix = f"optimizer.warmup_steps={train.steps // 10}, or train.steps={warmup} or more"
            raise _broken_rule(message, fix, key="optimizer.warmup_steps")
        return train

    def where(self, key: str) -> str:
        """Where the value of a key such as `data.path` was set: file:line, command line, or default."""
        return self._sources.get(key, f"{key} (default)")


SECTIONS = {k: f.annotation for k, f in Recipe.model_fields.items() if isinstance(f.default, BaseModel)}
SECTIONS = {"model": Model, "data": Data} | SECTIONS
FIELDS = {f"{name}.{leaf}": f for name, cls in SECTIONS.items() for leaf, f in cls.model_fields.items()}
FIELDS |= {key: Recipe.model_fields[key] for key in ("output_dir", "seed")}


@dataclass
class _Draft:
    """A recipe on its way in: plain values, where each came from, and what is wrong so far."""

    data: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    problems: list[UserError] = field(default_factory=list)


def list_recipes() -> list[str]:
    """The names of the recipes that come with the repository."""
    return sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name or path, apply `key.sub=value` overrides, and check it. Raises RecipeError."""
    path = _find_recipe(name_or_path)
    draft = _Draft()
    _read_yaml(path, draft)
    _apply_overrides(overrides, draft)
    for section in SECTIONS:  # a section that is absent or empty is all defaults
        draft.data[section] = {} if draft.data.get(section) is None else draft.data[section]
    draft.data["name"] = path.stem
    if draft.data.get("output_dir") is None:
        draft.data["output_dir"] = f"runs/{path.stem}"
    try:
        recipe = Recipe.model_validate(draft.data)
    except pydantic.ValidationError as failed:
        draft.problems += [explain(e, draft.sources, shown(path), FIELDS) for e in failed.errors()]
    if draft.problems:
        raise RecipeError(draft.problems, f"recipe {path.stem}")
    recipe._sources = draft.sources
    return recipe


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe with every default filled in, as YAML that loads again."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude={"name"}), sort_keys=False)


def shown(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _find_recipe(name_or_path: str) -> Path:
    path = Path(expand_path(name_or_path))
    if path.suffix not in (".yaml", ".yml") and "/" not in name_or_path:
        path = RECIPES_DIR / f"{name_or_path}.yaml"
        if not path.is_file():
            fix = did_you_mean(name_or_path, list_recipes())
            missing = UserError(f"there is no recipe {name_or_path!r}", shown(RECIPES_DIR), fix)
            raise RecipeError([missing], "recipe")
    return path


def _read_yaml(path: Path, draft: _Draft) -> None:
    """Fill the draft from the file. Goes by the YAML nodes, which know their lines."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise RecipeError([UserError(f"cannot read the recipe: {error.strerror}", str(path))]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{shown(path)}:{mark.line + 1}" if mark else shown(path)
        what = f"not readable as YAML: {getattr(error, 'problem', None) or error}"
        fix = "indent with spaces, put a space after each colon, quote text that holds : # * or {"
        raise RecipeError([UserError(what, where, fix)], f"recipe {path.stem}") from None
    if not isinstance(root, yaml.MappingNode):
        what = "the recipe is empty" if root is None else "the top level must be keys, like `model:`"
        fix = "start from one that works: speft show quickstart > my_recipe.yaml"
        raise RecipeError([UserError(what, shown(path), fix)], f"recipe {path.stem}")
    for key, node in _known_keys(root, "", path, draft):
        if key in SECTIONS and isinstance(node, yaml.MappingNode):
            leaves = _known_keys(node, f"{key}.", path, draft)
            draft.data[key] = {leaf.partition(".")[2]: _value(n, leaf, draft) for leaf, n in leaves}
        else:
            draft.data[key] = _value(node, key, draft)


def _known_keys(
    node: yaml.MappingNode, prefix: str, path: Path, draft: _Draft
) -> Iterator[tuple[str, yaml.Node]]:
    """The known keys of one level, noting their lines; unknown and repeated ones become problems."""
    for key_node, value in node.value:
        written = key_node.value if isinstance(key_node, yaml.ScalarNode) else "(a list or mapping)"
        key = f"{prefix}{written}"
        where = f"{shown(path)}:{key_node.start_mark.line + 1} ({key})"
        if "." in written or (key not in FIELDS and key not in SECTIONS):
            draft.problems.append(_unknown_key(key, where))
        elif key in draft.sources:
            fix = f"keep this one or {draft.sources[key]}"
            draft.problems.append(UserError(f"{key} is set twice", where, fix))
        else:
            draft.sources[key] = where
            yield key, value


def _value(node: yaml.Node, key: str, draft: _Draft) -> Any:
    try:
        return yaml.SafeLoader("").construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError) as error:
        what = f"{key} cannot be read: {getattr(error, 'problem', None) or error}"
        draft.problems.append(UserError(what, draft.sources[key], "quote the value if it is text"))
        return None


def _unknown_key(key: str, where: str) -> UserError:
    section, _, leaf = key.rpartition(".")
    if key in FIELDS:  # right name, wrong form: `mask.density: 0.1` in the YAML
        fix = f"nest it: `{section}:`, and below it `  {leaf}: ...`"
        return UserError(f"{key} is not a YAML key", where, fix)
    if key == "name":
        return UserError("name is not a key", where, "a recipe's name is its file's name: rename the file")
    everything = [*SECTIONS, *FIELDS]
    siblings = [k for k in everything if k.rpartition(".")[0] == section]
    same_name = [k for k in everything if _leaf(k) == leaf]
    if guesses := same_name or _alike(leaf, siblings) or _alike(leaf, everything):
        return UserError(f"unknown key {key}", where, f"did you mean {' or '.join(guesses)}?")
    return UserError(f"unknown key {key}", where, f"choose from: {', '.join(siblings or SECTIONS)}")


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _alike(leaf: str, keys: list[str]) -> list[str]:
    close = closest(leaf, map(_leaf, keys))
    return [k for k in keys if _leaf(k) in close]


def _apply_overrides(overrides: Sequence[str], draft: _Draft) -> None:
    for text in overrides:
        key, equals, written = text.partition("=")
        where = f"command line: {text}"
        if not equals:
            draft.problems.append(UserError(f"{text!r} is not key=value", where, "like optimizer.lr=1e-3"))
        elif key in SECTIONS:
            fix = f"set its keys one by one, like {next(k for k in FIELDS if k.startswith(key + '.'))}=..."
            draft.problems.append(UserError(f"{key} is a section", where, fix))
        elif key not in FIELDS:
            draft.problems.append(_unknown_key(key, where))
        else:
            draft.sources[key] = where
            _set(key, written, draft)


def _set(key: str, written: str, draft: _Draft) -> None:
    try:
        value = yaml.safe_load(written)
    except (yaml.YAMLError, ValueError):
        fix = f"""quote it twice, for the shell and for YAML: {key}='"{written}"'"""
        what = f"{key}: {written!r} is not readable as YAML"
        draft.problems.append(UserError(what, draft.sources[key], fix))
        return
    section, _, leaf = key.rpartition(".")
    if not section:
        draft.data[leaf] = value
    elif isinstance(draft.data.get(section), dict | None):
        draft.data[section] = (draft.data.get(section) or {}) | {leaf: value}
