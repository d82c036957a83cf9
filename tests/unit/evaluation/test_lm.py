"""How requests are cut into batches, and what cached responses depend on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.models.utils import Collator

from speft_ds.evaluation.lm import ResponseCache, likelihood_batches, make_batches, read_responses

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=4)


@given(st.lists(st.tuples(st.none(), TOKENS, TOKENS)), st.integers(1, 5))
def test_likelihoods_are_batched_as_lm_eval_does(requests, batch_size):
    batches = likelihood_batches(requests, batch_size)
    assert sorted(position for batch in batches for position, _ in batch) == list(range(len(requests)))
    assert [stock_forwards([r for _, r in batch], batch_size) for batch in batches] == [
        [forward] for forward in stock_forwards(requests, batch_size)
    ]


def stock_forwards(requests, batch_size):
    """The batches of requests that lm-eval runs, each for all that share its forward."""
    collator = Collator(
        requests,
        sort_fn=lambda request: (-len(request[1] + request[2]), tuple(request[1] + request[2])),
        group_by="contexts",
        group_fn=lambda request: request[1] + request[2][:-1],
    )
    return list(collator.get_batched(n=batch_size))


@given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from("ab"))), st.integers(1, 5))
def test_requests_of_unlike_settings_are_never_in_one_batch(requests, batch_size):
    batches = make_batches(
        requests, batch_size, order=lambda request: -request[0], settings=lambda request: request[1]
    )
    assert sorted(position for batch in batches for position, _ in batch) == list(range(len(requests)))
    assert all(len({name for _, (_, name) in batch}) == 1 and len(batch) <= batch_size for batch in batches)
    in_order = [request for batch in batches for _, request in batch]
    assert in_order == sorted(requests, key=lambda request: (request[1], -request[0]))


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
