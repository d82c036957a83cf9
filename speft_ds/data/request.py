"""Which rows a recipe wants: a request, and the key that its corpus is kept under. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from speft_ds import hub
from speft_ds.config.data_config import DataConfig, Source
from speft_ds.config.recipe import Recipe
from speft_ds.data.readers import is_hub_dataset, load_builder
from speft_ds.env import cache_folder
from speft_ds.errors import UserError

FORMAT_VERSION = "1"  # of the file, and of what tokenising does: another version is another key
# All that a tokenizer, or a small model that scores rows, is loaded from.
MODEL_FILES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
WEIGHT_FILES = (".safetensors", ".bin")


@dataclass(frozen=True)
class Request:
    """Which corpus is wanted.

    Attributes:
        data: the data section, its sources those to read.
        model: whose tokenizer; a local folder or a hub id.
        classify: for sequence classification.
        seed: of the recipe, for `data.select=random`.
        where: source -> what an error says of where it is named.
    """

    data: DataConfig
    model: str
    classify: bool = False
    seed: int = 0
    where: Callable[[int], str] = field(default=lambda number: "data.path", compare=False)

    def key(self) -> str:
        """Hash of everything that the corpus depends on. Raises UserError for data that is not there."""
        data = self.data.model_dump(mode="json", exclude={"path", "mixture"})
        options = [source.model_dump(mode="json", exclude={"path", "weight"}) for source in self.data.sources]
        seed = self.seed if self.data.select == "random" else None
        parts = [
            FORMAT_VERSION,
            *(version(name) for name in ("transformers", "tokenizers")),
            data,
            options,
            self.classify,
            seed,
            hash_model(self.model, MODEL_FILES),
            hash_model(self.data.scorer, MODEL_FILES + WEIGHT_FILES),
            self.data.scorer and scorer_dtype(),
            [hash_source(source) for source in self.data.sources],
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def path(self) -> Path:
        """Where the corpus is kept. Raises UserError for data that is not there."""
        return cache_folder("rows") / f"{self.key()}.safetensors"


def request_of(recipe: Recipe) -> Request:
    """The corpus that a run of this recipe trains on. Raises UserError where it names no rows."""
    if not recipe.data.sources:
        fix = "type data.path=/the/right/path"
        raise UserError("the recipe names no rows", recipe.where("data.path"), fix)
    classify = recipe.model.task == "sequence_classification"
    return Request(recipe.data, recipe.model.name_or_path, classify, recipe.seed, recipe.where_rows)


def hash_model(model: str | None, suffixes: tuple[str, ...]) -> list[str] | str | None:
    """What identifies a model, as far as files of these kinds go: a hash of each."""
    folder = hub.model_folder(model) if model else None
    if folder is None:
        return model
    files = sorted(file for file in folder.iterdir() if file.suffix in suffixes and file.is_file())
    return [f"{file.name} {hash_file(file)}" for file in files]


def scorer_dtype() -> str:
    """Scores depend on it, and it on the machine."""
    from speft_ds.data.ifd import choose_dtype

    return str(choose_dtype())


def fetch_scorer(scorer: str) -> None:
    """Have the hub's cache hold the model that scores rows. Raises UserError."""
    from speft_ds.data.ifd import find_folder

    find_folder(scorer)


def hash_source(source: Source) -> str:
    """What identifies the rows of a source: the bytes of its files, or the version on the hub."""
    if is_hub_dataset(source.path):
        return str(load_builder(source).cache_dir)
    path = Path(source.path)
    if not path.is_dir():
        return hash_file(path)
    names = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
    lines = [f"{name} {hash_file(path / name)}" for name in names if ".cache" not in name.parts]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def hash_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", str(path)) from error
