"""The atomic writer of all small files."""

import os

import pytest

from speft_ds.io import write_bytes, write_text


def test_a_file_is_written_completely_or_not_at_all_and_flushed_once(tmp_path, monkeypatch):
    path, flushed = tmp_path / "new" / "picture.png", []
    monkeypatch.setattr(os, "fsync", flushed.append)
    write_bytes(path, b"old")
    assert len(flushed) == 1

    def full(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    for write, content in ((write_bytes, b"new"), (write_text, "new")):
        with pytest.raises(OSError):
            write(path, content)
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]
