import pytest

from unit.tokenizers_small import STYLES


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
