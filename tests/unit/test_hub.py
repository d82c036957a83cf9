"""The model hub: files of a model folder; connections, against sockets of this machine."""

import json
import socket

import pytest

from speft_ds.hub import connection_error, missing_weights, weight_files


def test_the_files_of_weights_are_those_that_transformers_reads(tmp_path):
    """What is there of a kind that comes later, or that no index names, is no part of the model."""
    weight_map = {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}
    assert missing_weights(tmp_path) == weight_files(tmp_path) == ["model.safetensors"]
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "pytorch_model-1.bin").touch()
    (tmp_path / "pytorch_model-9.bin").touch()
    assert weight_files(tmp_path) == sorted(weight_map.values())
    assert missing_weights(tmp_path) == ["pytorch_model-2.bin"]
    for file in ("pytorch_model.bin", "model.safetensors"):
        (tmp_path / "consolidated.safetensors").touch()
        (tmp_path / file).touch()
        assert weight_files(tmp_path) == [file] and missing_weights(tmp_path) == []
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    assert len(missing_weights(tmp_path)) == 1
    with pytest.raises(ValueError):
        weight_files(tmp_path)


def test_a_proxy_is_what_has_to_answer(ports, monkeypatch):
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("https_proxy", f"http://me:secret@127.0.0.1:{ports[0]}")
    assert connection_error("https://hub.invalid") is None
    monkeypatch.setenv("https_proxy", f"me:secret@127.0.0.1:{ports[1]}")
    error = connection_error("https://hub.invalid")
    assert "refused" in error and "(proxy 127.0.0.1)" in error and "secret" not in error
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert connection_error(f"https://127.0.0.1:{ports[0]}") is None


def test_a_host_that_does_not_answer_is_not_waited_for():
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen(0)
        callers = [socket.socket() for _ in range(4)]  # they fill the queue: the next one hears nothing
        for caller in callers:
            caller.setblocking(False)
            caller.connect_ex(busy.getsockname())
        error = connection_error(f"http://127.0.0.1:{busy.getsockname()[1]}")
        for caller in callers:
            caller.close()
    assert "timed out" in error
