"""Planted tokens and passwords: in nothing that is printed, and in no file of a run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from limits import HANG_S
from tiny import recipe_values

from speft_ds.env import free_port

ROOT = Path(__file__).resolve().parent.parent.parent
SECRETS = ["hf_" + "PlantedToken" * 3, "0123planted456789wandb", "planted-password", "planted-proxy-word"]
TOKEN, WANDB, PASSWORD, PROXY = SECRETS


def planted():
    """The environment of a user with tokens, and a hub and a proxy with passwords, where nobody listens."""
    hub, proxy = f"http://me:{PASSWORD}@127.0.0.1:9", f"http://me:{PROXY}@127.0.0.1:9"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    tokens = {"HF_TOKEN": TOKEN, "HUGGING_FACE_HUB_TOKEN": TOKEN, "WANDB_API_KEY": WANDB, "HF_ENDPOINT": hub}
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), proxy)
    own = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "PATH": path}
    return (
        {name: value for name, value in os.environ.items() if "OFFLINE" not in name} | tokens | proxies | own
    )


def said(*command, code=0):
    done = subprocess.run(command, capture_output=True, text=True, env=planted(), check=False, timeout=HANG_S)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def found_in(content):
    return [secret for secret in SECRETS if secret.encode() in content]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A finished run of the real launcher, and all that it said."""
    folder = tmp_path_factory.mktemp("planted")
    scores = {"tasks": ["tiny_choice"], "include_path": str(tiny["tasks"]), "batch_size": 8, "limit": 5}
    train = {"steps": 2, "monitor": "csv"}
    values = recipe_values(tiny, train=train, eval=scores, output_dir=str(folder / "run"))
    (folder / "mine.yaml").write_text(yaml.safe_dump(values))
    launcher = (
        Path(sys.executable).with_name("deepspeed"),
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
    )
    text = said(*launcher, ROOT / "launch" / "train.py", "--recipe", folder / "mine.yaml")
    return folder / "run", text


def test_no_secret_is_in_a_run(run):
    folder, text = run
    assert "step     2/2" in text and "no answer from http://127.0.0.1:9" in text
    assert found_in(text.encode()) == []
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"run.json", "recipe.yaml", "report.html", "report.md", "README.md", "manifest.json"} <= names
    assert {path: found for path in files if (found := found_in(path.read_bytes()))} == {}


def test_no_secret_is_in_what_commands_say(run, tmp_path):
    folder, _ = run
    speft, mine = (sys.executable, "-m", "speft_ds.cli.main"), str(folder.parent / "mine.yaml")
    missing = (f"output_dir={tmp_path / 'new'}", "model.name_or_path=owner/name", f"data.path={TOKEN}")
    texts = [
        said(*speft, "validate", mine, *missing, code=2),
        said(*speft, "validate", mine, *missing[:2], code=2),
        said(*speft, "submit", mine, missing[0], "--dry-run"),
        said(*speft, "push", str(folder), "me/mine", code=2),
        said(*speft, "merge", str(folder), str(tmp_path / "merged"), "--base", "owner/name", code=2),
    ]
    assert all(texts) and "owner/name" in texts[1]
    assert [found_in(text.encode()) for text in texts] == [[]] * len(texts)
