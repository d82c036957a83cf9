"""GPUs: those of the driver against those that torch can use; bf16 and NCCL."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from speft_ds.doctor.check import GIB, Check
from speft_ds.doctor.packages import reinstall
from speft_ds.doctor.processes import run_tool


def uses_gpus(facts: dict) -> bool:
    """Whether a run would use GPUs: torch sees some, and nobody asked for the CPU."""
    return bool(facts.get("gpus")) and not _cpu_by_choice()


def _cpu_by_choice() -> bool:
    return os.environ.get("DS_ACCELERATOR") == "cpu" or os.environ.get("CUDA_VISIBLE_DEVICES") == ""


def list_gpus() -> tuple[list[str], str | None]:
    """nvidia-smi's lines `name, memory, driver`, and None or why it failed; without it, device files."""
    if shutil.which("nvidia-smi") is None:
        return [f"{path}, no nvidia-smi to ask" for path in sorted(Path("/dev").glob("nvidia[0-9]*"))], None
    query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    output, error = run_tool(["nvidia-smi", *query])
    return [] if error else [line.strip() for line in output.splitlines() if line.strip()], error


def check_gpus(facts: dict, listed: list[str], smi_error: str | None) -> list[Check]:
    """The driver's GPUs against torch's; bf16 and NCCL.

    Args:
        facts: of torch, from `ask`.
        listed, smi_error: from `list_gpus`.
    """
    checks = [Check(f"GPU {i}", "ok", line) for i, line in enumerate(listed)]
    if smi_error:
        fix = "load the driver (after an update of it: reboot); in a container: docker run --gpus all"
        needed = Path("/dev/nvidia0").exists() and not _cpu_by_choice()
        checks.append(Check("nvidia-smi", "problem" if needed else "warning", f"fails: {smi_error}", fix))
    if "torch" not in facts:
        return [*checks, Check("GPUs of torch", "skipped", "torch does not import")]
    checks.append(_gpus_of_torch(facts, listed))
    if not facts["gpus"]:
        return [*checks, _cpu_bf16(facts["cpu_bf16"]), Check("NCCL", "skipped", "no GPU")]
    return [*checks, _gpu_bf16(facts["gpu_bf16"]), _nccl(facts["nccl"])]


def _gpus_of_torch(facts: dict, listed: list[str]) -> Check:
    name, visible = "GPUs of torch", os.environ.get("CUDA_VISIBLE_DEVICES")
    note = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
    seen = [f"{gpu} {memory / GIB:.0f} GiB" for gpu, memory in facts["gpus"]]
    error = facts.get("gpu_error", facts.get("error")) if seen else None
    if error:
        fix = "see in nvidia-smi who uses it; a GPU newer than this torch needs a newer torch"
        return Check(name, "problem", f"{len(seen)}, but one does not compute: {error}", fix)
    if 0 < len(seen) < len(listed) and visible is None:
        what = f"{len(seen)} of {len(listed)}: {', '.join(seen)}"
        return Check(name, "warning", what, "look for errors of the missing ones: nvidia-smi -q, dmesg")
    if seen:
        return Check(name, "ok", f"{len(seen)}: {', '.join(seen)}{note}")
    if not listed:
        return Check(name, "skipped", "no GPU: runs use the CPU")
    if _cpu_by_choice():
        what = f"none of {len(listed)}, by choice (DS_ACCELERATOR or CUDA_VISIBLE_DEVICES)"
        return Check(name, "ok", what)
    if facts["cuda"] is None:
        what = f"none of {len(listed)}: this torch is built for the CPU"
        fix = f"{reinstall('torch')}  (PyPI's build has CUDA)"
        return Check(name, "problem", what, fix)
    what = f"none of {len(listed)}{note}: {facts['cuda_warning'] or 'CUDA does not start'}"
    fix = f"update the driver to one for CUDA {facts['cuda']}, or install a torch for yours: pytorch.org"
    return Check(name, "problem", what, fix)


def _nccl(version: str | None) -> Check:
    if version:
        return Check("NCCL", "ok", version)
    return Check("NCCL", "problem", "this torch has none: GPU ranks cannot talk", reinstall("torch"))


def _gpu_bf16(in_hardware: bool) -> Check:
    if in_hardware:
        return Check("bf16", "ok", "on the GPU, in hardware")
    fix = "set model.dtype=float32: bfloat16 needs an Ampere GPU or a newer one"
    return Check("bf16", "warning", "on the GPU, not in hardware", fix)


def _cpu_bf16(in_hardware: bool) -> Check:
    if in_hardware:
        return Check("bf16", "ok", "on the CPU, in hardware")
    fix = "set model.dtype=float32, or auto: bfloat16 takes many times as long"
    return Check("bf16", "warning", "on the CPU, not in hardware", fix)
