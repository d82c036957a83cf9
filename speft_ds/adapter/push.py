"""Uploading an adapter to the model hub."""

from __future__ import annotations

from pathlib import Path

from speft_ds import hub
from speft_ds.adapter.format import CARD, FACTS, TENSORS, TOKENIZER, Adapter, open_adapter
from speft_ds.adapter.low_rank import PEFT_TENSORS
from speft_ds.config.check_model import PEFT_CONFIG
from speft_ds.errors import UserError, shell
from speft_ds.untrusted import without_secrets


def files_to_push(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of an adapter's folder that are uploaded, and what lies there and is not.

    Links, which may lead elsewhere, hidden files and other folders than the tokenizer's stay.
    """
    tokenizer = folder / TOKENIZER
    inside = sorted(folder.iterdir())
    if tokenizer.is_dir() and not tokenizer.is_symlink():
        inside.remove(tokenizer)
        inside += sorted(tokenizer.iterdir())
    chosen = [p for p in inside if p.is_file() and not p.is_symlink() and not p.name.startswith(".")]
    return chosen, [path for path in inside if path not in chosen]


def notes(adapter: Adapter) -> list[str]:
    """What the owner of an adapter should know before others see it."""
    found = []
    if not (adapter.folder / CARD).is_file():
        found.append(f"note: it has no {CARD}: nobody will know what it is")
    if not hub.is_hub_id(adapter.facts["base"]):
        found.append(f"note: others will not find its base, which is {adapter.facts['base']}")
    if adapter.facts.get("recipe"):
        found.append("note: adapter.json has the run's recipe in it, with its paths")
    return found


def push(source: str | Path, repo_id: str, private: bool = False) -> str:
    """Upload an adapter to a repository of the model hub, which is made where there is none.

    The token is the one of `hf auth login` or of HF_TOKEN, the hub that of HF_ENDPOINT.

    Args:
        source: an adapter, or the folder of a run; repo_id: `owner/name`.
        private: whether nobody else sees a repository that is made.
    Returns:
        The repository's address.
    Raises:
        UserError: no complete adapter, no token, no network, or the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HTTPError  # its HTTP library's: of what the hub says, too

    folder = open_adapter(source, reads_low_rank=True).folder
    files, left_out = files_to_push(folder)
    if odd := {TENSORS, FACTS, PEFT_TENSORS, PEFT_CONFIG} & {path.name for path in left_out}:
        what = f"{min(odd)} is a link: only files that lie in the folder are uploaded"
        raise UserError(what, str(folder), f"{shell('cp', '-rL', folder, 'FOLDER')}, and push that")
    if not hub.HUB_ID.fullmatch(repo_id):
        raise UserError(f"{repo_id} names no repository", "REPO_ID", "owner/name")
    if (token := get_token()) is None:
        raise UserError("there is no token to upload with", "model hub", "hf auth login, or set HF_TOKEN")
    if not hub.is_reachable():
        fix = "connect this machine, or copy the folder to one that is; --dry-run needs no network"
        raise UserError(f"nothing can be uploaded: {hub.why_unreachable()}", hub.endpoint(), fix)
    api = HfApi(endpoint=hub.endpoint(), token=token)
    try:
        address = api.create_repo(repo_id, private=private or None, exist_ok=True)
        operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
        api.create_commit(repo_id, operations, commit_message="Upload an adapter of speft_ds")
    except (HTTPError, OSError, ValueError) as error:
        fix = f"check the name, and that your token may write to {repo_id}: hf auth whoami"
        raise UserError(f"the hub did not take it: {error}", hub.endpoint(), fix) from error
    return without_secrets(str(address))
