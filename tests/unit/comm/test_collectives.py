"""Collectives around an action that fails on some ranks, with what the other ranks say made up."""

import pytest

from speft_ds.comm import collectives
from speft_ds.errors import UserError


@pytest.mark.parametrize("local_rank", ["0", "1"])
@pytest.mark.parametrize("fails", [0, 1])
def test_a_failure_on_either_kind_of_rank_is_one_of_all(local_rank, fails, monkeypatch):
    """Rank 0 of a node acts first; where it fails, the others never act."""
    error, said, other = UserError("no data", "data.path", "name it"), [], int(local_rank == "0")
    monkeypatch.setenv("LOCAL_RANK", local_rank)

    def gather(own):
        turn = len(said)
        said.append(own)
        return [own, error if other == fails == turn else None]

    def act():
        assert len(said) == int(local_rank)  # in its turn
        if int(local_rank) == fails:
            raise error
        return "rows"

    monkeypatch.setattr(collectives, "all_gather_objects", gather)
    with pytest.raises(UserError) as raised:
        collectives.local_rank0_first(act)
    assert raised.value is error and len(said) == fails + 1
