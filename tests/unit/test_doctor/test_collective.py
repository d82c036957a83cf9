"""Two ranks that add, die, hang."""

import os
import signal
import time

import psutil
import pytest
from limits import HANG_S

from speft_ds.doctor.collective import check_collective
from speft_ds.doctor.probes import _expect
from speft_ds.doctor.processes import in_thread


def rank_1():
    """The second of the ranks that this process started, as soon as it runs."""
    while True:
        for child in psutil.Process().children():
            if child.cmdline()[-5:-1] == ["speft_ds.doctor.probes", "collective", "gloo", "1"]:
                return child
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("sent", "timeout_s", "said"),
    [
        (signal.SIGKILL, 2 * HANG_S, "rank 1 failed: killed by SIGKILL"),  # nobody waits for rank 0
        (signal.SIGSTOP, 8, "timed out, waiting for rank 0 and 1"),
    ],
)
def test_a_rank_that_dies_or_hangs(sent, timeout_s, said):
    started = in_thread(lambda: check_collective(timeout_s=timeout_s))
    os.kill(rank_1().pid, sent)
    check = started.result(timeout=HANG_S)
    assert check.status == "problem" and check.what == said and "GLOO_SOCKET_IFNAME=lo" in check.fix
    left = [child for child in psutil.Process().children() if "collective" in child.cmdline()]
    assert not left


def test_an_interface_that_is_not_there(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nope0")
    check = check_collective()
    assert check.status == "problem" and "nope0" in check.what and "GLOO_SOCKET_IFNAME=nope0" in check.fix


def test_a_wrong_sum_is_noticed():
    with pytest.raises(RuntimeError, match="all_reduce gave"):
        _expect("all_reduce", [3.0], [4.0])
