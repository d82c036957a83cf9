"""Tokens that the base does not know: their rows of the embedding and of the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from speft_ds.config.values import MAX_MULTIPLE
from speft_ds.errors import UserError
from speft_ds.model.kinds import parameter
from speft_ds.model.kinds.parameter import ParameterTarget
from speft_ds.model.kinds.target import Target
from speft_ds.zero.shards import full_shape, gathered, shard

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class NewTokens:
    """The tokens that a run adds, if any.

    Attributes:
        tokens: their texts; `rows`: [n] sorted int64, their ids.
        num_pretrained: rows that the vocabulary has in the base; `num_rows`: that it has now.
        targets: name -> the weight of the embedding, and of the head where that is another one.
    """

    tokens: list[str]
    rows: Tensor
    num_pretrained: int
    num_rows: int
    targets: dict[str, Target]

    @property
    def num_elements(self) -> int:
        """Of all the rows."""
        return sum(len(self.rows) * target.shape[1] for target in self.targets.values())

    def facts(self) -> dict:
        """What an adapter says of them."""
        if not self.tokens:
            return {}
        return {"new_tokens": self.tokens, "vocabulary": [self.num_pretrained, self.num_rows]}

    def in_words(self) -> str:
        grown = f"the vocabulary grew from {self.num_pretrained:,} to {self.num_rows:,} rows"
        used = f"in the padding of the vocabulary of {self.num_rows:,} rows"
        return f"{len(self.rows)} each, {used if self.num_rows == self.num_pretrained else grown}"


def add_tokens(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, tokens: list[str], ds_config: dict
) -> NewTokens:
    """Make room for new tokens in the vocabulary of a sharded model; all ranks call this together.

    A vocabulary that was padded has room for some. Otherwise the embedding and the head grow; the rows of
    tokens that they get start at the mean of the others, other rows at 0.

    Args:
        model: frozen, on no engine yet.
        tokenizer: that has the tokens already.
        ds_config: the complete DeepSpeed configuration, of the engine to come.
    Raises:
        UserError: the embedding has fewer rows than the tokenizer has tokens, or is none that can grow.
    """
    rows = torch.tensor(sorted(tokenizer.convert_tokens_to_ids(tokens)), dtype=torch.int64)
    if not tokens:
        return NewTokens([], rows, 0, 0, {})
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        what = f"{type(model).__name__} has no plain embedding and head, of which new tokens could be rows"
        raise UserError(what, "model.add_tokens", "model.add_tokens=null")
    num_pretrained = full_shape(embedding.weight)[0]
    if rows[0] > num_pretrained or full_shape(head.weight)[0] != num_pretrained:
        what = f"the model has {num_pretrained:,} rows for the {int(rows[0]):,} tokens of its tokenizer"
        raise UserError(f"{what}, or another number in its head", "model.add_tokens", "model.add_tokens=null")
    num_rows = padded_size(num_pretrained, len(tokenizer) - len(tokens), int(rows[-1]) + 1)
    if num_rows > num_pretrained:
        for name, weight in vocabulary_weights(model).items():
            with gathered(weight), torch.no_grad():
                values = with_rows(weight.data, num_rows)
                if name.endswith("weight"):
                    new = rows[rows >= num_pretrained].to(values.device)
                    values[new] = weight.data.mean(0, dtype=torch.float32).to(values.dtype)
            _replace(model, weight, shard(values, ds_config))
        _set_size(model, num_rows)
    embedding.sparse = True  # its gradient then has a row for each token of a batch, not of the vocabulary
    targets = {
        name: ParameterTarget(model.get_submodule(name.rpartition(".")[0]), "weight", parameter)
        for name in vocabulary_weights(model)
        if name.endswith(".weight")
    }
    return NewTokens(tokens, rows, num_pretrained, num_rows, targets)


def padded_size(num_rows: int, num_tokens: int, num_wanted: int) -> int:
    """Rows of a vocabulary that has room for so many tokens.

    It stays a multiple of what it was padded to: of the largest power of two, up to MAX_MULTIPLE.

    Args:
        num_rows: that it has; `num_tokens`: of its tokenizer, for the others are padding.
    """
    if num_wanted <= num_rows:
        return num_rows
    multiple = 1
    while num_rows > num_tokens and multiple < MAX_MULTIPLE and num_rows % (2 * multiple) == 0:
        multiple *= 2
    return -(-num_wanted // multiple) * multiple


def vocabulary_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that have a row for each token, by name: embedding and head, tied ones once."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    own = {id(p) for module in modules if module is not None for p in module.parameters(recurse=False)}
    return {name: weight for name, weight in model.named_parameters() if id(weight) in own}


@torch.no_grad()
def resize_vocabulary(model: nn.Module, num_rows: int) -> None:
    """Give the vocabulary of a plain model so many rows, in place: those behind its own are 0."""
    for weight in vocabulary_weights(model).values():
        weight.data = with_rows(weight.data[:num_rows], num_rows)
    _set_size(model, num_rows)


def with_rows(values: Tensor, num_rows: int) -> Tensor:
    """A copy with zeros behind its own rows."""
    return torch.cat([values, values.new_zeros(num_rows - len(values), *values.shape[1:])])


def _replace(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put a parameter in the place of another, wherever that is used."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is old:
                setattr(module, name, new)


def _set_size(model: nn.Module, num_rows: int) -> None:
    """Have modules and configuration say how many rows the vocabulary has."""
    before = model.get_input_embeddings().num_embeddings
    model.get_input_embeddings().num_embeddings = num_rows
    if (head := model.get_output_embeddings()) is not None:
        head.out_features = num_rows
    model.config.get_text_config().vocab_size = num_rows
    for part in model.modules():
        if getattr(part, "vocab_size", None) == before:
            part.vocab_size = num_rows
