"""Checkpoints that tests write on the spot, without torch: their parts are any bytes."""

import hashlib
from unittest import mock

from speft_ds.training.checkpoint.folder import folder_of, part_name, publish, temporary_of

CONTENTS = (b"what rank 0 held", b"rank 1's", b"")


def quick_disk():
    """Without waiting for the disk: no test survives a power cut."""
    return mock.patch("os.fsync", lambda descriptor: None)


def write_parts(run, step, contents=CONTENTS):
    """The parts of a checkpoint that is not published yet; returns their lines of the manifest."""
    folder = temporary_of(folder_of(run, step))
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for rank, content in enumerate(contents):
        (folder / part_name(rank)).write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        lines.append({"file": part_name(rank), "bytes": len(content), "sha256": sha256})
    return lines


def save(run, step, contents=CONTENTS, **manifest):
    """A checkpoint of the run `mine`; returns its folder."""
    parts = write_parts(run, step, contents)
    folder = folder_of(run, step)
    with quick_disk():
        publish(temporary_of(folder), folder, {"step": step, "run_id": "mine", "parts": parts, **manifest})
    return folder


def flip(file, where=0):
    """Change one bit of a file, and nothing of its size."""
    content = bytearray(file.read_bytes())
    content[where] ^= 1
    file.write_bytes(content)


def unmark(folder):
    """A checkpoint whose save was cut off right before its marker."""
    (folder / "COMPLETE").unlink()
    return folder
