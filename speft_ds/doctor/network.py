"""The model hub: whether it can be reached, whether there is a token, where models are kept."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from speft_ds.doctor.check import Check
from speft_ds.doctor.folders import check_folder
from speft_ds.doctor.packages import reinstall
from speft_ds.hub import endpoint, is_offline_by_choice


def check_hub(facts: dict) -> list[Check]:
    """Whether models can be fetched, whether there is a token, and where they are kept."""
    if "home" not in facts:
        what = f"huggingface_hub does not import: {facts.get('error')}"
        return [Check("hub", "problem", what, reinstall("huggingface_hub"))]
    home = check_folder("HF_HOME", Path(facts["home"]), "HF_HOME", enough_gib=5)
    return [_check_host(facts), _check_token(facts), home]


def _check_host(facts: dict) -> Check:
    if is_offline_by_choice():
        what = "offline by choice (HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE or HF_DATASETS_OFFLINE)"
        return Check("hub", "ok", what)
    host, why = urlsplit(endpoint()).hostname, facts.get("unreachable", facts.get("error"))
    if why is None:
        return Check("hub", "ok", f"{host} is reachable")
    fix = (
        "without it: HF_HUB_OFFLINE=1 and HF_HOME=FOLDER with what was fetched elsewhere, or "
        "model.name_or_path=FOLDER; behind a proxy or a mirror: HTTPS_PROXY=..., HF_ENDPOINT=..."
    )
    return Check("hub", "warning", f"{host} is not reachable: {why}", fix)


def _check_token(facts: dict) -> Check:
    if "has_token" not in facts:
        return Check("hub token", "warning", f"cannot be read: {facts.get('error')}", "hf auth login")
    what = "there is one" if facts["has_token"] else "none (only gated models need one: hf auth login)"
    return Check("hub token", "ok", what)
