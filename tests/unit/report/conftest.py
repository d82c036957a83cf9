import pytest

from unit.report.sample import make_run
from unit.saved import quick_disk


@pytest.fixture(autouse=True)
def no_waiting():
    with quick_disk():
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run with everything that a run can have; tests do not change it."""
    with quick_disk():
        return make_run(tmp_path_factory.mktemp("runs") / "quick")
