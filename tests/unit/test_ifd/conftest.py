import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for each test, and the CPU's fp32 on any machine."""
    monkeypatch.setenv("SPEFT_DS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is so small that threads would mostly wait for each other
    yield tmp_path / "cache" / "ifd"
    torch.set_num_threads(num_threads)


@pytest.fixture
def scorer(tiny, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny["untied"], tmp_path / "scorer"))


@pytest.fixture
def loads(monkeypatch):
    """Counts the models that are loaded."""
    counted, original = [], AutoModelForCausalLM.from_pretrained

    def counting(*args, **options):
        counted.append(args)
        return original(*args, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counting)
    return counted
