"""Adapters on a live, plain `transformers` model: applied, switched and removed, bit for bit.

The model keeps its base values at each adapter's indices, so that nothing is ever undone by arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from speft_ds.adapter.format import Adapter
from speft_ds.errors import UserError

STATE = "speft_adapters"  # the model's attribute with its `Adapters`


@dataclass
class Values:
    """What an adapter changes in a weight: [n] flat indices (int64), and the values without and with it."""

    name: str
    index: Tensor
    base: Tensor
    tuned: Tensor


@dataclass
class Adapters:
    """The adapters of a model, of which one or none is in its weights.

    Attributes:
        fingerprint, dtype: of the base, checked before anything was applied.
        values: adapter name -> what it changes; `config`: adapter name -> entries of the model's config.
        config_before: those entries as they were before the active adapter.
    """

    fingerprint: str
    dtype: str
    values: dict[str, list[Values]] = field(default_factory=dict)
    config: dict[str, dict] = field(default_factory=dict)
    config_before: dict = field(default_factory=dict)
    active: str | None = None


@torch.no_grad()
def apply_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> nn.Module:
    """Turn a pretrained model into the trained one, in place and bit for bit.

    Args:
        model: the plain `transformers` base, loaded in the dtype that the run trained in; for a classifier
            an `AutoModelForSequenceClassification` with `num_labels`, whose head is replaced.
        folder: the run's `adapter` folder.
        name: to switch by, where the model is to have several adapters; the one that is active is put aside.
    Returns:
        The same model.
    Raises:
        UserError: another base, another dtype, a sharded model, a name that is taken, or a damaged adapter;
            nothing is changed.
    """
    adapter = Adapter.open(folder)
    state = getattr(model, STATE, None)
    if state is not None and name in state.values:
        fix = f"remove_adapter(model, {name!r}), or apply it by another name"
        raise UserError(f"an adapter named {name!r} is already applied", str(folder), fix)
    weights = dict(model.named_parameters())
    check_weights(adapter, {key: tuple(weight.shape) for key, weight in weights.items()})
    if state is None:
        check_base(model, adapter)
        state = Adapters(adapter.facts["fingerprint"], adapter.facts["dtype"])
    elif (state.fingerprint, state.dtype) != (adapter.facts["fingerprint"], adapter.facts["dtype"]):
        raise another_base(adapter)
    read = [(key, *adapter.entries(key)) for key in adapter.names]
    heads = {key: adapter.head(key) for key in adapter.heads}
    _activate(model, state, None)
    values = [_with_delta(key, weights[key], index, delta) for key, index, delta in read]
    values += [_with_values(key, weights[key], value) for key, value in heads.items()]
    state.values[name], state.config[name] = values, classifier_config(adapter.facts)
    setattr(model, STATE, state)
    _activate(model, state, name)
    return model


@torch.no_grad()
def switch_adapter(model: nn.Module, name: str | None) -> None:
    """Put another of the model's adapters into its weights, or none: the base, bit for bit.

    Raises:
        UserError: there is no such adapter, or the weights of the active one have been changed since;
            nothing is changed.
    """
    state = getattr(model, STATE, None)
    if name is not None and (state is None or name not in state.values):
        there = ", ".join(state.values) if state is not None else "none"
        raise UserError(f"the model has no adapter {name!r}", fix=f"its adapters: {there}")
    if state is not None:
        _activate(model, state, name)


def remove_adapter(model: nn.Module, name: str | None = None) -> None:
    """Forget an adapter, or all; weights that it is in become those of the base, bit for bit.

    Raises:
        UserError: see `switch_adapter`.
    """
    state = getattr(model, STATE, None)
    if name is None or (state is not None and name == state.active):
        switch_adapter(model, None)
    if name is not None and (state is None or name not in state.values):
        raise UserError(f"the model has no adapter {name!r}")
    if state is None:
        return
    for forgotten in [name] if name is not None else list(state.values):
        del state.values[forgotten], state.config[forgotten]
    if not state.values:  # whatever becomes of the model from here on, its fingerprint is taken anew
        delattr(model, STATE)


def check_weights(adapter: Adapter, shape: dict[str, tuple[int, ...]]) -> None:
    """Refuse a model without the adapter's weights, or with some of another shape.

    Args:
        shape: of every weight of the model, by name.
    """
    for name in adapter.heads:
        if shape.get(name) != adapter.head_shape(name):
            raise UserError(
                f"the adapter is a classifier's, with a head {name} of shape {adapter.head_shape(name)}",
                where=str(adapter.folder),
                fix="load the base by AutoModelForSequenceClassification, "
                f"num_labels={adapter.head_shape(name)[0]}",
            )
    for name in adapter.names:
        if shape.get(name) != adapter.shape[name]:
            has = f"of shape {shape[name]}" if name in shape else "not there"
            what = (
                f"the adapter is for another model: {name} is {has}, it changes one of {adapter.shape[name]}"
            )
            raise UserError(what, where=str(adapter.folder))


def check_base(model: nn.Module, adapter: Adapter) -> None:
    """Refuse a model that is not the base the adapter was trained on."""
    from speft_ds.model.fingerprint import fingerprint

    facts, where = adapter.facts, str(adapter.folder)
    if any(hasattr(parameter, "ds_tensor") for parameter in model.parameters()):  # no DeepSpeed needed here
        fix = "load it without DeepSpeed"
        raise UserError("the model is sharded by ZeRO-3", where="apply_adapter", fix=fix)
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    if dtypes != {facts["dtype"]}:
        raise UserError(
            f"the adapter was trained on {facts['dtype']} weights, the model has {', '.join(sorted(dtypes))}",
            where=where,
            fix=f"load the base with dtype=torch.{facts['dtype']}",
        )
    if fingerprint(model) != facts["fingerprint"]:
        raise another_base(adapter)


def another_base(adapter: Adapter) -> UserError:
    return UserError(
        "the adapter was trained on another base: the weights of this model have another fingerprint",
        where=str(adapter.folder),
        fix=f"load {adapter.facts['base']} unchanged (an adapter that is already applied changes it, too)",
    )


def with_delta(base: Tensor, delta: Tensor, alpha: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
    """Trained values of pretrained ones: base + alpha * delta, summed in fp32.

    Args:
        base: [n], in any float dtype; `delta`: [n] fp32.
        dtype: of the result; None: that of `base`.
    """
    # A product with 1 changes no bit.
    return (base.float() + alpha * delta.to(base.device)).to(dtype or base.dtype)


def classifier_config(facts: dict) -> dict:
    """The entries of a model's configuration that a classifier's adapter sets; none for other adapters."""
    if not (classes := facts.get("classes")):
        return {}
    return {
        "id2label": dict(enumerate(classes)),
        "label2id": {name: number for number, name in enumerate(classes)},
        "pad_token_id": facts.get("pad_token_id"),  # by which a row's end is found
    }


def _with_delta(name: str, weight: nn.Parameter, index: Tensor, delta: Tensor) -> Values:
    index = index.to(weight.device)
    base = weight.data.view(-1).index_select(0, index)
    return Values(name, index, base, with_delta(base, delta))


def _with_values(name: str, weight: nn.Parameter, value: Tensor) -> Values:
    index = torch.arange(weight.numel(), device=weight.device)
    return Values(name, index, weight.data.reshape(-1).clone(), value.reshape(-1).to(weight))


def _activate(model: nn.Module, state: Adapters, name: str | None) -> None:
    """Write the base's values back, then those of the adapter `name`."""
    if name == state.active:
        return
    weights = dict(model.named_parameters())
    if state.active is not None:
        for values in state.values[state.active]:
            _check_unchanged(values, weights, state.active)
        for values in state.values[state.active]:
            weights[values.name].data.view(-1).index_copy_(0, values.index, values.base)
        _set(model, state.config_before)
        state.config_before, state.active = {}, None
    if name is not None:
        for values in state.values[name]:
            _move(values, weights[values.name])
            weights[values.name].data.view(-1).index_copy_(0, values.index, values.tuned)
        state.config_before, state.active = _set(model, state.config[name]), name


def _check_unchanged(values: Values, weights: dict[str, nn.Parameter], name: str) -> None:
    """Refuse to write over what somebody else has written."""
    from speft_ds.model.fingerprint import INTEGER_VIEW

    weight = weights.get(values.name)
    if weight is not None and weight.dtype == values.tuned.dtype:
        _move(values, weight)
        now = weight.data.view(-1).index_select(0, values.index)
        as_bits = INTEGER_VIEW[now.dtype]
        if torch.equal(now.view(as_bits), values.tuned.view(as_bits)):
            return
    raise UserError(
        f"{values.name} has changed since the adapter {name!r} was applied, which cannot be undone exactly",
        where="the model",
        fix="load the base again",
    )


def _move(values: Values, weight: nn.Parameter) -> None:
    """Follow a model that was moved to another device."""
    for part in ("index", "base", "tuned"):
        setattr(values, part, getattr(values, part).to(weight.device))


def set_config(model: nn.Module, facts: dict) -> None:
    """Name a classifier's classes in the model's configuration; nothing for other adapters."""
    _set(model, classifier_config(facts))


def _set(model: nn.Module, entries: dict) -> dict:
    """Set entries of the configuration; returns what they were before."""
    before = {}
    for key, value in entries.items():
        config = model.config.get_text_config() if key == "pad_token_id" else model.config
        before[key] = getattr(config, key)
        setattr(config, key, value)
    return before
