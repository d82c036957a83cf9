"""A recipe's tokenizer and tokenised rows, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date

from transformers import PreTrainedTokenizerBase

from speft_ds import hub
from speft_ds.comm import collectives
from speft_ds.config.data_config import DataConfig
from speft_ds.config.recipe import Recipe
from speft_ds.data.chat_template import fix_date, writes_date
from speft_ds.data.dataset import TokenizedDataset
from speft_ds.data.dataset_cache import DatasetSpec, prepare
from speft_ds.data.sampler import Sampler
from speft_ds.data.tokenize import recipe_tokenizer
from speft_ds.env import log_rank0
from speft_ds.errors import UserError


@dataclass(frozen=True)
class RunData:
    """The tokenizer and the tokenised rows of a recipe, the same on every rank.

    Attributes:
        pad_id: a token id to pad with.
        classes: names of a classifier's classes; None where they are not known, or nothing is classified.
        training: the training rows; None: not read.
        calibration: the rows that scores are computed from, and in which order epochs of them are drawn; None
            where no metric of the recipe needs data.
    """

    tokenizer: PreTrainedTokenizerBase
    pad_id: int
    classes: list[str] | None
    training: TokenizedDataset | None = None
    calibration: TokenizedDataset | None = None
    calibration_order: Sampler | None = None

    @property
    def calibration_sha256(self) -> str | None:
        return None if self.calibration is None else self.calibration.facts["sha256"]


def classifies(recipe: Recipe) -> bool:
    return recipe.model.task == "sequence_classification"


def agree_on_date(recipe: Recipe, recorded: str | None = None) -> Recipe:
    """The recipe with the day that its chat template writes, alike on all ranks, which all call this.

    Args:
        recorded: of the run that is resumed, whose rows it keeps; None: of a new run.
    """
    writes = writes_date(hub.model_folder(recipe.model.name_or_path))
    if recipe.data.date is not None or not any(collectives.all_gather_objects(writes)):
        return recipe
    today = collectives.broadcast_object(recorded or date.today().isoformat())
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"date": today})})


def choose_pad_id(tokenizer: PreTrainedTokenizerBase, classifies: bool) -> int:
    """A token id to pad with, which every model has an embedding for.

    Padding is never looked at (right padding, causal attention, labels by position), so any will do; but
    a classifier looks for the last token that is no padding, and has to find the row's EOS. It keeps the
    tokenizer's own padding where that is possible: users of the adapter will pad with it.
    """
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if classifies and pad is not None and pad != eos and pad < tokenizer.vocab_size:
        return pad
    return int(classifies and eos == 0)


def load_data(recipe: Recipe, needs_training: bool = False, needs_calibration: bool = False) -> RunData:
    """The tokenizer and rows of a recipe.

    Args:
        needs_training: read the training rows.
        needs_calibration: read the calibration rows, where the recipe's metric needs data.
    Raises:
        UserError: see `dataset_cache.prepare`; nodes do not have the same rows; or there are fewer rows than
            `mask.calibration_samples`.
    """
    tokenizer = recipe_tokenizer(recipe)
    if recipe.data.date is not None:
        fix_date(tokenizer, date.fromisoformat(recipe.data.date))
    section, mask = recipe.data, recipe.mask
    needs_calibration = needs_calibration and recipe.needs_calibration
    needs_classes = classifies(recipe) and section.labels is None and bool(section.sources)
    if needs_calibration and (mask.calibration_path is None or needs_classes):
        needs_training = True
    training = read_rows(recipe, section, tokenizer) if needs_training else None
    classes = training.facts["classes"] if training is not None else section.labels
    data = RunData(tokenizer, choose_pad_id(tokenizer, classifies(recipe)), classes, training)
    return _with_calibration(data, recipe) if needs_calibration else data


def _with_calibration(data: RunData, recipe: Recipe) -> RunData:
    mask, weights, dataset = recipe.mask, recipe.data.weights, data.training
    if mask.calibration_path is not None:
        weights, dataset = None, read_file(recipe, data, mask.calibration_path, "mask.calibration_path")
    rows = dataset.rows()
    seed = recipe.seed if mask.calibration_seed is None else mask.calibration_seed
    order = Sampler(rows.sizes, weights, seed, "calibration")
    if mask.calibration_samples > len(order):
        raise UserError(
            f"{mask.calibration_samples} calibration samples are asked for, "
            f"{mask.calibration_path or 'an epoch'} has {len(order)} rows",
            where="mask.calibration_samples",
            fix=f"mask.calibration_samples={len(order)}",
        )
    return replace(data, calibration=rows, calibration_order=order)


def read_file(recipe: Recipe, data: RunData, path: str, key: str) -> TokenizedDataset:
    """All rows of a file in the format of the training rows, whatever is chosen of those.

    Args:
        data: whose classes count: a file without one of them must not number the others anew.
        key: of the recipe, that names the file.
    """
    section = recipe.data.of_file(path, data.classes)
    return read_rows(recipe, section, data.tokenizer, lambda number: recipe.where(key))


def read_rows(
    recipe: Recipe,
    section: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    where: Callable[[int], str] | None = None,
) -> TokenizedDataset:
    """The tokenised rows of a data section, the same on every rank; made once per node.

    Args:
        where: number of a source -> where it is named; None: in the data section.
    """
    where = where or recipe.where_rows
    model = recipe.model
    spec = DatasetSpec(
        section, model.name_or_path, classifies(recipe), recipe.seed, where, model.add_tokens or ()
    )
    if section.select == "ifd":
        log_rank0("note: scoring rows takes long on a CPU; `speft data RECIPE` does it ahead of a run")
    dataset = collectives.local_rank0_first(lambda: prepare(spec, lambda: tokenizer, log_rank0))
    if not collectives.same_on_all_ranks(dataset.facts["sha256"]):
        fix = "have one copy of the data and of the tokenizer for all nodes, or the same everywhere"
        raise UserError("the ranks' nodes have different rows", where(0), fix)
    return dataset
