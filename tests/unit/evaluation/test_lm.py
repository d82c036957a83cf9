"""How requests are cut into batches: each once, equal lengths together, one forward for one context."""

from hypothesis import given
from hypothesis import strategies as st

from speft_ds.evaluation.lm import make_batches


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 6))), st.integers(1, 5), st.integers(20, 90))
def test_every_request_is_in_one_batch(requests, batch_size, max_tokens):
    batches = make_batches(
        requests,
        batch_size,
        order=lambda request: -request[0],
        length=lambda request: request[0],
        forward=lambda request: request,
        max_tokens=max_tokens,
    )
    assert sorted(position for batch in batches for position, _ in batch) == list(range(len(requests)))
    forwards = [{request for _, request in batch} for batch in batches]
    assert sum(map(len, forwards)) == len(set(requests))  # equal requests are in one batch
    longest = [max(length for length, _ in each) for each in forwards]
    assert longest == sorted(longest, reverse=True)
    for each, length in zip(forwards, longest, strict=True):
        assert len(each) <= batch_size and (len(each) == 1 or len(each) * length <= max_tokens)


def test_without_more_said_every_request_is_a_forward():
    assert [len(batch) for batch in make_batches(["a"] * 5, 2, order=len)] == [2, 2, 1]
