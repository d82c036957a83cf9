import pytest

from slurm.cluster import Cluster, why_not


@pytest.fixture(scope="session")
def cluster():
    """A real Slurm with two emulated nodes, started once."""
    if reason := why_not():
        pytest.skip(reason)
    started = Cluster()
    started.start()
    yield started
    started.stop()


@pytest.fixture
def folder(tmp_path):
    """A folder to submit from; the logs of its jobs are shown when the test fails."""
    yield tmp_path
    for log in sorted(tmp_path.rglob("slurm-*.out")):
        print(f"== {log}\n{log.read_text(errors='replace')}")
