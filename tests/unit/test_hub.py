"""Connections to the model hub, against sockets of this machine."""

import socket

from speft_ds.hub import connection_error


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
