"""Adapters on a live, plain `transformers` model: applied, switched and removed, bit for bit.

The model keeps the base's values that the active adapter replaces, so nothing is ever undone by arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from speft_ds.adapter.format import Adapter
from speft_ds.config.model_config import HEAD
from speft_ds.errors import UserError, shell
from speft_ds.io import same_bits
from speft_ds.model.fingerprint import fingerprint
from speft_ds.model.new_tokens import resize_vocabulary, vocabulary_weights
from speft_ds.zero.shards import is_sharded

STATE = "speft_adapters"  # the model's attribute that holds its `AppliedAdapters`


@dataclass
class AppliedAdapters:
    """The adapters of a model, of which one or none is in its weights.

    Attributes:
        fingerprint, dtype: of the base, checked before anything was applied.
        values: adapter name -> weight name -> [n] flat indices (int64; None: all), and the [n] values it sets
            there.
        config: adapter name -> entries of the model's configuration that it sets.
        vocabulary: adapter name with new tokens -> rows of the vocabulary without it, and with it.
        base_values, base_config: what the active adapter replaced.
    """

    fingerprint: str
    dtype: str
    values: dict[str, dict[str, tuple[Tensor | None, Tensor]]] = field(default_factory=dict)
    config: dict[str, dict] = field(default_factory=dict)
    vocabulary: dict[str, tuple[int, int]] = field(default_factory=dict)
    active: str | None = None
    base_values: dict[str, Tensor] = field(default_factory=dict)
    base_config: dict = field(default_factory=dict)


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
    check_format(adapter, None)
    facts, state = adapter.facts, getattr(model, STATE, None)
    if state is not None and name in state.values:
        fix = f"remove_adapter(model, {name!r}), or apply it by another name"
        raise UserError(f"an adapter named {name!r} is already applied", str(folder), fix)
    weights = dict(model.named_parameters())
    check_weights(adapter, _shapes(model, state, adapter))
    if state is None:
        _check_base(model, adapter)
        state = AppliedAdapters(facts["fingerprint"], facts["dtype"])
    elif (state.fingerprint, state.dtype) != (facts["fingerprint"], facts["dtype"]):
        raise another_base(adapter)
    entries = {key: adapter.entries(key) for key in adapter.names}
    whole = {key: adapter.value(key).view(-1) for key in adapter.whole}
    _activate(model, state, None)
    values = {}
    for key, (index, delta) in entries.items():
        index = index.to(weights[key].device)
        values[key] = index, with_delta(pretrained_values(weights[key].data, index), delta)
    for key in adapter.low_rank.shape if adapter.low_rank else ():
        trained = weights[key].data
        if key in entries:
            index, delta = entries[key]
            trained = with_entries(trained, index.to(trained.device), delta)
        values[key] = None, adapter.low_rank.merged(key, trained).to(trained.dtype).view(-1)
    for key, value in whole.items():
        values[key] = None, value.to(weights[key])
    state.values[name], state.config[name] = values, classifier_config(facts)
    if adapter.vocabulary:
        state.vocabulary[name] = adapter.vocabulary
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
    if state := _state_with(model, name):
        _activate(model, state, name)


def remove_adapter(model: nn.Module, name: str | None = None) -> None:
    """Forget an adapter, or all; weights that it is in become those of the base, bit for bit.

    Raises:
        UserError: see `switch_adapter`.
    """
    if not (state := _state_with(model, name)):
        return
    if name in (None, state.active):
        switch_adapter(model, None)
    for forgotten in list(state.values) if name is None else [name]:
        del state.values[forgotten], state.config[forgotten]
        state.vocabulary.pop(forgotten, None)
    if not state.values:  # whatever becomes of the model from here on, its fingerprint is taken anew
        delattr(model, STATE)


def _state_with(model: nn.Module, name: str | None) -> AppliedAdapters | None:
    """The model's state. Raises UserError where it has no adapter of this name, if one is given."""
    state = getattr(model, STATE, None)
    names = state.values if state else ()
    if name is not None and name not in names:
        fix = f"its adapters: {', '.join(names) or 'none'}"
        raise UserError(f"the model has no adapter {name!r}", "the model", fix)
    return state


def _activate(model: nn.Module, state: AppliedAdapters, name: str | None) -> None:
    """Write the base's values back, then those of the adapter `name`."""
    if name == state.active:
        return
    weights = dict(model.named_parameters())
    if state.active is not None:
        active = state.values[state.active]
        for key, (index, values) in active.items():
            if key not in weights or not _has_values(weights[key], index, values):
                what = f"{key} has changed since the adapter {state.active!r} was applied"
                raise UserError(f"{what}, which cannot be undone exactly", "the model", "load the base again")
        for key, (index, _) in active.items():
            _replace(weights[key], index, state.base_values.pop(key))
        set_config(model, state.base_config)
        if state.active in state.vocabulary:
            resize_vocabulary(model, state.vocabulary[state.active][0])
        state.active = None
    if name is not None:
        if name in state.vocabulary:
            resize_vocabulary(model, state.vocabulary[name][1])
        for key, (index, values) in state.values[name].items():
            state.base_values[key] = _replace(weights[key], index, values)
        state.base_config, state.active = set_config(model, state.config[name]), name


# Indices and values stay where they were made; those of a model that has moved follow it as they are used.
def _has_values(weight: nn.Parameter, index: Tensor | None, values: Tensor) -> bool:
    flat = weight.data.view(-1)
    return same_bits(flat if index is None else flat[index.to(weight.device)], values.to(weight.device))


def _replace(weight: nn.Parameter, index: Tensor | None, values: Tensor) -> Tensor:
    """Write [n] values at flat indices, or everywhere; returns what they were before."""
    flat = weight.data.view(-1)
    if index is None:
        before = flat.clone()
        flat.copy_(values)
        return before
    index = index.to(weight.device)
    before = flat[index]
    flat.index_copy_(0, index, values.to(weight.device))
    return before


def _shapes(model: nn.Module, state: AppliedAdapters | None, adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Weight -> its shape once this adapter is the active one."""
    shape = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    active = state.vocabulary.get(state.active) if state else None
    if num_rows := adapter.vocabulary[1] if adapter.vocabulary else active and active[0]:
        shape |= {name: (num_rows, *shape[name][1:]) for name in vocabulary_weights(model)}
    return shape


def pretrained_values(weight: Tensor, index: Tensor) -> Tensor:
    """The values of a weight at [n] flat indices; 0 at those of rows that it is yet to get."""
    flat = weight.view(-1)
    values, is_there = flat.new_zeros(len(index)), index < len(flat)
    values[is_there] = flat[index[is_there]]
    return values


def _check_base(model: nn.Module, adapter: Adapter) -> None:
    """Refuse a model that is not the base the adapter was trained on."""
    dtype = adapter.facts["dtype"]
    if any(map(is_sharded, model.parameters())):
        raise UserError("the model is sharded by ZeRO-3", "apply_adapter", "load it without DeepSpeed")
    if away := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        what = f"{len(away)} weights of the model are offloaded, or have no values: {away[0]}"
        raise UserError(
            what, "apply_adapter", "load it without device_map, or speft merge and load the merged model"
        )
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    if dtypes != {dtype}:
        what = f"the adapter was trained on {dtype} weights, the model has {', '.join(sorted(dtypes))}"
        raise UserError(what, str(adapter.folder), f"load the base with dtype=torch.{dtype}")
    if fingerprint(model) != adapter.facts["fingerprint"]:
        raise another_base(adapter)


def another_base(adapter: Adapter) -> UserError:
    """What to raise where a model has another fingerprint than the adapter's base."""
    what = "the adapter was trained on another base: the weights of this model have another fingerprint"
    fix = f"load {adapter.facts['base']} unchanged (an adapter that is already applied changes it, too)"
    return UserError(what, str(adapter.folder), fix)


def check_weights(adapter: Adapter, shape: dict[str, tuple[int, ...]]) -> None:
    """Refuse a model that lacks the adapter's weights; `shape`: of every weight of the model, by name."""
    for name in adapter.whole:
        expected = adapter.value_shape(name)
        if shape.get(name) == expected:
            continue
        what = f"the adapter has all values of {name}, of shape {expected}, which the model does not have"
        fix = f"load {adapter.facts['base']}"
        if name == HEAD:
            what = f"the adapter is a classifier's, with a head {name} of shape {expected}"
            fix = f"load the base by AutoModelForSequenceClassification, num_labels={expected[0]}"
        raise UserError(what, str(adapter.folder), fix)
    odd = [name for name in adapter.facts.get("quantised") or () if len(shape.get(name, ())) != 2]
    if odd:
        what = f"the adapter is for another model: {odd[0]}, which it has in few bits, is no matrix there"
        raise UserError(what, str(adapter.folder), f"load {adapter.facts['base']}")
    matrices = adapter.low_rank.shape if adapter.low_rank else {}
    for name, expected in (matrices | adapter.shape).items():
        # A stack of experts is seen as one matrix.
        if name not in shape or (math.prod(shape[name][:-1]), shape[name][-1]) != expected:
            has = f"of shape {shape[name]}" if name in shape else "not there"
            what = f"the adapter is for another model: {name} is {has}, it changes one of {expected}"
            raise UserError(what, str(adapter.folder), f"load {adapter.facts['base']}")


def check_format(adapter: Adapter, base_format: str | None) -> None:
    """Refuse an adapter that was trained beside a base in another format. Raises UserError."""
    trained = adapter.facts.get("base_format")
    if trained != base_format:
        what = f"the adapter was trained on a base in {trained or adapter.facts['dtype']}"
        what += f", not in {base_format or 'that dtype'}"
        fix = f"model.base_format={trained or 'null'}"
        if trained is not None and base_format is None:
            fix += f"; or, for a model without it: {shell('speft', 'merge', str(adapter.folder), 'OUTPUT')}"
        raise UserError(what, str(adapter.folder), fix)


def check_same_base(adapters: Sequence[Adapter]) -> None:
    """Refuse adapters whose deltas belong to different weights. Raises UserError."""
    first, fix = adapters[0], "take adapters of one base"
    for other in adapters[1:]:
        where = f"{first.folder} and {other.folder}"
        a, b = first.facts, other.facts
        if b["fingerprint"] != a["fingerprint"]:
            what = f"are of different bases: {a['base']} and {b['base']} (their fingerprints differ)"
            rounded = a.get("fingerprint_bfloat16")
            if rounded and rounded == b.get("fingerprint_bfloat16") and a["dtype"] != b["dtype"]:
                what = f"were trained in different dtypes of one base: {a['dtype']} and {b['dtype']}"
            raise UserError(f"the adapters {what}", where, fix)
        if a.get("base_format") != b.get("base_format"):
            named = " and ".join(each.get("base_format") or each["dtype"] for each in (a, b))
            raise UserError(f"the adapters were trained beside one base in {named}", where, fix)
        if a.get("new_tokens") != b.get("new_tokens"):
            raise UserError("the adapters have different new tokens", where, fix)
        for name in first.shape.keys() & other.shape.keys():
            if first.shape[name] != other.shape[name]:
                what = f"{name} is {first.shape[name]} in one adapter and {other.shape[name]} in the other"
                raise UserError(what, where, fix)


def with_delta(base: Tensor, delta: Tensor, alpha: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
    """Trained values of pretrained ones: base + alpha * delta, summed in fp32.

    Args:
        base: [n], in any float dtype; `delta`: [n] fp32.
        dtype: of the result; None: that of `base`.
    """
    # A product with 1 changes no bit.
    return (base.float() + alpha * delta.to(base.device)).to(dtype or base.dtype)


def with_entries(weight: Tensor, index: Tensor, delta: Tensor) -> Tensor:
    """A copy of a weight, in its dtype, with trained values at flat indices."""
    trained = weight.clone()
    flat = trained.view(-1)
    flat[index] = with_delta(flat[index], delta)
    return trained


def classifier_config(facts: dict) -> dict:
    """The entries of a model's configuration that a classifier's adapter sets; none for other adapters."""
    if not (classes := facts.get("classes")):
        return {}
    return {
        "id2label": dict(enumerate(classes)),
        "label2id": {name: number for number, name in enumerate(classes)},
        "pad_token_id": facts.get("pad_token_id"),  # by which a row's end is found
    }


def set_config(model: nn.Module, entries: dict) -> dict:
    """Set entries of a model's configuration; returns what they were before."""
    before = {}
    for key, value in entries.items():
        config = model.config.get_text_config() if key == "pad_token_id" else model.config
        before[key] = getattr(config, key)
        setattr(config, key, value)
    return before
