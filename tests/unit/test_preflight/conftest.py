import pytest

from unit.written import load


@pytest.fixture
def ready(tmp_path, own_folder):
    """A recipe whose inputs are all there."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_text("")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n\n' * 3)

    def make(*overrides):
        return load(tmp_path, "", "model.name_or_path=./model", *overrides)

    return make
