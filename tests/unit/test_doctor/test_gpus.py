"""GPUs that cannot be used; the facts are made up where the machine has none."""

import pytest

from speft_ds.doctor.build import check_shm_op
from speft_ds.doctor.gpus import check_gpus, list_gpus, uses_gpus
from speft_ds.doctor.packages import check_torch
from unit.test_doctor.made import executable, found

GPU_FACTS = {
    "torch": "2.13.0+cu130",
    "cuda": "13.0",
    "cuda_warning": None,
    "gpus": [["H100", 80 * 2**30], ["H100", 80 * 2**30]],
    "gpu_bf16": True,
    "cpu_bf16": True,
    "nccl": "2.27.5",
    "gpu_error": None,
}
CPU_FACTS = GPU_FACTS | {"torch": "2.13.0+cpu", "cuda": None, "gpus": [], "gpu_bf16": False, "nccl": None}
LISTED = ["H100, 81559 MiB, 580.1"] * 2


def test_a_machine_with_gpus_is_ready():
    checks = check_gpus(GPU_FACTS, LISTED, None)
    assert {check.status for check in checks} == {"ok"}
    assert found(checks, "GPU 1").what == LISTED[1] and found(checks, "NCCL").what == "2.27.5"
    assert found(checks, "GPUs of torch").what == "2: H100 80 GiB, H100 80 GiB"
    assert check_torch(GPU_FACTS)[0].what == "2.13.0+cu130, built for CUDA 13.0"
    assert uses_gpus(GPU_FACTS)
    (check,) = check_shm_op(GPU_FACTS)
    assert check.status == "skipped"


@pytest.mark.parametrize(
    ("facts", "status", "said", "fix"),
    [
        (
            CPU_FACTS,
            "problem",
            "none of 2: this torch is built for the CPU",
            "pip install --force-reinstall torch",
        ),
        (
            GPU_FACTS | {"gpus": [], "cuda_warning": "the driver is too old"},
            "problem",
            "too old",
            "CUDA 13.0",
        ),
        (GPU_FACTS | {"gpu_error": "GPU 0: no kernel image"}, "problem", "no kernel image", "newer torch"),
        (GPU_FACTS | {"gpus": GPU_FACTS["gpus"][:1]}, "warning", "1 of 2", "nvidia-smi -q"),
    ],
)
def test_gpus_that_torch_cannot_use(facts, status, said, fix):
    check = found(check_gpus(facts, LISTED, None), "GPUs of torch")
    assert check.status == status and said in check.what and fix in check.fix


def test_gpus_left_alone_by_choice(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert found(check_gpus(CPU_FACTS, LISTED, None), "GPUs of torch").status == "ok"
    assert not uses_gpus(GPU_FACTS)
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    one = GPU_FACTS | {"gpus": GPU_FACTS["gpus"][:1]}
    check = found(check_gpus(one, LISTED, None), "GPUs of torch")
    assert check.status == "ok" and "CUDA_VISIBLE_DEVICES=1" in check.what


def test_old_gpus_and_a_torch_without_nccl():
    checks = check_gpus(GPU_FACTS | {"gpu_bf16": False, "nccl": None}, LISTED, None)
    assert found(checks, "bf16").status == "warning" and "model.dtype=float32" in found(checks, "bf16").fix
    assert found(checks, "NCCL").status == "problem"


def test_nvidia_smi_is_read(tmp_path, monkeypatch):
    executable(tmp_path / "bin" / "nvidia-smi", f"echo '{LISTED[0]}'; echo '{LISTED[1]}'")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert list_gpus() == (LISTED, None)
    executable(tmp_path / "bin" / "nvidia-smi", "echo 'NVML: version mismatch'; exit 18")  # on its stdout
    listed, error = list_gpus()
    assert (listed, error) == ([], "NVML: version mismatch")
    check = found(check_gpus(CPU_FACTS, listed, error), "nvidia-smi")
    assert (
        check.status in ("warning", "problem") and "version mismatch" in check.what and "driver" in check.fix
    )
