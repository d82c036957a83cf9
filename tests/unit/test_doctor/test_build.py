"""What DeepSpeed compiles and maps, every failure for real."""

import os
import sys
import time

from speft_ds.doctor import Check
from speft_ds.doctor.build import check_compiler, check_ninja, check_shared_memory, check_shm_op
from unit.test_doctor.made import executable


def test_no_compiler_on_the_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (check,) = check_compiler()
    assert check.status == "problem" and check.what == "no c++ on the PATH" and "g++" in check.fix
    other = executable(tmp_path / "g++", "exit 0")
    assert check_compiler()[0].fix == f"export CXX={other}"


def test_a_compiler_without_the_headers_of_python(tmp_path, monkeypatch):
    drop = 'for a; do shift; case "$a" in -I*) ;; *) set -- "$@" "$a";; esac; done'
    monkeypatch.setenv("CXX", str(executable(tmp_path / "cxx", f'{drop}\nexec c++ "$@"')))
    (check,) = check_compiler()
    assert check.status == "problem" and "Python.h" in check.what and "python3-dev" in check.fix


def test_a_compiler_that_is_too_old(tmp_path, monkeypatch):
    script = "echo \"c++: error: unrecognized command-line option '-std=c++20'\" >&2; exit 1"
    monkeypatch.setenv("CXX", str(executable(tmp_path / "cxx", script)))
    (check,) = check_compiler()
    assert check.status == "problem" and "-std=c++20" in check.what and "g++ 11" in check.fix


def test_ninja_that_is_not_on_the_path_or_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    executable(tmp_path / "venv" / "ninja", "echo 1.13")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "python"))
    (check,) = check_ninja()
    assert check.status == "warning" and check.what.startswith("1.13, ") and "activate" in check.fix
    (tmp_path / "venv" / "ninja").unlink()
    (check,) = check_ninja()
    assert check.status == "problem" and "pip install ninja" in check.fix


def test_the_shared_memory_op(tmp_path):
    facts = {"shm_op_compatible": True, "shm_op_installed": False, "extensions": str(tmp_path)}
    folder = tmp_path / "deepspeed_shm_comm"

    def check():
        return check_shm_op(facts)[0]

    assert (check().status, check().what[:13]) == ("ok", "not built yet")
    folder.mkdir()
    (folder / "deepspeed_shm_comm.so").write_bytes(b"")
    assert check() == Check("shared-memory op", "ok", f"built, {folder}")
    (folder / "lock").write_bytes(b"")
    assert check().status == "ok" and "being compiled now" in check().what
    os.utime(folder / "lock", (time.time() - 3600,) * 2)
    assert check().status == "warning" and check().fix == f"rm -r {folder}"
    facts["shm_op_compatible"] = False
    assert check().status == "ok" and "gloo alone" in check().what


def test_shared_memory_that_is_too_small(tmp_path):
    (tmp_path / "deepspeed_allreduce_buffer_0_x_1_0").write_bytes(b"")
    assert check_shared_memory(False, tmp_path)[0].status == "ok"
    (check,) = check_shared_memory(False, tmp_path, needed_mib=1e9)
    assert check.status == "problem" and "1 DeepSpeed buffers" in check.what
    assert "--shm-size=2g" in check.fix and "deepspeed_allreduce_buffer_*" in check.fix
    assert check_shared_memory(True, tmp_path, needed_mib=1e9)[0].status == "warning"
    assert check_shared_memory(False, tmp_path / "none")[0].status == "problem"
