"""Hosts, proxies, tokens, against sockets of this machine."""

import socket

import pytest
from limits import HANG_S

from speft_ds.doctor.network import check_hub
from speft_ds.doctor.processes import ask
from speft_ds.hub import connection_error
from unit.test_doctor.made import TOKEN, found, stub


@pytest.fixture
def ports():
    """(a port that somebody listens on, one that is closed)"""
    with socket.socket() as listening, socket.socket() as closed:
        listening.bind(("127.0.0.1", 0))
        listening.listen(8)
        closed.bind(("127.0.0.1", 0))  # taken, but nobody listens
        yield listening.getsockname()[1], closed.getsockname()[1]


def hub():
    return check_hub(ask("hub", HANG_S))


def test_a_hub_that_is_reachable_or_not(ports, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{ports[0]}")
    assert found(hub(), "hub").what == "127.0.0.1 is reachable"
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{ports[1]}")
    check = found(hub(), "hub")
    assert (
        check.status == "warning" and "127.0.0.1 is not reachable" in check.what and "refused" in check.what
    )
    assert "HF_HUB_OFFLINE=1" in check.fix and "model.name_or_path=FOLDER" in check.fix


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_offline_by_choice(ports, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{ports[1]}")
    check = found(hub(), "hub")
    assert check.status == "ok" and check.what.startswith("offline by choice")


def test_a_proxy_is_what_has_to_answer(ports, monkeypatch):
    monkeypatch.setenv("https_proxy", f"http://me:secret@127.0.0.1:{ports[0]}")
    assert connection_error("https://hub.invalid") is None
    monkeypatch.setenv("https_proxy", f"me:secret@127.0.0.1:{ports[1]}")
    error = connection_error("https://hub.invalid")
    assert "refused" in error and "(proxy 127.0.0.1)" in error and "secret" not in error
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert connection_error(f"https://127.0.0.1:{ports[0]}") is None


def test_a_host_that_does_not_answer_is_given_up():
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


def test_no_hub_library(tmp_path, monkeypatch):
    stub(tmp_path, monkeypatch, "huggingface_hub", "raise ImportError('gone')")
    (check,) = hub()
    assert check.status == "problem" and "gone" in check.what and "pip install" in check.fix


def test_the_token_is_mentioned_but_never_told(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert found(hub(), "hub token").what.startswith("none")
    (tmp_path / "token").write_text(TOKEN)
    facts = ask("hub", HANG_S)
    assert found(check_hub(facts), "hub token").what == "there is one" and TOKEN not in str(facts)


def test_a_file_where_the_home_should_be(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    checks = hub()
    assert found(checks, "hub token").status == "warning"
    check = found(checks, "HF_HOME")
    assert check.status == "problem" and "Not a directory" in check.what and "export HF_HOME=" in check.fix
