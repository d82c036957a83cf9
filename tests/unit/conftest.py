import socket

import pytest

from unit.written import load, write_inputs


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """The test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def ready(tmp_path, own_folder):
    """`ready(*overrides)`: a recipe whose inputs are all there, as far as is checked without torch."""
    write_inputs(tmp_path)
    return lambda *overrides: load(tmp_path, "", "model.name_or_path=./model", *overrides)


@pytest.fixture
def ports():
    """(a port that a socket listens on, one that is closed)"""
    with socket.socket() as listening, socket.socket() as closed:
        listening.bind(("127.0.0.1", 0))
        listening.listen(8)
        closed.bind(("127.0.0.1", 0))  # taken, but nobody listens
        yield listening.getsockname()[1], closed.getsockname()[1]
