"""The ranks that tests run on, where there are GPUs: what can be told of it without one."""

import multiprocessing

import pytest
import torch
from ranks import CPU, Accelerator, Ranks

ONE_GPU, TWO_GPUS = Accelerator("cuda", 1), Accelerator("cuda", 2)


@pytest.mark.parametrize(
    ("num_gpus", "variable", "expected"),
    [(0, None, CPU), (1, None, ONE_GPU), (2, None, TWO_GPUS), (2, "cpu", CPU), (0, "cpu", CPU)],
)
def test_ranks_compute_on_gpus_where_there_are_any(monkeypatch, num_gpus, variable, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    if variable:
        monkeypatch.setenv("DS_ACCELERATOR", variable)
    assert Accelerator.find() == expected


def test_each_rank_has_a_gpu_of_its_own():
    for accelerator, name in ((CPU, "cpu"), (TWO_GPUS, "cuda")):
        environments = [accelerator.environment(rank, 2, 12345) for rank in range(2)]
        assert [own["LOCAL_RANK"] for own in environments] == [
            "0",
            "1",
        ]  # by this `collectives.init` takes it
        assert {own["DS_ACCELERATOR"] for own in environments} == {name}
        assert {own["WORLD_SIZE"] for own in environments} == {"2"}


def test_more_ranks_than_gpus_are_left_out_by_name():
    assert [size for size in (1, 2, 4) if not ONE_GPU.why_not(size)] == [1]
    assert [size for size in (1, 2, 4) if not TWO_GPUS.why_not(size)] == [1, 2]
    assert not any(map(CPU.why_not, (1, 2, 4)))
    assert "2 ranks" in ONE_GPU.why_not(2) and "1" in ONE_GPU.why_not(2)


def test_the_fixture_skips_what_does_not_fit(monkeypatch):
    monkeypatch.setattr(Accelerator, "find", classmethod(lambda cls: ONE_GPU))
    import conftest

    group = next(conftest.ranks.__wrapped__())
    with pytest.raises(pytest.skip.Exception, match="GPU"):
        group(2)
    assert group.why_not(1) is None


def test_cuda_does_not_outlive_a_fork():
    spawn = type(multiprocessing.get_context("spawn"))
    assert isinstance(Ranks(1, ONE_GPU).context, spawn)
    assert not isinstance(Ranks(1).context, spawn)
