"""Checkpoints that tests write on the spot, without torch: their parts are any bytes."""

import hashlib
import json
from pathlib import Path
from unittest import mock

from speft_ds.training.checkpoint.folder import folder_of, part_name, publish, temporary_of
from speft_ds.training.run_dir import start_folder, write_facts

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


def manifest_of(step, parts):
    """What a checkpoint of the run `mine` says of itself."""
    facts = {"recipe": {}, "base": {}, "progress": {}, "state": {}}
    return {"step": step, "run_id": "mine", "world_size": len(parts), "parts": parts, **facts}


def save(run, step, contents=CONTENTS, **manifest):
    """A checkpoint of the run `mine`; returns its folder."""
    parts = write_parts(run, step, contents)
    folder = folder_of(run, step)
    with quick_disk():
        publish(temporary_of(folder), folder, manifest_of(step, parts) | manifest)
    return folder


def make_run(recipe, *steps, run_id="mine", **facts):
    """The folder of a run of this recipe, with checkpoints of these steps."""
    folder = Path(recipe.output_dir)
    start_folder(recipe)
    write_facts(folder, {"run_id": run_id, "finished": False, **facts})
    for step in steps:
        save(folder, step, run_id=run_id, recipe=recipe.model_dump(mode="json", exclude={"name"}))
    return folder


def flip(file, where=0):
    """Change one bit of a file, and nothing of its size."""
    content = bytearray(file.read_bytes())
    content[where] ^= 1
    file.write_bytes(content)


def reseal(folder):
    """Have the manifest and the marker of a checkpoint fit its parts as they are now."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for part in manifest["parts"]:
        content = (folder / part["file"]).read_bytes()
        part |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    text = json.dumps(manifest)
    (folder / "manifest.json").write_text(text)
    (folder / "COMPLETE").write_text(hashlib.sha256(text.encode()).hexdigest())


def unmark(folder):
    """A checkpoint whose save was cut off right before its marker."""
    (folder / "COMPLETE").unlink()
    return folder
