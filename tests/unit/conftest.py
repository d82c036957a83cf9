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
