"""What DeepSpeed compiles on its first start, and the shared memory that it maps."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

from speft_ds.comm import deepspeed_shm
from speft_ds.doctor.check import MIB, Check
from speft_ds.doctor.gpus import uses_gpus
from speft_ds.doctor.packages import PIP_INSTALL
from speft_ds.doctor.processes import run_tool

SHM_MIB_A_RANK = 66  # what DeepSpeed's collectives on the CPU map for every rank
# As DeepSpeed's op; torch 2.13 compiles extensions as C++20, which has `concepts`.
HELLO = "#include <Python.h>\n#include <omp.h>\n#include <concepts>\nint hello() { return 0; }\n"


def check_compiler() -> list[Check]:
    """That the compiler which torch would call builds a Python extension as DeepSpeed's op is built."""
    compiler = os.environ.get("CXX", "c++")
    path = shutil.which(compiler)
    if path is None:
        other = shutil.which("g++") or shutil.which("clang++")
        fix = f"export CXX={other}" if other else "install one: apt-get install g++"
        return [Check("C++ compiler", "problem", f"no {compiler} on the PATH", fix)]
    with tempfile.TemporaryDirectory() as folder:
        source, flags = Path(folder) / "hello.cpp", ["-std=c++20", "-fopenmp", "-fPIC", "-shared"]
        source.write_text(HELLO)
        include = f"-I{sysconfig.get_path('include')}"
        error = run_tool([path, *flags, include, str(source), "-o", str(source.with_suffix(".so"))])[1]
    if error is None:
        version = (run_tool([path, "--version"])[0].splitlines() or [""])[0]
        return [Check("C++ compiler", "ok", f"{path}: {version}; builds a Python extension")]
    fix = "install g++ 11 or newer with OpenMP, or export CXX=ANOTHER"
    if "Python.h" in error:
        fix = "install the headers of this Python: apt-get install python3-dev"
    return [Check("C++ compiler", "problem", f"{path} cannot build a Python extension: {error}", fix)]


def check_ninja() -> list[Check]:
    """That ninja runs, found as `speft` finds it for a run: beside this Python first."""
    beside = str(Path(sys.executable).parent)
    path = shutil.which("ninja", path=os.pathsep.join([beside, os.environ.get("PATH", os.defpath)]))
    output, error = run_tool([path, "--version"]) if path else ("", "not found")
    if error:
        what = f"{error}; DeepSpeed compiles its op with it"
        return [Check("ninja runs", "problem", what, f"{PIP_INSTALL} ninja")]
    if shutil.which("ninja") is None:
        fix = "source .venv/bin/activate, before `deepspeed launch/...`  (`speft` commands find it)"
        return [Check("ninja runs", "warning", f"{output.strip()}, {path}: not on the PATH", fix)]
    return [Check("ninja runs", "ok", f"{output.strip()}, {path}")]


def check_shm_op(facts: dict) -> list[Check]:
    """DeepSpeed's shared-memory op for CPU ranks: there, to be compiled, or stuck behind a dead build."""
    name = "shared-memory op"
    if uses_gpus(facts):
        return [Check(name, "skipped", "not needed: GPUs talk over NCCL")]
    if "shm_op_compatible" not in facts:
        return [Check(name, "skipped", f"DeepSpeed does not say: {facts.get('error')}")]
    if not facts["shm_op_compatible"]:
        return [Check(name, "ok", "not for this machine: collectives use gloo alone")]
    folder = Path(facts["extensions"]) / deepspeed_shm.NAME
    found = "not built yet: the first start compiles it, about 30 s"
    if facts["shm_op_installed"]:
        found = "installed with DeepSpeed"
    elif (folder / f"{deepspeed_shm.NAME}.so").is_file():
        found = f"built, {folder}"
    age_s = deepspeed_shm.lock_age_s(folder)
    if age_s is None:
        return [Check(name, "ok", found)]
    if age_s < deepspeed_shm.STALE_S:
        return [Check(name, "ok", f"being compiled now, since {age_s:.0f} s")]
    what = (
        f"a build that was interrupted left {folder / 'lock'}: a run of ours removes it, others wait for ever"
    )
    return [Check(name, "warning", what, f"rm -r {folder}")]


def check_shared_memory(
    with_gpus: bool, folder: Path = Path("/dev/shm"), needed_mib: float = 2 * SHM_MIB_A_RANK
) -> list[Check]:
    """Space in /dev/shm; a rank that finds none is killed by SIGBUS without a word."""
    name = str(folder)
    if not folder.is_dir():
        return [Check(name, "problem", "is not there", "mount it: mount -t tmpfs tmpfs /dev/shm")]
    space = shutil.disk_usage(folder)
    left_over = list(folder.glob("deepspeed_allreduce_buffer_*"))
    what = f"{space.free / MIB:,.0f} MiB free of {space.total / MIB:,.0f} MiB"
    if left_over:
        what += f" ({len(left_over)} DeepSpeed buffers of running or dead runs in it)"
    if space.free >= needed_mib * MIB:
        return [Check(name, "ok", what)]
    fix = "in a container: docker run --shm-size=2g, or --ipc=host; else remount it larger"
    if left_over:
        fix = f"if no run is on: rm {folder}/deepspeed_allreduce_buffer_*; {fix}"
    need = "NCCL wants more" if with_gpus else f"2 CPU ranks map {needed_mib:,.0f} MiB"
    return [Check(name, "warning" if with_gpus else "problem", f"{what}; {need}", fix)]
