"""Cached responses: what they depend on, and damaged files."""

import pytest

from speft_ds.evaluation.lm import ResponseCache, read_responses


def test_a_file_for_all_that_responses_depend_on():
    calls = [
        ("a", "loglikelihood", [("p", "c")]),
        ("b", "loglikelihood", [("p", "c")]),
        ("a", "generate_until", [("p", "c")]),
        ("a", "loglikelihood", [("p", "d")]),
        ("a", "loglikelihood", [("p", "c"), ("p", "c")]),
        ("a", "loglikelihood", [("pc", "")]),
    ]
    paths = [
        ResponseCache({"fingerprint": base}).path(method, requests) for base, method, requests in calls * 2
    ]
    assert len(set(paths)) == len(calls) and paths[: len(calls)] == paths[len(calls) :]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"answers": 3}', '{"answers": [1]}', '{"other": [1, 2]}'])
def test_a_damaged_file_has_no_responses(tmp_path, text):
    (tmp_path / "cached.json").write_text(text)
    assert read_responses(tmp_path / "cached.json", 2) is None
    assert read_responses(tmp_path / "none.json", 2) is None
