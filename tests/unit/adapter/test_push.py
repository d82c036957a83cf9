"""Uploads to a stand-in hub: what arrives, what does not, and how it fails."""

import pytest

from speft_ds import hub
from speft_ds.adapter.card import write_card
from speft_ds.adapter.push import files_to_push, push
from unit.adapter.hub_server import TOKEN, HubServer
from unit.adapter.samples import matrices, refused, write
from unit.commands import run

OURS = ["README.md", "adapter.json", "adapter.safetensors"]


@pytest.fixture
def server(monkeypatch):
    server = HubServer()
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    hub._opens.cache_clear()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def adapter(tmp_path):
    folder = write(tmp_path / "run" / "adapter", matrices(0))
    write_card(folder, [])
    return folder


def test_the_files_of_the_folder_arrive(server, adapter):
    (adapter / "NOTES.txt").write_text("mine")
    address = push(adapter.parent, "me/mine")  # the folder of the run
    assert address == f"{server.address}/me/mine" and server.repositories == {"me/mine": False}
    assert server.files == {path.name: path.read_bytes() for path in adapter.iterdir()}
    assert sorted(server.files) == sorted([*OURS, "NOTES.txt"])


def test_the_tokenizer_of_new_tokens_is_uploaded(server, adapter):
    (adapter / "tokenizer").mkdir()
    (adapter / "tokenizer" / "tokenizer.json").write_text("{}")
    push(adapter, "me/mine")
    assert sorted(server.files) == sorted([*OURS, "tokenizer/tokenizer.json"])


def test_nothing_outside_the_folder_is_uploaded(server, adapter, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    (adapter / "link.txt").symlink_to(tmp_path / "secret.txt")
    (adapter / "elsewhere").symlink_to(tmp_path)
    (adapter / ".env").write_text("secret")
    (adapter / "inner").mkdir()
    (adapter / "inner" / "secret.txt").write_text("secret")
    (adapter.parent / "run.json").write_text("{}")
    chosen, left_out = files_to_push(adapter)
    assert [path.name for path in chosen] == OURS
    assert [path.name for path in left_out] == [".env", "elsewhere", "inner", "link.txt"]
    push(adapter, "me/mine")
    assert sorted(server.files) == OURS


def test_how_it_fails(server, adapter, monkeypatch, tmp_path):
    for name in ("mine", "me/a b"):
        refused(lambda name=name: push(adapter, name), "REPO_ID", name)
    refused(lambda: push(tmp_path, "me/mine"), tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(lambda: push(adapter, "me/mine"), server.address, "401")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_STORED_TOKENS_PATH", str(tmp_path / "none"))
    refused(lambda: push(adapter, "me/mine"), "model hub")
    assert server.files == {}


def test_without_a_network_it_says_so(adapter, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    hub._opens.cache_clear()
    refused(lambda: push(adapter, "me/mine"), "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(lambda: push(adapter, "me/mine"), what="HF_HUB_OFFLINE")


def test_a_damaged_or_linked_adapter_is_not_uploaded(server, adapter):
    path, elsewhere = adapter / "adapter.safetensors", adapter.parent / "adapter.safetensors"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    refused(lambda: push(adapter, "me/mine"), adapter, path.name)
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(lambda: push(adapter, "me/mine"), adapter)
    assert server.repositories == {} and server.files == {}


def test_the_command(server, adapter, monkeypatch, capsys):
    (adapter / ".hidden").touch()
    assert run(monkeypatch, "push", str(adapter), "me/mine", "--dry-run") == 0
    out = capsys.readouterr().out
    assert all(f"  {name}  {(adapter / name).stat().st_size:,} bytes" in out for name in OURS)
    notes = [line for line in out.splitlines() if line.startswith("note:")]
    assert ".hidden" in out and server.files == {} and len(notes) == 1 and "recipe" in notes[0]
    assert run(monkeypatch, "push", str(adapter.parent), "me/mine", "--private") == 0
    assert f"{server.address}/me/mine" in capsys.readouterr().out
    assert sorted(server.files) == OURS and server.repositories == {"me/mine": True}
