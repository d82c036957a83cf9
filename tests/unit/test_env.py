"""Who a process is among the ranks, by the environments that launchers make."""

import os
import socket
import subprocess
from datetime import UTC, datetime, timedelta
from unittest import mock

import pytest

from speft_ds import env

KEYS = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"]
# Of the second task on the second node of `srun --nodes 2`, three tasks in all; Slurm's manual has the rest.
STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "1,2",
    "SLURM_STEP_NODELIST": "node[07-08]",
}
# Of a batch script; srun's variables are those of its steps.
JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_TASKS_PER_NODE": "4(x2)",
    "SLURM_JOB_NODELIST": "node[07-08]",
}


def settled(environment):
    """Rank, ranks, rank and ranks on the node, address and port, as an environment says."""
    with mock.patch.dict(os.environ, environment, clear=True):
        env.init_env()
        assert env.rank() == int(os.environ["RANK"])
        assert env.world_size() == int(os.environ["WORLD_SIZE"])
        return [os.environ[key] for key in KEYS]


def port_of(**environment):
    return int(settled(STEP | environment)[-1])


def test_a_process_that_nobody_launched_is_a_group_of_one():
    *others, port = settled({})
    assert others == ["0", "1", "0", "1", "127.0.0.1"] and int(port) > 1023
    with mock.patch.dict(os.environ, clear=True):
        assert (env.rank(), env.world_size()) == (0, 1)


def test_a_free_port_is_free_and_none_that_the_system_hands_out():
    ports = [env.free_port() for _ in range(3)]
    assert len(set(ports)) > 1 and set(ports) <= set(env.PORTS)
    only = mock.patch.object(env, "PORTS", ports[:1])
    with socket.create_server(("", ports[0])), only, pytest.raises(OSError, match="taken"):
        env.free_port()


def test_what_deepspeed_says_is_left_alone():
    given = dict(zip(KEYS, ["3", "8", "1", "2", "10.0.0.1", "29511"], strict=True))
    assert settled(given) == [*given.values()]
    assert settled(STEP | given) == [*given.values()]  # within srun, too: by its launcher for slurm, say


@pytest.mark.parametrize("around", [{}, STEP, JOB])
def test_torchrun_has_another_name_for_the_ranks_of_a_node(around):
    given = dict(zip(KEYS, ["5", "8", "1", None, "node07", "29400"], strict=True))
    del given["LOCAL_SIZE"]
    expected = ["5", "8", "1", "4", "node07", "29400"]
    assert settled(around | given | {"LOCAL_WORLD_SIZE": "4"}) == expected


@pytest.mark.parametrize("tasks_per_node", ["2(x2),1", "2,2,1(x1)"])
def test_srun_says_it_in_variables_of_its_own(tasks_per_node):
    uneven = STEP | {"SLURM_STEP_TASKS_PER_NODE": tasks_per_node, "SLURM_STEP_NUM_TASKS": "5"}
    tasks = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]  # node, and which of its tasks
    found = []
    for rank, (node, local) in enumerate(tasks):
        task = {"SLURM_PROCID": f"{rank}", "SLURM_NODEID": f"{node}", "SLURM_LOCALID": f"{local}"}
        found.append(settled(uneven | task))
    sizes = [2, 2, 2, 2, 1]
    for rank, ((_, local), size, values) in enumerate(zip(tasks, sizes, found, strict=True)):
        assert values[:4] == [f"{rank}", "5", f"{local}", f"{size}"]
    assert len({(address, port) for *_, address, port in found}) == 1


def test_a_batch_script_without_srun_is_one_process():
    assert settled(JOB)[:-1] == settled({})[:-1]  # the port is any


def test_an_address_and_a_port_that_are_given_are_taken():
    assert settled(STEP | {"MASTER_ADDR": "ib0", "MASTER_PORT": "1234"})[4:] == ["ib0", "1234"]


def test_two_steps_of_a_job_and_two_jobs_have_different_ports():
    ports = [port_of(SLURM_STEP_ID=f"{step}") for step in range(8)]
    ports += [port_of(SLURM_JOB_ID=f"{job}") for job in (4712, 4713)]
    assert len(set(ports)) == len(ports)


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_a_start_is_recorded_with_its_command_line_and_commits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    words = ["--local_rank=1", "--checked", "--recipe", "a b", "x=https://me:secret@host/y"]
    monkeypatch.setattr("sys.argv", ["/home/me/launch/train.py", *words])
    found = env.origin()
    assert found["command"] == "launch/train.py --recipe 'a b' x=https://host/y"
    assert datetime.now(UTC) - datetime.fromisoformat(found["date"].replace(" UTC", "Z")) < timedelta(hours=1)
    assert "working folder" not in found["commits"]  # which is in no repository
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("a")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "a")
    commit = git(tmp_path, "rev-parse", "HEAD")[:12]
    assert env.origin()["commits"]["working folder"] == commit
    (tmp_path / "file").write_text("b")
    assert env.origin()["commits"]["working folder"] == f"{commit}-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert env.origin()["commits"] == {}  # without git


@pytest.mark.parametrize("job", [0, 1, 67_108_863, 2**32 - 1])
@pytest.mark.parametrize("step", [0, 7, 2**32 - 6])  # the last is that of an interactive step
def test_a_port_is_a_port(job, step):
    assert 1024 < port_of(SLURM_JOB_ID=f"{job}", SLURM_STEP_ID=f"{step}") < 65536


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu-a,gpu-b", "gpu-a"),
        ("node[07-08]", "node07"),
        ("node[7,9-12],gpu1", "node7"),
        ("gpu1,node[03-05]", "gpu1"),
        ("c[1-2]-ib", "c1-ib"),
        ("rack[1-2]node[03,05],gpu", "rack1node03"),
    ],
)
def test_rank_0_is_on_the_first_node(nodes, first):
    assert settled(STEP | {"SLURM_STEP_NODELIST": nodes})[4] == first
