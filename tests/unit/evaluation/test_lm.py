"""How requests are cut into batches, and what cached responses depend on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speft_ds.evaluation.lm import ResponseCache, make_batches, read_responses


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 6), st.sampled_from("ab"))),
    st.integers(1, 5),
    st.integers(20, 90),
)
def test_every_request_is_in_one_batch(requests, batch_size, max_tokens):
    batches = make_batches(
        requests,
        batch_size,
        order=lambda request: -request[0],
        length=lambda request: request[0],
        forward=lambda request: request,
        settings=lambda request: request[2],
        max_tokens=max_tokens,
    )
    assert sorted(position for batch in batches for position, _ in batch) == list(range(len(requests)))
    forwards = [{request for _, request in batch} for batch in batches]
    assert sum(map(len, forwards)) == len(set(requests))  # equal requests are in one batch
    assert all(len({request[2] for request in each}) == 1 for each in forwards)
    longest = [max(length for length, _, _ in each) for each in forwards]
    settings = [min(name for _, _, name in each) for each in forwards]
    in_order = sorted(zip(settings, longest, strict=True), key=lambda batch: (batch[0], -batch[1]))
    assert list(zip(settings, longest, strict=True)) == in_order
    for each, length in zip(forwards, longest, strict=True):
        assert len(each) <= batch_size and (len(each) == 1 or len(each) * length <= max_tokens)


def test_without_more_said_every_request_is_a_forward():
    assert [len(batch) for batch in make_batches(["a"] * 5, 2, order=len)] == [2, 2, 1]


def test_a_file_for_all_that_responses_depend_on():
    calls = [
        ("a", "loglikelihood", [("p", "c")]),
        ("b", "loglikelihood", [("p", "c")]),
        ("a", "generate_until", [("p", "c")]),
        ("a", "loglikelihood", [("p", "d")]),
        ("a", "loglikelihood", [("p", "c"), ("p", "c")]),
        ("a", "loglikelihood", [("pc", "")]),
    ]
    paths = [ResponseCache({"fingerprint": base}).path(*asked) for base, *asked in calls * 2]
    assert len(set(paths)) == len(calls) and paths[: len(calls)] == paths[len(calls) :]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"answers": 3}', '{"answers": [1]}', '{"other": [1, 2]}'])
def test_a_damaged_file_has_no_responses(tmp_path, text):
    (tmp_path / "cached.json").write_text(text)
    assert read_responses(tmp_path / "cached.json", 2) is None
    assert read_responses(tmp_path / "none.json", 2) is None
