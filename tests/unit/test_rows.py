"""Rows as they stand in a file: each bad one is named."""

import json

import pytest

from speft_ds.errors import UserError
from speft_ds.rows import read_pairs

BAD_FILES = {
    "missing.jsonl": (None, "cannot read"),
    "empty.jsonl": ("", "no rows"),
    "broken.jsonl": ('{"prompt": "a", "response": "b"}\n{"prompt": "a", "resp', "broken.jsonl:2"),
    "noresponse.jsonl": ('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n', "noresponse.jsonl:2"),
    "null.jsonl": ('{"prompt": "a", "response": null}\n', "has no 'response'"),
    "blank.jsonl": ('{"prompt": "a", "response": ""}\n', "has an empty 'response'"),
    "number.jsonl": ('{"prompt": "a", "response": 3}\n', "unusable 'response'"),
    "list.json": ("[1]", "not a JSON object"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_rows_are_named(tmp_path, name):
    text, message = BAD_FILES[name]
    path = tmp_path / name
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_pairs(str(path), "prompt", "response")
    assert message in str(caught.value) and name in str(caught.value)


def test_rows_with_exotic_line_separators_stay_whole(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a\u2028b", "response": "c"}, ensure_ascii=False) + "\n", "utf-8")
    assert read_pairs(str(path), "prompt", "response") == [("a\u2028b", "c")]
