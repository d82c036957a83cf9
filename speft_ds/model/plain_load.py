"""What a plain `from_pretrained` makes of a model, its weights unread: the sharded one must be the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import load_state_dict

from speft_ds import hub
from speft_ds.errors import UserError
from speft_ds.io import same_bits
from speft_ds.model.targets import shorten
from speft_ds.zero.shards import full_shape

FIX = "report it, with the model's name; another model trains meanwhile"


class PlainLoad:
    """A model as `transformers` loads it, on the meta device.

    Attributes:
        model: names, shapes, dtypes and tied weights; no values.
        is_untied: whether its configuration ties the head to the embedding, while the files hold another
            head.

    Args:
        auto_class, options: how to load it; `name_or_path`, `dtype`: what.
    Raises:
        OSError, ValueError: it cannot be loaded.
    """

    def __init__(self, auto_class: type, name_or_path: str, dtype: torch.dtype, options: dict[str, Any]):
        self.name = name_or_path
        self.model = auto_class.from_pretrained(
            name_or_path, dtype=dtype, device_map="meta", trust_remote_code=False, **options
        )
        self.is_untied = False
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if head is None or not getattr(self.model.config.get_text_config(), "tie_word_embeddings", False):
            return
        if head.weight is not embedding.weight:
            # Both are in the files. Without values transformers cannot tell whether they are one.
            ends = (id(head.weight), id(embedding.weight))
            names = [name for name, weight in self.model.named_parameters() if id(weight) in ends]
            one, two = stored_values(name_or_path, names).values()
            self.is_untied = not same_bits(one, two)
            if not self.is_untied:
                head.weight = embedding.weight

    def check(self, model: nn.Module, where: str) -> None:
        """Compare the sharded model with this one; give recast buffers the checkpoint's values.

        Raises:
            UserError: a weight has another dtype, as one that the model keeps in fp32; or other weights are
                tied.
        """
        plain = dict(self.model.named_parameters(remove_duplicate=False))
        live = dict(model.named_parameters(remove_duplicate=False))
        if odd := sorted(plain.keys() ^ live.keys()):
            raise UserError(f"sharded, the model has other weights: {odd[0]} and so on", where, FIX)
        if odd := [name for name, weight in live.items() if weight.dtype != plain[name].dtype]:
            kept = str(plain[odd[0]].dtype).removeprefix("torch.")
            raise UserError(
                f"the model keeps {len(odd)} of its weights in {kept} ({shorten(odd)}), "
                "which cannot be sharded with others of another dtype",
                where,
                f"model.dtype={kept}",
            )
        if odd := [name for name, weight in live.items() if full_shape(weight) != plain[name].shape]:
            raise UserError(f"sharded, {odd[0]} has another shape", where, FIX)
        if odd := set(_ties(live)) ^ set(_ties(plain)):
            names = ", ".join(sorted(max(odd, key=len)))
            raise UserError(f"sharded, the model ties other weights than loaded plainly: {names}", where, FIX)
        self._restore_buffers(model)

    def _restore_buffers(self, model: nn.Module) -> None:
        """Give the model's buffers the values and dtypes of a plain load: computed ones, and recast ones."""
        plain = dict(self.model.named_buffers())
        computed = self._computed_buffers()
        recast = [
            name
            for name, buffer in model.named_buffers()
            if name in plain and name not in computed and buffer.dtype != plain[name].dtype
        ]
        stored = stored_values(self.name, recast) if recast else {}
        for name, value in (computed | stored).items():
            module, _, attribute = name.rpartition(".")
            buffers = model.get_submodule(module)._buffers
            buffers[attribute] = value.to(buffers[attribute].device, plain[name].dtype)

    @torch.no_grad()
    def _computed_buffers(self) -> dict[str, Tensor]:
        """Buffers that are in no file, as a plain load computes them; without those that it leaves empty."""
        names, found = [], []
        for prefix, module in self.model.named_modules():
            names += [f"{prefix}.{name}".lstrip(".") for name in sorted(module._non_persistent_buffers_set)]
        for fill in (0, 1):
            for name in names:
                module, _, attribute = name.rpartition(".")
                buffers = self.model.get_submodule(module)._buffers
                if buffers[attribute] is not None:
                    buffers[attribute] = torch.full_like(buffers[attribute], fill, device="cpu")
            for module in self.model.modules():
                self.model._init_weights(
                    module
                )  # of weights on the meta device, and so without effect on them
            found.append({name: b.clone() for name, b in self.model.named_buffers() if name in names})
        return {name: value for name, value in found[0].items() if same_bits(value, found[1][name])}


def stored_values(name_or_path: str, names: list[str]) -> dict[str, Tensor]:
    """Some weights or buffers as the checkpoint's files have them, by name.

    Raises:
        UserError: a file has them under names that transformers converts as it loads.
    """
    folder, found = hub.model_folder(name_or_path), {}
    for file in hub.weight_files(folder):
        state = load_state_dict(str(folder / file), map_location="cpu")
        for name in names:
            # A file of the bare decoder omits the first part, one of a larger model has more.
            keys = [
                key for key in state if key == name or key.endswith(f".{name}") or name.endswith(f".{key}")
            ]
            if keys:
                found[name] = state[keys[0]]
    if missing := sorted(set(names) - found.keys()):
        what = f"the files have no {missing[0]}, whose values decide how the model loads: it is converted"
        raise UserError(what, f"model.name_or_path: {name_or_path}", FIX)
    return {name: found[name] for name in names}


def _ties(weights: dict[str, nn.Parameter]) -> list[tuple[str, ...]]:
    """Names of one and the same weight, where it has several."""
    names: dict[int, list[str]] = {}
    for name, weight in weights.items():
        names.setdefault(id(weight), []).append(name)
    return [tuple(sorted(group)) for group in names.values() if len(group) > 1]
