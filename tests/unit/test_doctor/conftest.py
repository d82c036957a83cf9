import os

import pytest

from speft_ds.config.load_recipe import ROOT
from unit.test_doctor.made import STRANGE


@pytest.fixture(autouse=True)
def _plain_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in filter(STRANGE.fullmatch, list(os.environ)):
        monkeypatch.delenv(name)
