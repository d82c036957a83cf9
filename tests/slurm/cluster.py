"""A real Slurm on this machine: slurmctld, and two emulated nodes with a slurmd each.

Its daemons are children of this process and die with it. Outside its folder it touches one file, /etc/hosts,
where the nodes' names stand while it runs. Needs root and Debian's packages (`PACKAGES`); no systemd, no
database.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from limits import HANG_S

PACKAGES = "slurmctld slurmd slurm-client munge"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "setpriv", "unshare")
NODES = ("node1", "node2")
HOSTS, MARK = Path("/etc/hosts"), "# tests/slurm"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
CGROUPS = Path("/sys/fs/cgroup/freezer")
# A node of its own name whose processes end with its slurmd, where this machine allows that.
NODE_OF_ITS_OWN = ["unshare", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]

SLURM_CONF = """\
ClusterName=emulated
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
{requeue_exit}
MinJobAge=3600
KillWait=60
SlurmdTimeout=60
ReturnToService=1
SlurmdParameters=config_overrides
MailProg=/bin/true
GresTypes=gpu
{nodes}
PartitionName=main Nodes=node[1-2] Default=YES PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=node[1-2] PriorityTier=10 PreemptMode=OFF
"""
# Without a delay by cred_expire, a job that is requeued would wait for two minutes.

CGROUP_CONF = """\
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
CgroupAutomount=no
"""


def why_not() -> str | None:
    """Why a cluster cannot be started here; None: it can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        return f"Slurm is not installed (no {missing[0]}): apt-get install --no-install-recommends {PACKAGES}"
    return None if os.geteuid() == 0 else "an emulated Slurm cluster needs root"


class Cluster:
    """Two nodes (8 CPUs and 2 GPUs each, by name), the partitions main and, preempting it, urgent."""

    def __init__(self) -> None:
        self.daemons: list[subprocess.Popen] = []

    # Start and stop

    def start(self, requeue_exit: str | None = "85") -> None:
        """Start it, in a new folder.

        Args:
            requeue_exit: the exit codes with which Slurm itself requeues a job; None: with none.
        """
        self.folder = Path(tempfile.mkdtemp(prefix="slurm_"))
        self.folder.chmod(0o755)
        self.env = {**os.environ, "PATH": PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self.requeue_exit = requeue_exit
        try:
            self._write_files()
            self._start_daemons()
        except BaseException:
            self.stop()
            raise

    def use(self, requeue_exit: str | None) -> None:
        """Start it anew if need be; `scontrol reconfigure` can leave a slurmd that hears nothing."""
        if requeue_exit != self.requeue_exit:
            self.stop()
            self.start(requeue_exit)

    def _write_files(self) -> None:
        for name in ("state", "munge", "gpus", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir()
        (self.folder / "cgroup.conf").write_text(CGROUP_CONF)
        for number in range(2):  # a GPU counts as one if its file is a device
            (self.folder / "gpus" / f"gpu{number}").symlink_to("/dev/null")
        gpus = f"NodeName=node[1-2] Name=gpu File={self.folder}/gpus/gpu[0-1]\n"
        (self.folder / "gres.conf").write_text(gpus)
        (self.folder / "slurm.conf").write_text(self._conf())
        _set_hosts("".join(f"127.0.0.1 {node} {MARK}\n" for node in NODES))

    def _conf(self) -> str:
        host = socket.gethostname().partition(".")[0]
        port, *node_ports = free_ports(1 + len(NODES))
        nodes = [
            f"NodeName={node} NodeAddr=127.0.0.1 NodeHostname={node if _has_own_nodes() else host} "
            f"Port={node_port} CPUs=8 RealMemory=64000 Gres=gpu:2 State=UNKNOWN"
            for node, node_port in zip(NODES, node_ports, strict=True)
        ]
        return SLURM_CONF.format(
            host=host,
            port=port,
            folder=self.folder,
            proctrack=_proctrack(),
            requeue_exit=f"RequeueExit={self.requeue_exit}" if self.requeue_exit else "",
            nodes="\n".join(nodes),
        )

    def _start_daemons(self) -> None:
        self._start_munge()
        self._daemon("slurmctld", "-D", "-c")
        wait_for(lambda: "is UP" in self.run("scontrol", "ping", check=False), "slurmctld")
        for node in NODES:
            own = [*NODE_OF_ITS_OWN, "sh", "-c", f"hostname {node}; exec slurmd -D -N {node}"]
            self._daemon(*(own if _has_own_nodes() else ["slurmd", "-D", "-N", node]))
        wait_for(self._is_idle, "the nodes")

    def _start_munge(self) -> None:
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        files = [f"--{name}-file={self.folder}/munge/{name}" for name in ("key", "pid", "seed", "log")]
        self._daemon("munged", "--foreground", "--force", f"--socket={self.folder}/munge/socket", *files)
        wait_for((self.folder / "munge" / "socket").exists, "munged")

    def _daemon(self, *command: str) -> None:
        """Start a program that ends when this process does."""
        with (self.folder / f"{Path(command[0]).name}.out").open("ab") as output:
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            words = ["setpriv", "--pdeathsig", "KILL", *command]
            self.daemons.append(subprocess.Popen(words, env=self.env, start_new_session=True, **streams))

    def _is_idle(self) -> bool:
        states = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False).split()
        return states == ["idle"] * len(NODES)

    def stop(self) -> None:
        """End every job and daemon, and remove what was written."""
        if len(self.daemons) > 1:  # there is a controller
            self.run("scancel", "--full", "--signal=KILL", "--user=root", check=False)
            self.run("scancel", "--user=root", check=False)
            with contextlib.suppress(AssertionError):  # not at the cost of the rest
                wait_for(lambda: not self.run("squeue", "-h", check=False).strip(), "the jobs to end")
        for daemon in reversed(self.daemons):  # the nodes, the controller, munge
            daemon.kill()
            daemon.wait()
        self.daemons.clear()
        _set_hosts("")
        _remove_cgroups()
        shutil.rmtree(self.folder, ignore_errors=True)

    # What a test asks

    def run(self, *command: str, check: bool = True, folder: Path | None = None, **env: object) -> str:
        """Run a command of Slurm's, or one that uses them, and return what it prints."""
        env = self.env | {name: str(value) for name, value in env.items()}
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
        if check and done.returncode:
            raise AssertionError(f"{command} exited with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of a job."""
        words = self.run("scontrol", "show", "job", "-o", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def submit(self, *arguments: object, folder: Path, **env: object) -> str:
        """`sbatch` in a folder; the job's number."""
        words = ["sbatch", "--parsable", *map(str, arguments)]
        return self.run(*words, folder=folder, **env).strip()

    def wait_until(self, job: str, *states: str) -> dict[str, str]:
        """Wait for one of these states; what there is to know then."""
        wait_for(lambda: self.job(job)["JobState"] in states, f"job {job} to be {' or '.join(states)}")
        return self.job(job)

    def wait_for_end(self, job: str) -> tuple[str, str, int]:
        """Wait until a job has ended: its state, exit code (`2:0`; by a signal `0:9`), number of restarts."""
        facts = self.wait_until(job, *ENDED)
        return facts["JobState"], facts["ExitCode"], int(facts["Restarts"])

    def wait_during(self, job: str, condition: Callable[[], object], what: str) -> None:
        """Wait for something that happens before a job ends."""

        def holds() -> bool:
            assert self.job(job)["JobState"] not in ENDED, f"job {job} ended before {what}"
            return bool(condition())

        wait_for(holds, what)

    def ranks(self, job: str) -> dict[int, int]:
        """The processes of a job's ranks on this machine: process id by rank."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):  # it has ended
                env, script = process.environ(), process.cmdline()[1:2]
                if env.get("SLURM_JOB_ID") == job and script and script[0].endswith("launch/train.py"):
                    found[int(env["SLURM_PROCID"])] = process.pid
        return found


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Wait until a condition holds; AssertionError if it never does."""
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {HANG_S} s for {what}"
        time.sleep(0.05)


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _set_hosts(lines: str) -> None:
    """Replace our lines of /etc/hosts; written in place, since containers mount it as a file."""
    others = [line for line in HOSTS.read_text().splitlines(keepends=True) if MARK not in line]
    HOSTS.write_text("".join(others) + lines)


def _proctrack() -> str:
    """How Slurm finds the processes of a job: by cgroups as real sites do, where they can be made here."""
    return "cgroup" if os.access(CGROUPS, os.W_OK) else "linuxproc"


def _remove_cgroups() -> None:
    """Remove those of the nodes; the kernel refuses while there are processes in one."""
    for node in CGROUPS.glob("slurm_node[12]"):
        for folder, _, _ in os.walk(node, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)


@functools.cache
def _has_own_nodes() -> bool:
    """Whether a node can have a name and processes of its own here."""
    return subprocess.run([*NODE_OF_ITS_OWN, "true"], capture_output=True, check=False).returncode == 0
