"""Answers of the base that are kept: what they depend on, and files that were damaged."""

import pytest

from speft_ds.evaluation.response_cache import ResponseCache, read


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEFT_DS_CACHE", str(tmp_path))
    return lambda settings, method, arguments: ResponseCache(settings).path(method, arguments)


def test_a_file_for_all_that_answers_depend_on(path):
    first = path({"fingerprint": "a"}, "loglikelihood", [("p", "c")])
    assert first == path({"fingerprint": "a"}, "loglikelihood", [("p", "c")])
    others = [
        path({"fingerprint": "b"}, "loglikelihood", [("p", "c")]),
        path({"fingerprint": "a"}, "generate_until", [("p", "c")]),
        path({"fingerprint": "a"}, "loglikelihood", [("p", "d")]),
        path({"fingerprint": "a"}, "loglikelihood", [("p", "c"), ("p", "c")]),
        path({"fingerprint": "a"}, "loglikelihood", [("pc", "")]),
    ]
    assert len({first, *others}) == 6


@pytest.mark.parametrize("text", ["", "{", "[]", '{"answers": 3}', '{"answers": [1]}', '{"other": [1, 2]}'])
def test_a_damaged_file_is_no_answer(tmp_path, text):
    (tmp_path / "kept.json").write_text(text)
    assert read(tmp_path / "kept.json", 2) is None
    assert read(tmp_path / "none.json", 2) is None
