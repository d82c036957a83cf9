"""What the tests of the doctor make: executables, packages that break; and what would change a report."""

import os
import re
import stat

from speft_ds.config.load_recipe import ROOT

TOKEN = "hf_notAtokenForAnybody"
# What would change the report of a machine.
STRANGE = re.compile(
    "CXX|DS_ACCELERATOR|CUDA_VISIBLE_DEVICES|OMP_NUM_THREADS|MASTER_ADDR|TORCH_EXTENSIONS_DIR|"
    "TRANSFORMERS_OFFLINE|(HF|HUGGING|GLOO)_.*|.*_proxy",
    re.IGNORECASE,
)


def executable(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def found(checks, name):
    (check,) = [check for check in checks if check.name == name]
    return check


def stub(tmp_path, monkeypatch, package, code):
    (tmp_path / "stub" / package).mkdir(parents=True)
    (tmp_path / "stub" / package / "__init__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "stub"), str(ROOT)]))
