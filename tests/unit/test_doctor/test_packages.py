"""Versions out of range, and installations that are broken for real."""

from pathlib import Path

import pytest
from limits import HANG_S

from speft_ds.doctor.build import check_shm_op
from speft_ds.doctor.collective import check_collectives
from speft_ds.doctor.folders import check_caches
from speft_ds.doctor.gpus import check_gpus
from speft_ds.doctor.packages import check_deepspeed, check_packages, check_python, check_torch
from speft_ds.doctor.processes import ask
from unit.test_doctor.made import stub


def test_versions_out_of_range_or_missing_are_problems_with_a_command():
    wanted = ["rich>=99", "pydantic<1,>=0.5", "no-such-package>=2", "numpy>=1", "nothing>=1; extra == 'dev'"]
    rich, pydantic, missing, numpy = check_packages(wanted, {"numpy": "1.0", "no-such-package": "2.5"})
    assert rich.status == "problem" and rich.what.endswith("is not in >=99")
    assert "-m pip install 'rich>=99'" in rich.fix
    assert pydantic.status == "problem" and "is not in" in pydantic.what
    assert missing.status == "problem" and missing.what == "not installed; needed: >=2"
    assert missing.fix.endswith("-m pip install 'no-such-package==2.5'")
    assert numpy.status == "ok" and numpy.what.endswith("; not the tested version, 1.0")


def test_the_ranges_are_those_of_pyproject():
    checks = check_packages()
    assert {check.status for check in checks} == {"ok"}
    assert {"torch", "deepspeed", "lm-eval"} <= {check.name for check in checks}
    assert not {"pytest", "peft"} & {check.name for check in checks}  # extras
    (old,) = check_python(">=3.99")
    assert old.status == "problem" and ">=3.99" in old.fix


@pytest.mark.parametrize(
    ("code", "timeout_s", "said"),
    [
        (
            "raise ImportError('libtorch.so: undefined symbol')",
            HANG_S,
            "ImportError: libtorch.so: undefined symbol",
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", HANG_S, "killed by SIGSEGV"),
        ("import time; time.sleep(3600)", 3, "no answer in 3 s"),
    ],
)
def test_a_torch_that_does_not_import_crashes_or_hangs(tmp_path, monkeypatch, code, timeout_s, said):
    stub(tmp_path, monkeypatch, "torch", code)
    facts = ask("torch", timeout_s)
    (check,) = check_torch(facts)
    assert check.status == "problem" and said in check.what and "pip install" in check.fix
    dependent = [
        *check_gpus(facts, [], None),
        *check_deepspeed(facts),
        *check_shm_op(facts),
        *check_collectives(facts),
    ]
    assert {check.status for check in dependent} == {"skipped"}
    assert len(check_caches(facts)) == 1


def test_a_deepspeed_that_does_not_import(tmp_path, monkeypatch):
    stub(tmp_path, monkeypatch, "deepspeed", "raise RuntimeError('CUDA_HOME does not exist')")
    facts = ask("torch", HANG_S)
    assert check_torch(facts)[0].status == "ok"
    (check,) = check_deepspeed(facts)
    assert check.status == "problem" and "CUDA_HOME does not exist" in check.what
    assert "pip install --force-reinstall --no-deps deepspeed" in check.fix


def test_extensions_are_looked_for_where_torch_puts_them(tmp_path, monkeypatch):
    from torch.utils import cpp_extension

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    facts = ask("torch", HANG_S)
    assert str(Path(facts["extensions"]) / "op") == cpp_extension._get_build_directory("op", False)
    assert facts["accelerator"] and facts["backend"] and "shm_op_compatible" in facts
