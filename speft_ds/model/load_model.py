"""The frozen base: loading it under ZeRO-3, and a classifier's head."""

from __future__ import annotations

import torch
from torch import nn

from speft_ds.config.model_config import HEAD
from speft_ds.env import log_rank0
from speft_ds.errors import UserError
from speft_ds.model.plain_load import PlainLoad
from speft_ds.model.targets import shorten
from speft_ds.zero.shards import full_shape, is_sharded, own_elements


def load_base(
    name_or_path: str,
    dtype: str,
    ds_config: dict,
    num_classes: int | None = None,
    attention: str = "auto",
) -> nn.Module:
    """A frozen `transformers` model, sharded while it loads.

    Args:
        name_or_path: local folder or hub name.
        dtype: `float32` or `bfloat16`; the weights are cast to it.
        ds_config: the complete DeepSpeed configuration.
        num_classes: None for a causal language model; else it classifies, and its head is new: see `HEAD`.
        attention: transformers' name of how attention is computed; `auto`: its choice.
    Raises:
        UserError: the checkpoint cannot be read, or lacks weights of the model; or, sharded, it would be
            another model than loaded plainly.
    """
    import transformers
    from transformers.integrations import HfDeepSpeedConfig

    auto_class, options = transformers.AutoModelForCausalLM, {}
    if num_classes is not None:
        # Whatever head a checkpoint brings is for other classes.
        options = {"num_labels": num_classes, "ignore_mismatched_sizes": True}
        auto_class = transformers.AutoModelForSequenceClassification
    if attention != "auto":
        options["attn_implementation"] = attention
    where, torch_dtype, zero3 = f"model.name_or_path: {name_or_path}", getattr(torch, dtype), None
    try:
        plain = PlainLoad(auto_class, name_or_path, torch_dtype, options)
        if plain.is_untied:
            log_rank0(
                "note: the configuration ties the head to the embedding, the files hold another head: untied"
            )
            options["tie_word_embeddings"] = False
    except UserError:
        raise
    except Exception as error:  # any type: the code of hundreds of families loads and initialises
        raise _unreadable(error, where, attention) from error
    try:
        # Must be alive while from_pretrained runs, or every rank loads the full model.
        zero3 = HfDeepSpeedConfig(ds_config)
        model, info = auto_class.from_pretrained(
            name_or_path, dtype=torch_dtype, output_loading_info=True, trust_remote_code=False, **options
        )
    except Exception as error:
        what = f"transformers loads this model, but not sharded: {type(error).__name__}: {error}"
        fix = "a family that docs/models.md lists as trained, or another version of transformers"
        raise UserError(what, where, fix) from error
    finally:
        del zero3
    if num_classes is not None:
        _check_head(model, name_or_path)
    _check_keys(info, where, {HEAD} if num_classes is not None else set())
    if not all(is_sharded(parameter) for parameter in model.parameters()):
        raise RuntimeError("the base was not sharded by ZeRO-3")
    plain.check(model, where)
    model.requires_grad_(False)
    return model


def _unreadable(error: Exception, where: str, attention: str) -> UserError:
    text = str(error)
    if attention != "auto" and "ttention" in text:
        what = f"the model cannot have this attention: {text}"
        return UserError(what, f"model.attention: {attention}", "model.attention=auto")
    if "trust_remote_code" in text:
        what = "the model brings code of its own, which is not run here"
        return UserError(what, where, "a model that transformers itself has")
    if "Unrecognized configuration class" in text:
        what = (
            f"transformers has no decoder for this model: {text.splitlines()[0].split(' for this kind')[0]}"
        )
        return UserError(what, where, "a causal language model")
    fix = "give a folder with config.json and weights, or the name of a model on the hub"
    kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    return UserError(f"cannot load the model: {kind}{text}", where, fix)


def _check_keys(info: dict, where: str, expected: set[str]) -> None:
    """Refuse weights that the checkpoint lacks, and count those that the model does not have."""
    for problem in ("missing_keys", "mismatched_keys"):
        odd = {key if isinstance(key, str) else key[0] for key in info[problem]}
        if odd := sorted(odd - expected):
            raise UserError(
                f"the checkpoint has {problem.replace('_', ' ')}: {odd[:5]}",
                where,
                "use a complete checkpoint of this architecture; training random weights is refused",
            )
    if unused := sorted(info["unexpected_keys"]):
        log_rank0(f"note: {len(unused)} weights of the files are no part of this model: {shorten(unused)}")


def _check_head(model: nn.Module, name_or_path: str) -> None:
    head = getattr(model, HEAD.split(".")[0], None)
    if type(head) is not nn.Linear or head.bias is not None:
        raise UserError(
            f"{type(model).__name__} has no linear classification head {HEAD} without bias",
            where=f"model.name_or_path: {name_or_path}",
            fix="a decoder model, as Llama, OPT, Qwen, Gemma and Mistral are; or model.task=causal_lm",
        )


@torch.no_grad()
def fill_head(head: nn.Linear, std: float, seed: int) -> None:
    """Give a sharded classification head its starting values, the same at every world size.

    Args:
        std: standard deviation of the normal distribution they are drawn from.
    """
    shape = full_shape(head.weight)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(std).view(-1)
    own, start = own_elements(head.weight)
    own.copy_(values[start : start + own.numel()])
