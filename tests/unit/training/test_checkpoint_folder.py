"""Checkpoint folders: which count, why others do not, and which one a run goes on from."""

import json

import pytest

from speft_ds.errors import UserError
from speft_ds.io import sha256_of
from speft_ds.training.checkpoint.folder import (
    clean,
    inspect,
    latest_valid,
    list_checkpoints,
    temporary_of,
    verify,
)
from unit.saved import CONTENTS, flip, save, unmark, write_parts


def rewrite_manifest(folder, **changes):
    """A manifest that says something else, and is marked as complete."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    (folder / "COMPLETE").write_text(sha256_of(folder / "manifest.json") + "\n")


def cleaned(run, step):
    """What was said."""
    said = []
    clean(run, step, said.append)
    return said


def truncate(file, size):
    with file.open("r+b") as opened:
        opened.truncate(size)


def test_a_whole_one_counts(tmp_path):
    folder = save(tmp_path, 10, validation_loss=1.5)
    checkpoint = inspect(folder)
    assert (checkpoint.path, checkpoint.step, checkpoint.problem) == (folder, 10, None)
    assert checkpoint.manifest["run_id"] == "mine" and checkpoint.validation_loss == 1.5
    assert verify(checkpoint) is None
    assert [(folder / part["file"]).read_bytes() for part in checkpoint.manifest["parts"]] == [*CONTENTS]
    assert not temporary_of(folder).exists()


def test_the_held_out_loss_is_none_where_none_was_measured(tmp_path):
    assert inspect(save(tmp_path, 10)).validation_loss is None


# What is wrong with one -> what is said of it.
WRONG = {
    "its save did not come to its end: it has no COMPLETE": unmark,
    "it is damaged: it has no manifest.json": lambda folder: (folder / "manifest.json").unlink(),
    "manifest.json is damaged: its hash is not the recorded one": lambda folder: flip(
        folder / "manifest.json", 40
    ),
    "it is damaged: part_00000.safetensors has 15 bytes of 16": lambda folder: truncate(
        folder / "part_00000.safetensors", 15
    ),
    "it is damaged: part_00001.safetensors has 9 bytes of 8": lambda folder: truncate(
        folder / "part_00001.safetensors", 9
    ),
    "it is damaged: part_00002.safetensors is missing": lambda folder: (
        folder / "part_00002.safetensors"
    ).unlink(),
    "it has format 1, this version reads 2": lambda folder: rewrite_manifest(folder, format_version=1),
    "it is of step 9, not 10: the folder was renamed": lambda folder: rewrite_manifest(folder, step=9),
}


@pytest.mark.parametrize("problem", WRONG)
def test_what_is_wrong_is_said(tmp_path, problem):
    folder = save(tmp_path, 10)
    WRONG[problem](folder)
    assert inspect(folder).problem == problem


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe", b"0" * 64])
def test_another_marker_does_not_count(tmp_path, content):
    folder = save(tmp_path, 10)
    (folder / "COMPLETE").write_bytes(content)
    assert inspect(folder).problem is not None


def test_an_empty_folder_and_a_file_do_not_count(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "step_000010").mkdir(parents=True)
    (checkpoints / "step_000020").write_text("")
    newest, oldest = list_checkpoints(tmp_path)
    assert newest.step == 20 and newest.problem.startswith("not readable")
    assert oldest.step == 10 and oldest.problem.startswith("its save did not come to its end")


def test_a_renamed_folder_does_not_count_but_a_copy_under_another_name_does(tmp_path):
    folder = save(tmp_path, 10)
    copy = folder.rename(tmp_path / "kept")
    assert (inspect(copy).step, inspect(copy).problem) == (10, None)
    renamed = copy.rename(folder.with_name("step_000020"))
    assert inspect(renamed).problem == "it is of step 10, not 20: the folder was renamed"


@pytest.mark.parametrize(("part", "where"), [(0, 0), (0, 15), (1, 3)])
def test_a_flipped_bit_in_a_part_is_found_by_its_hash(tmp_path, part, where):
    folder = save(tmp_path, 10)
    flip(folder / f"part_{part:05d}.safetensors", where)
    checkpoint = inspect(folder)
    assert checkpoint.problem is None  # what can be seen without reading it all
    assert (
        verify(checkpoint)
        == f"it is damaged: the hash of part_{part:05d}.safetensors is not the recorded one"
    )


def test_a_part_that_is_gone_since_is_found(tmp_path):
    checkpoint = inspect(save(tmp_path, 10))
    (checkpoint.path / "part_00001.safetensors").unlink()
    assert verify(checkpoint).startswith("part_00001.safetensors is not readable")


@pytest.mark.parametrize("num_readers", [1, 2, 3, 4, 5])
def test_readers_share_the_parts_and_miss_none(tmp_path, num_readers):
    for damaged in range(3):
        folder = save(tmp_path, 10, (b"a", b"b", b"c"))
        flip(folder / f"part_{damaged:05d}.safetensors")
        checkpoint = inspect(folder)
        found = [verify(checkpoint, first, num_readers) for first in range(num_readers)]
        assert [problem is not None for problem in found] == [
            damaged % num_readers == first for first in range(num_readers)
        ]


def test_all_are_listed_newest_first_by_number(tmp_path):
    for step in (999_999, 20, 1_000_000, 100):
        save(tmp_path, step)
    unmark(save(tmp_path, 50))
    write_parts(tmp_path, 60)
    for other in ("step_10", "notes", "step_000070.bak", "step_000080 (copy)"):
        (tmp_path / "checkpoints" / other).mkdir()
    assert [c.step for c in list_checkpoints(tmp_path)] == [1_000_000, 999_999, 100, 50, 20]
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_what_interrupted_saves_left_is_cleared_away(tmp_path):
    whole, unfinished = save(tmp_path, 10), unmark(save(tmp_path, 5))
    write_parts(tmp_path, 10)
    write_parts(tmp_path, 30)
    assert cleaned(tmp_path, 10) == []
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {whole.name, unfinished.name}
    assert verify(inspect(whole)) is None
    assert cleaned(tmp_path / "nowhere", 0) == []


def test_later_ones_that_cannot_be_used_are_set_aside(tmp_path):
    """They would be taken for newer ones than those that the run is going to make."""
    whole, unfinished, damaged = save(tmp_path, 10), unmark(save(tmp_path, 20)), save(tmp_path, 30)
    flip(damaged / "part_00000.safetensors")
    said = cleaned(tmp_path, 10)
    assert sorted(said) == [
        f"note: {path} is set aside as {path.name}.unusable" for path in (unfinished, damaged)
    ]
    assert [c.step for c in list_checkpoints(tmp_path)] == [10] and verify(inspect(whole)) is None
    assert (damaged.with_name("step_000030.unusable") / "part_00000.safetensors").is_file()
    save(tmp_path, 30)
    assert len(cleaned(tmp_path, 10)) == 1  # in the place of the other
    assert cleaned(tmp_path, 10) == []


# The newest whole one


def newest(run, run_id="mine", below=None):
    """(step, what was said)."""
    said = []
    found = latest_valid(run, run_id, said.append, below)
    return found and found.step, said


def test_the_newest_whole_one_is_taken_without_a_word(tmp_path):
    for step in (10, 30, 20):
        save(tmp_path, step)
    assert newest(tmp_path) == (30, [])


def test_it_falls_back_and_says_why(tmp_path):
    save(tmp_path, 10)
    save(tmp_path, 20, run_id="other")
    truncated = save(tmp_path, 30)
    truncate(truncated / "part_00000.safetensors", 3)
    unfinished = unmark(save(tmp_path, 40))
    step, said = newest(tmp_path)
    assert step == 10 and len(said) == 3
    assert said[0].startswith(f"note: checkpoint {unfinished}: its save did not come to its end")
    assert said[1].startswith(
        f"note: checkpoint {truncated}: it is damaged: part_00000.safetensors has 3 bytes"
    )
    assert "step_000020: it is of another run; looking for an older one" in said[2]


def test_of_a_run_without_a_name_any_will_do(tmp_path):
    save(tmp_path, 20, run_id="other")
    assert newest(tmp_path, run_id=None) == (20, [])


def test_only_older_ones_than_a_step(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step)
    assert newest(tmp_path, below=30) == (20, [])
    assert newest(tmp_path, below=20) == (10, [])


def test_none_where_there_is_none_or_only_unfinished_ones(tmp_path):
    assert newest(tmp_path) == (None, [])
    write_parts(tmp_path, 10)
    assert newest(tmp_path) == (None, [])
    unmark(save(tmp_path, 20))
    (tmp_path / "checkpoints" / "step_000030").mkdir()
    step, said = newest(tmp_path)
    assert step is None and len(said) == 2


@pytest.mark.parametrize("spoil", [lambda f: (f / "manifest.json").unlink(), lambda f: flip(f / "COMPLETE")])
def test_where_only_damaged_ones_are_left_nothing_is_begun_anew(tmp_path, spoil):
    spoil(save(tmp_path, 10))
    unmark(save(tmp_path, 20))
    with pytest.raises(UserError) as caught:
        newest(tmp_path)
    assert caught.value.what == "no complete checkpoint to resume from"
    assert caught.value.where == str(tmp_path / "checkpoints")
    assert f"rm -r {tmp_path}" in caught.value.fix


def test_where_only_those_of_another_run_are_left_nothing_is_begun_anew(tmp_path):
    save(tmp_path, 10, run_id="other")
    with pytest.raises(UserError, match="no complete checkpoint"):
        newest(tmp_path)


def test_below_a_damaged_one_there_must_be_another(tmp_path):
    save(tmp_path, 10)
    with pytest.raises(UserError, match="no complete checkpoint"):
        newest(tmp_path, below=10)
