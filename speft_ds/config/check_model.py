"""What a model's config.json tells without torch: whether, and on how long rows, it can be trained."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from speft_ds.config.recipe import Recipe
from speft_ds.errors import UserError, shell
from speft_ds.io import read_json

# What configurations call the number of positions, in the order in which they are looked for.
POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
)
PEFT_CONFIG = "adapter_config.json"
LAYERS, MAX_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 1000
# Attention of its own package -> that package, as pip calls it. Without it, transformers would take a kernel
# from the hub, whose code is never run here.
ATTENTION_PACKAGES = {
    "flash_attention_2": "flash-attn",
    "flash_attention_3": "flash-attn-3",
    "flash_attention_4": "flash-attn-4",
}
TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
UNQUANTISED = "name the unquantised checkpoint that it was made from, and model.base_format=nf4 (or int8)"


def model_problems(recipe: Recipe, file: Path, trains: bool) -> list[UserError]:
    """What is wrong with the model of a recipe, by its config.json.

    Args:
        trains: False for a job that reads no rows: positions do not matter then.
    """
    where = recipe.where("model.name_or_path")
    try:
        config = read_config(file)
    except UserError as error:
        return [error]
    problems = []
    if config.get("quantization_config"):
        what = f"the model is quantised: {quantization(config['quantization_config'])}"
        problems.append(UserError(what, where, UNQUANTISED))
    if config.get("is_encoder_decoder") is True:
        what = "the model is an encoder-decoder, of which a causal language model is only a part"
        problems.append(UserError(what, where, "a decoder model, as Llama, Qwen, Gemma or Mistral"))
    if config.get("auto_map") and not is_known(config.get("model_type")):
        what = f"the model brings code of its own ({config.get('model_type')}), which is never run here"
        problems.append(UserError(what, where, "a model whose type transformers itself has"))
    package = ATTENTION_PACKAGES.get(recipe.model.attention)
    if package and not _is_installed(package):
        what = f"model.attention={recipe.model.attention} needs the package {package}, which is not installed"
        problems.append(UserError(what, recipe.where("model.attention"), "model.attention=auto"))
    limit, most = recipe.data.max_length, num_positions(config)
    if trains and most is not None and limit > most:
        what = f"data.max_length={limit} is more than the {most} positions of the model"
        problems.append(UserError(what, recipe.where("data.max_length"), f"data.max_length={most}, or less"))
    return problems


def _is_installed(package: str) -> bool:
    try:
        return bool(distribution(package))
    except PackageNotFoundError:
        return False


def read_config(file: Path) -> dict:
    """A config.json. Raises UserError where it cannot be read, or no model could be made of it in time.

    Also where transformers would load another model: the one that an adapter in this folder names.
    """
    if (file.parent / PEFT_CONFIG).exists():
        what = f"{PEFT_CONFIG} is in the model's folder: transformers would load the model that it names"
        fix = f"merge that adapter into its model, or remove it: {shell('rm', file.parent / PEFT_CONFIG)}"
        raise UserError(what, str(file.parent), fix)
    try:
        config = read_json(file)
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
        for key, value in ((key, part.get(key)) for part in sections(config) for key in LAYERS):
            if isinstance(value, int | float) and not value <= MAX_LAYERS:
                raise ValueError(f"{key} is {value:.4g}")
    except (OSError, ValueError) as error:
        fix = "download or copy it again"
        raise UserError(f"not a model's configuration: {error}", str(file), fix) from error
    return config


def quantization(section: object) -> str:
    """What a quantization_config says of the weights, in words: `bitsandbytes, 4 bits, nf4`."""
    if not isinstance(section, dict):
        return "its quantization_config does not say how"
    bits = section.get("bits") or section.get("w_bit")
    bits = bits or next((n for n in (4, 8) if section.get(f"load_in_{n}bit")), None)
    kind = section.get("bnb_4bit_quant_type") if bits == 4 else section.get("fmt")
    parts = [section.get("quant_method", "by an unnamed method"), f"{bits} bits" if bits else None, kind]
    return ", ".join(str(part) for part in parts if part)


def sections(config: dict) -> list[dict]:
    """A configuration, and those of its language model in it."""
    return [part for part in (config, *map(config.get, TEXT_CONFIGS)) if isinstance(part, dict)]


def num_positions(config: dict) -> int | None:
    """How long a row may be; None: the configuration does not say."""
    values = [section.get(key) for section in sections(config) for key in POSITIONS]
    return next((value for value in values if type(value) is int and value > 0), None)


def is_known(model_type: object) -> bool:
    """Whether transformers has this type of model; its list is read: an import would be one of torch."""
    package = Path(find_spec("transformers").submodule_search_locations[0])
    listed = package / "models" / "auto" / "auto_mappings.py"
    return isinstance(model_type, str) and f'"{model_type}"' in listed.read_text(encoding="utf-8")
