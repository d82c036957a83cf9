import pytest
import tiny
import torch

from unit.data.tokenizers_small import STYLES


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, and the CPU's fp32 on any machine."""
    monkeypatch.setenv("SPEFT_DS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path):
    """A folder with a tokenizer of one token per byte."""
    tiny.make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    return str(tmp_path / "model")


@pytest.fixture
def path(tmp_path):
    return tiny.make_data(tmp_path / "data", num_rows=30)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {name: style.make(folder / name) for name, style in STYLES.items()}


@pytest.fixture(params=STYLES)
def style(request):
    return STYLES[request.param]


@pytest.fixture
def tokenizer(style, tokenizers):
    return tokenizers[style.name]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of rows; what `datasets` makes of it is thrown away."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    (tmp_path / "rows").mkdir()
    return tmp_path / "rows"
