"""Sources of rows: what a path of a recipe stands for, and its rows. Imports no torch.

A path is a file, a pattern of files, a folder, a data set that `save_to_disk` wrote, or a hub id. Files are
read by `data/readers.py`; `datasets` reads the last two, and says which files of a folder are a split.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from speft_ds import hub
from speft_ds.config.data_config import Source
from speft_ds.data.bad_rows import BadRows
from speft_ds.data.readers import Located, class_names, iterate_file, kind_of, unknown_kind, with_class_names
from speft_ds.errors import UserError, did_you_mean
from speft_ds.io import read_json

# Of folders that `save_to_disk` wrote: of one data set, and of several splits.
SAVED, SAVED_SPLITS = ("state.json", "dataset_info.json"), "dataset_dict.json"


def is_hub_dataset(path: str) -> bool:
    """Whether a path can only be meant as owner/name on the hub."""
    return hub.is_hub_id(path) and not kind_of(path)


def iterate_rows(source: Source, bad: BadRows | None = None) -> Located:
    """The rows of a source, each with where it stands: what checks, `speft data` and a run all read.

    Args:
        bad: see `iterate_file`.
    Raises:
        UserError: no such data, a row that cannot be read, or a data set without this subset or split.
    """
    if (files := source_files(source)) is not None:
        return (located for file in files for located in iterate_file(file, bad))
    rows = _load_saved(source) if is_saved(source.path) else ask_datasets(source, split=source.split)
    split = "" if has_one_part(source.path) else f" ({source.split})"
    named = with_class_names(rows, class_names(rows.features))
    return ((f"{source.path}{split}, row {number}", row) for number, row in enumerate(named, 1))


def source_files(source: Source) -> list[Path] | None:
    """The files that a source is read from by `iterate_file`, in order; None where `datasets` reads it.

    Raises:
        UserError: a pattern that fits no file, or see `folder_files`.
    """
    if os.path.isdir(source.path):
        # By our own readers where they can: `datasets` reads CSV by pandas, to which "018" is the number 18.
        files = None if is_saved(source.path) else folder_files(source)
        return files if files and all(kind_of(file) for file in files) else None
    if is_hub_dataset(source.path):
        return None
    if not is_pattern(source.path):
        return [Path(source.path)]
    files = [Path(file) for file in sorted(glob.glob(source.path, recursive=True)) if os.path.isfile(file)]
    if not files:
        raise UserError(f"no file fits {source.path}", source.path, "* fits any text within a name")
    if other := next((file for file in files if not kind_of(file)), None):
        raise unknown_kind(other, source.path)
    return files


def is_pattern(path: str) -> bool:
    """Whether a path stands for all files that fit it, like rows/*.jsonl."""
    return glob.has_magic(path) and not os.path.exists(path)


def is_saved(path: str) -> bool:
    """Whether a folder is a data set that `save_to_disk` of `datasets` wrote."""
    return _is_saved_split(path) or os.path.isfile(os.path.join(path, SAVED_SPLITS))


def _is_saved_split(path: str) -> bool:
    return all(os.path.isfile(os.path.join(path, name)) for name in SAVED)


def has_one_part(path: str) -> bool:
    """Whether rows are in one part, so that a subset or a split chooses nothing: files, a saved data set."""
    if os.path.isdir(path):
        return _is_saved_split(path)
    return not is_hub_dataset(path)


def keys_without_effect(source: Source) -> list[str]:
    """Those of subset, split and revision that are given, and that such a path has no use for."""
    given = {"subset": source.subset, "split": source.split != "train", "revision": source.revision}
    unused = {
        "subset": has_one_part(source.path) or is_saved(source.path),
        "split": has_one_part(source.path),
        "revision": not is_hub_dataset(source.path),
    }
    return [key for key, value in given.items() if value and unused[key]]


def folder_files(source: Source) -> list[Path]:
    """The files of a split of a folder.

    Raises:
        UserError: no such subset or split, no data at all, or files of several kinds, of which `datasets`
            would leave out some.
    """
    splits, unread = _splits_of_folder(source)
    if _declares_files(source):  # which are meant is for the README.md to say
        unread = []
    kinds = {_family(file) for files in splits.values() for file in files}
    if others := [file for file in unread if _family(file) not in kinds]:
        chosen = [file for files in splits.values() for file in files]
        what = f"the folder has files of several kinds: {some(others)} beside {some(chosen)}"
        pattern = f"{source.path.rstrip('/')}/*{''.join(others[0].suffixes)}"
        fix = f"name those of one kind, data.path='{pattern}', or each in data.mixture"
        raise UserError(what, source.path, fix)
    if source.split not in splits:
        what = f"{source.path} has no split {source.split!r}; it has {', '.join(map(str, splits)) or 'none'}"
        raise UserError(what, source.path, did_you_mean(source.split, map(str, splits)))
    return splits[source.split]


def _declares_files(source: Source) -> bool:
    """Whether a README.md in the folder says which files there are data."""
    readme = Path(source.path) / "README.md"
    head = readme.read_text(encoding="utf-8", errors="replace").split("\n---")[0] if readme.is_file() else ""
    return "data_files" in head or "data_dir" in head


def files_without_split(source: Source) -> list[Path]:
    """The files of rows in a folder that belong to none of its splits. Raises UserError as `folder_files`."""
    is_folder = os.path.isdir(source.path) and not is_saved(source.path)
    return _splits_of_folder(source)[1] if is_folder else []


def _splits_of_folder(source: Source) -> tuple[dict[str, list[Path]], list[Path]]:
    """The files of each split of a folder, as `datasets` says, and the files of rows that are in none."""
    builder = ask_datasets(source, "load_dataset_builder")
    of_splits = builder.config.data_files or {}
    splits = {str(split): [Path(file) for file in files] for split, files in of_splits.items()}
    if len(builder.builder_configs) > 1:  # subsets that a README.md declares, each with files of its own
        return splits, []
    from datasets.data_files import FILES_TO_IGNORE

    read = {os.path.realpath(file) for files in splits.values() for file in files}
    folder = Path(_folder_of_subset(source)[0])
    unread = [
        file
        for file in sorted(folder.rglob("*"))
        if kind_of(file) and file.name not in FILES_TO_IGNORE and os.path.realpath(file) not in read
    ]
    # As `datasets` does: what is hidden is no data.
    hidden = (".", "__")
    return splits, [f for f in unread if not any(n.startswith(hidden) for n in f.relative_to(folder).parts)]


def _family(file: Path) -> str:
    """What `datasets` takes for one kind."""
    kind = kind_of(file) or file.suffix
    return {".jsonl": ".json", ".tsv": ".csv"}.get(kind, kind)


def some(files: list[Path], most: int = 3) -> str:
    """The names of the first files, and how many more there are."""
    more = f" and {len(files) - most} more" if len(files) > most else ""
    return ", ".join(file.name for file in files[:most]) + more


def _folder_of_subset(source: Source) -> tuple[str, str | None]:
    """Where the files of a folder's subset are, and what of the subset's name is left to look up there.

    A subset is what the folder's README.md says it is or, where there is none, a folder in it.
    """
    # As an absolute path: what looks like a hub id would be looked for there first.
    path, subset = os.path.abspath(source.path), source.subset
    if subset and os.path.isdir(f"{path}/{subset}") and not os.path.isfile(f"{path}/README.md"):
        return f"{path}/{subset}", None
    return path, subset


def ask_datasets(source: Source, function: str = "load_dataset", **options):
    """The result of a function of `datasets`, `load_dataset` or `load_dataset_builder`, for a source.

    Raises:
        UserError: it is not there, the hub cannot be reached, or it has no such subset or split.
    """
    if is_hub_dataset(source.path) and not hub.has_dataset(source.path) and not hub.is_reachable():
        raise hub.cannot_fetch(f"the data set {source.path}", source.path, hub.dataset_hint(source.path))
    import datasets  # late: it takes a second

    path, subset, revision, fix = source.path, source.subset, source.revision, hub.dataset_hint(source.path)
    if os.path.isdir(path):
        (path, subset), revision = _folder_of_subset(source), None
        fix = "its files must be readable and complete, and have the same columns"
    with _errors_of_datasets(source.path, fix):
        return getattr(datasets, function)(path, subset, revision=revision, **options)


def _load_saved(source: Source):
    """A data set that `save_to_disk` wrote, or the split of one. Raises UserError: no such split, damaged."""
    folder = Path(source.path)
    if not has_one_part(source.path):
        try:
            splits = [str(name) for name in read_json(folder / SAVED_SPLITS)["splits"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"cannot read {SAVED_SPLITS} of a saved data set: {error}"
            raise UserError(what, source.path, "copy it again, or save it anew by save_to_disk") from error
        if source.split not in splits:
            what = f"{source.path} has no split {source.split!r}; it has {', '.join(splits) or 'none'}"
            raise UserError(what, source.path, did_you_mean(source.split, splits))
        folder /= source.split
    import datasets

    with _errors_of_datasets(source.path, "copy it again, or save it anew by save_to_disk"):
        return datasets.load_from_disk(str(folder))


@contextmanager
def _errors_of_datasets(path: str, fix: str) -> Iterator[None]:
    """Has `datasets` say nothing, and raise what it raises as a UserError for this path."""
    import datasets
    import pyarrow

    verbosity = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity_error()
    try:
        yield
        return
    except RuntimeError as error:  # a data set that is a program
        problem, fix = error, "set data.path to its files of rows, or to a copy of it as parquet"
    except (OSError, datasets.exceptions.DatasetGenerationError, pyarrow.ArrowException) as error:
        problem = error.__cause__ or error
    except (ValueError, KeyError) as error:  # no such subset or split: the message lists those there are
        problem = error
        fix = "data.subset and data.split name one part of it, data.revision a version on the hub"
    finally:
        datasets.utils.logging.set_verbosity(verbosity)
    raise UserError(f"cannot load the data set {path}: {problem}", path, fix) from problem
