import pytest
import torch

from unit.saved import quick_disk


@pytest.fixture(autouse=True)
def quick():
    """One thread: in models so small, threads would wait for each other. No waiting for the disk."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with quick_disk():
        yield
    torch.set_num_threads(num_threads)
