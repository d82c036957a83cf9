"""Who a process is among the ranks, by the environments that launchers make."""

import os
import socket
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
NOWHERE = {"PATH": "/nowhere"}


def settled(environment):
    """Rank, ranks, rank and ranks on the node, address and port, as an environment says."""
    with mock.patch.dict(os.environ, NOWHERE | environment, clear=True):
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


def test_srun_says_it_in_variables_of_its_own():
    rank, world_size, local_rank, local_size, address, port = settled(STEP)
    assert (rank, world_size, local_rank, local_size, address) == ("2", "3", "1", "2", "node07")
    assert 1024 < int(port) < 65536


def test_the_ranks_of_a_node_are_as_many_as_the_node_has():
    """Three nodes with 2, 2 and 1 tasks."""
    uneven = STEP | {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_STEP_NUM_TASKS": "5"}
    tasks = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]  # node, and which of its tasks
    found = []
    for rank, (node, local) in enumerate(tasks):
        task = {"SLURM_PROCID": f"{rank}", "SLURM_NODEID": f"{node}", "SLURM_LOCALID": f"{local}"}
        found.append(settled(uneven | task))
    assert [[*map(int, values[:4])] for values in found] == [
        [0, 5, 0, 2],
        [1, 5, 1, 2],
        [2, 5, 0, 2],
        [3, 5, 1, 2],
        [4, 5, 0, 1],
    ]
    assert len({(address, port) for *_, address, port in found}) == 1


@pytest.mark.parametrize(
    ("text", "counts"), [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("1,2(x2),10(x1)", [1, 2, 2, 10])]
)
def test_counts_of_tasks(text, counts):
    assert env.tasks_per_node(text) == counts


def test_a_batch_script_without_srun_is_one_process():
    assert settled(JOB)[:-1] == settled({})[:-1]  # the port is any


def test_an_address_and_a_port_that_are_given_are_taken():
    assert settled(STEP | {"MASTER_ADDR": "ib0", "MASTER_PORT": "1234"})[4:] == ["ib0", "1234"]


def test_two_steps_of_a_job_and_two_jobs_have_different_ports():
    ports = [port_of(SLURM_STEP_ID=f"{step}") for step in range(8)]
    ports += [port_of(SLURM_JOB_ID=f"{job}") for job in (4712, 4713)]
    assert len(set(ports)) == len(ports)


@pytest.mark.parametrize("job", [0, 1, 67_108_863, 2**32 - 1])
@pytest.mark.parametrize("step", [0, 7, 2**32 - 6])  # the last is that of an interactive step
def test_a_port_is_a_port(job, step):
    port = port_of(SLURM_JOB_ID=f"{job}", SLURM_STEP_ID=f"{step}")
    assert 1024 < port < 65536 and port == port_of(SLURM_JOB_ID=f"{job}", SLURM_STEP_ID=f"{step}")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1.cluster.org", "gpu1.cluster.org"),
        ("gpu-a,gpu-b", "gpu-a"),
        ("node[07-08]", "node07"),
        ("node[7,9-12],gpu1", "node7"),
        ("node[003]", "node003"),
        ("gpu1,node[03-05]", "gpu1"),
        ("c[1-2]-ib", "c1-ib"),
        ("rack[1-2]node[03-05]", "rack1node03"),
        ("rack[1-2]node[03,05],gpu", "rack1node03"),
    ],
)
def test_the_first_node_where_there_is_no_scontrol(nodes, first):
    assert settled(STEP | {"SLURM_STEP_NODELIST": nodes})[4] == first


def test_scontrol_is_asked_for_the_first_node(tmp_path):
    script = tmp_path / "scontrol"
    script.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[07-08]" ] && echo first && echo second\n')
    script.chmod(0o755)
    assert settled(STEP | {"PATH": str(tmp_path)})[4] == "first"
    script.write_text("#!/bin/sh\nexit 1\n")  # in a container without Slurm's settings
    assert settled(STEP | {"PATH": str(tmp_path)})[4] == "node07"
    script.write_text("#!/bin/sh\n")
    assert settled(STEP | {"PATH": str(tmp_path)})[4] == "node07"
