"""Memory, cores, control groups, limits of the shell."""

import resource

from speft_ds.doctor import Check
from speft_ds.doctor.cgroups import cgroup_limits
from speft_ds.doctor.limits import check_cores, check_limits, check_memory, check_slurm
from unit.test_doctor.made import executable, found


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_limits_of_control_groups_version_2(tmp_path):
    write(tmp_path / "own", "0::/job/step\n")
    root = tmp_path / "root"
    assert cgroup_limits(root, tmp_path / "own") == (float("inf"), float("inf"))
    write(root / "job" / "memory.max", "4294967296\n")
    write(root / "job" / "step" / "memory.max", "max\n")
    write(root / "job" / "cpu.max", "max 100000\n")
    write(root / "job" / "step" / "cpu.max", "150000 100000\n")
    assert cgroup_limits(root, tmp_path / "own") == (2**32, 1.5)


def test_limits_of_control_groups_version_1(tmp_path):
    write(tmp_path / "own", "4:memory:/job\n3:cpu,cpuacct:/elsewhere/on/the/host\n")
    root = tmp_path / "root"
    write(root / "memory" / "memory.limit_in_bytes", "9223372036854771712\n")
    write(root / "memory" / "job" / "memory.limit_in_bytes", "1073741824\n")
    write(root / "cpu" / "cpu.cfs_quota_us", "-1\n")
    write(root / "cpu" / "cpu.cfs_period_us", "100000\n")
    assert cgroup_limits(root, tmp_path / "own") == (2**30, float("inf"))
    write(root / "cpu" / "cpu.cfs_quota_us", "50000\n")
    assert cgroup_limits(root, tmp_path / "own")[1] == 0.5


def test_little_memory_and_more_threads_than_cores(monkeypatch):
    check = check_memory(2**30)
    assert check.status == "warning" and "1.0 GiB by control group" in check.what
    assert check_cores(float("inf")).status == "ok"
    check = check_cores(0.5)  # OMP_NUM_THREADS would follow the cores, not the quota
    assert check.status == "warning" and "OMP_NUM_THREADS=1" in check.fix
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert check_cores(0.5).status == "ok"
    monkeypatch.setenv("OMP_NUM_THREADS", "9999")
    assert check_cores(float("inf")).status == "warning"


def test_limits_of_the_shell():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
        (check,) = check_limits(False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert check == Check("open files", "warning", "ulimit -n: 512", "ulimit -n 4096")
    assert found(check_limits(True), "locked memory").what.startswith("ulimit -l: ")


def test_slurm_is_for_information(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_slurm()[0].status == "skipped"
    executable(tmp_path / "sbatch", "exit 1")
    assert check_slurm() == [Check("SLURM", "ok", "sbatch on the PATH")]
