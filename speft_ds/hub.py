"""The model hub: what of it is cached here, and whether it can be reached.

Imports no torch; asks the network once.
"""

from __future__ import annotations

import os
import re
import socket
import urllib.request
from functools import lru_cache
from pathlib import Path
from threading import Thread
from urllib.parse import urlparse

from speft_ds.errors import UserError, shell
from speft_ds.io import read_json
from speft_ds.untrusted import path_within, without_secrets

TIMEOUT_S = 1.5  # for the hub to answer
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
CONFIG_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken")  # of configuration and tokenizer
BY_US = "YES"  # how we write HF_HUB_OFFLINE=1: it tells ranks and sub-processes who chose it
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_TRUE = {"1", "ON", "YES", "TRUE"}


def is_hub_id(name: str) -> bool:
    """Whether a name has the form owner/name, and no file or folder here has it."""
    return HUB_ID.fullmatch(name) is not None and not os.path.exists(name)


def public_name(name_or_path: str) -> str:
    """A hub id as it is; of a local file or folder its last part, which says nothing of the machine."""
    return name_or_path if is_hub_id(name_or_path) else Path(name_or_path).name or name_or_path


def is_offline_by_choice() -> bool:
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    return any(os.environ.get(name, "").upper() in _TRUE for name in names)


def go_offline() -> None:
    """Have the hub's libraries use their cache alone; to be called before any of them is imported."""
    os.environ["HF_HUB_OFFLINE"] = BY_US


def is_reachable() -> bool:
    """Whether a connection to the hub opens within TIMEOUT_S; False at once where the user says offline."""
    return not is_offline_by_choice() and _opens(endpoint())


@lru_cache
def _opens(address: str) -> bool:
    """Whether a connection to an address opens in time; looking up a name has no time limit of its own."""
    answers: list[str | None] = []
    attempt = Thread(target=lambda: answers.append(connection_error(address)), daemon=True)
    attempt.start()
    attempt.join(TIMEOUT_S)
    return answers == [None]


def connection_error(url: str) -> str | None:
    """Why the host of a URL, or the proxy in front of it, takes no TCP connection; None where it does."""
    direct = urlparse(url)
    bypass = urllib.request.proxy_bypass(direct.hostname or "")
    proxy = None if bypass else urllib.request.getproxies().get(direct.scheme)
    target = urlparse(proxy if "//" in proxy else f"//{proxy}") if proxy else direct
    try:
        port = target.port or (443 if target.scheme == "https" else 80)
        socket.create_connection((target.hostname, port), timeout=TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        return f"{error} (proxy {target.hostname})" if proxy else str(error)
    return None


def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def public_endpoint() -> str:
    """The hub's address as others may see it: without a password."""
    return without_secrets(endpoint())


def _home() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("HF_HOME", f"{cache}/huggingface")).expanduser()


def _hub_cache() -> Path:
    return Path(os.environ.get("HF_HUB_CACHE", _home() / "hub")).expanduser()


def model_folder(name_or_path: str) -> Path | None:
    """A local model folder, or where the hub's cache has the model's config; None: neither."""
    folder = _folder(name_or_path, "models")
    return folder if folder and (os.path.isdir(name_or_path) or (folder / "config.json").is_file()) else None


def dataset_folder(name_or_path: str) -> Path | None:
    """A local folder of data, or where the hub's cache has files of the data set; None: neither."""
    return _folder(name_or_path, "datasets")


def _folder(name_or_path: str, kind: str) -> Path | None:
    if os.path.isdir(name_or_path):
        return Path(name_or_path)
    repo = _hub_cache() / f"{kind}--{name_or_path.replace('/', '--')}"
    try:
        commit = (repo / "refs" / "main").read_text(encoding="utf-8").strip()
        return path_within(repo / "snapshots", commit)
    except (OSError, ValueError):  # it is not cached, or not as the hub's library does it
        return None


def weight_files(folder: Path) -> list[str]:
    """The files of weights that transformers reads of a model folder, in its order; they may not be there.

    Raises:
        OSError, ValueError: the index of several files cannot be read.
    """
    for kind in WEIGHT_FILES:
        if (folder / kind).is_file():
            return [kind]
        if (index := folder / f"{kind}.index.json").is_file():
            return shards_of(index)
    return [WEIGHT_FILES[0]]


def missing_weights(folder: Path) -> list[str]:
    """Files of weights that a model folder should have and has not."""
    try:
        return [file for file in weight_files(folder) if not (folder / file).is_file()]
    except (OSError, ValueError) as error:
        return [f"a readable index of its weights ({error})"]


def shards_of(index: Path) -> list[str]:
    """The files that the index of a model's weights names, sorted: in its folder, or in folders below it.

    Raises:
        OSError, ValueError: it cannot be read, names none, or names one elsewhere.
    """
    document = read_json(index)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index.name} has no weight_map")
    return sorted({str(path_within(Path(), name, subfolders=True)) for name in weight_map.values()})


def has_dataset(name: str) -> bool:
    """Whether the caches hold files of a hub data set; whether all it needs, only loading it shows."""
    prepared = Path(os.environ.get("HF_DATASETS_CACHE", _home() / "datasets")).expanduser()
    folders = (_hub_cache() / f"datasets--{name.replace('/', '--')}", prepared / name.replace("/", "___"))
    return any(folder.is_dir() for folder in folders)


def why_unreachable() -> str:
    """Why nothing can be fetched."""
    by_choice = is_offline_by_choice() and os.environ.get("HF_HUB_OFFLINE") != BY_US
    return "offline by choice (HF_HUB_OFFLINE)" if by_choice else f"no answer from {public_endpoint()}"


def model_hint(name: str, key: str) -> str:
    return (
        f"with a network: {shell('hf', 'download', name)} (a gated model first needs its licence accepted "
        f"on its page and hf auth login); or set {key} to a local folder"
    )


def dataset_hint(name: str) -> str:
    return (
        f"with a network: {shell('hf', 'download', '--repo-type', 'dataset', name)}; "
        "or set data.path to a local file or folder of the rows"
    )


def cannot_fetch(what: str, where: str, fix: str) -> UserError:
    """The error for a model or a data set that is not cached while the hub cannot be reached."""
    why = why_unreachable()
    return UserError(f"{what} is not in the hub's cache, and cannot be fetched: {why}", where, fix)
