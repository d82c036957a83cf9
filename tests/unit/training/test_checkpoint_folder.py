"""Checkpoint folders: which count, why others do not, which one a run goes on from, and which are kept."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speft_ds.config.train_config import TrainConfig
from speft_ds.errors import UserError
from speft_ds.io import sha256_of
from speft_ds.training.checkpoint.folder import (
    clean,
    folder_of,
    inspect,
    latest_valid,
    list_checkpoints,
    prune,
    temporary_of,
    verify,
)
from unit.saved import CONTENTS, flip, save, unmark, write_parts


def rewrite_manifest(folder, **changes):
    """A manifest that says something else, and is marked as complete."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    (folder / "COMPLETE").write_text(sha256_of(folder / "manifest.json") + "\n")


def truncate(file, size):
    with file.open("r+b") as opened:
        opened.truncate(size)


def steps(run):
    return [checkpoint.step for checkpoint in list_checkpoints(run)]


def test_a_complete_one_counts(tmp_path):
    folder = save(tmp_path, 10, validation_loss=1.5)
    checkpoint = inspect(folder)
    assert (checkpoint.path, checkpoint.step, checkpoint.problem) == (folder, 10, None)
    assert checkpoint.manifest["run_id"] == "mine" and checkpoint.validation_loss == 1.5
    assert verify(checkpoint) is None
    assert [(folder / part["file"]).read_bytes() for part in checkpoint.manifest["parts"]] == [*CONTENTS]
    assert not temporary_of(folder).exists()
    assert inspect(save(tmp_path, 20)).validation_loss is None  # where none was measured


# What is said -> what is wrong.
WRONG = {
    "its save did not come to its end: it has no COMPLETE": unmark,
    "it is damaged: it has no manifest.json": lambda folder: (folder / "manifest.json").unlink(),
    "manifest.json is damaged": lambda folder: flip(folder / "manifest.json", 40),
    "part_00000.safetensors has 15 bytes of 16": lambda f: truncate(f / "part_00000.safetensors", 15),
    "part_00001.safetensors has 9 bytes of 8": lambda f: truncate(f / "part_00001.safetensors", 9),
    "part_00002.safetensors is missing": lambda folder: (folder / "part_00002.safetensors").unlink(),
    "it has format 1, this version reads 3": lambda folder: rewrite_manifest(folder, format_version=1),
}


@pytest.mark.parametrize("problem", WRONG)
def test_what_is_wrong_is_said(tmp_path, problem):
    folder = save(tmp_path, 10)
    WRONG[problem](folder)
    assert problem in inspect(folder).problem


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


@pytest.mark.parametrize("num_readers", [1, 2, 3, 4, 5])
def test_readers_share_the_parts_and_miss_no_flipped_bit(tmp_path, num_readers):
    for damaged in range(3):
        folder = save(tmp_path, 10, (b"a", b"b", b"c"))
        flip(folder / f"part_{damaged:05d}.safetensors")
        checkpoint = inspect(folder)
        assert checkpoint.problem is None  # what can be seen without reading it all
        found = [verify(checkpoint, first, num_readers) for first in range(num_readers)]
        said = f"it is damaged: the hash of part_{damaged:05d}.safetensors is not the recorded one"
        assert found == [said if damaged % num_readers == first else None for first in range(num_readers)]


def test_a_part_that_is_gone_since_is_found(tmp_path):
    checkpoint = inspect(save(tmp_path, 10))
    (checkpoint.path / "part_00001.safetensors").unlink()
    assert verify(checkpoint).startswith("part_00001.safetensors is not readable")


def test_all_are_listed_newest_first_by_number(tmp_path):
    for step in (999_999, 20, 1_000_000, 100):
        save(tmp_path, step)
    unmark(save(tmp_path, 50))
    write_parts(tmp_path, 60)
    for other in ("step_10", "notes", "step_000070.bak", "step_000080 (copy)"):
        (tmp_path / "checkpoints" / other).mkdir()
    assert steps(tmp_path) == [1_000_000, 999_999, 100, 50, 20]
    assert list_checkpoints(tmp_path / "nowhere") == []


# Before a run goes on


def test_what_interrupted_saves_left_is_cleared_away(tmp_path, capsys):
    complete, unfinished = save(tmp_path, 10), unmark(save(tmp_path, 5))
    write_parts(tmp_path, 10)
    write_parts(tmp_path, 30)
    clean(tmp_path, 10)
    clean(tmp_path / "nowhere", 0)
    assert capsys.readouterr().out == ""
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {complete.name, unfinished.name}
    assert verify(inspect(complete)) is None


def test_later_ones_that_cannot_be_used_are_set_aside(tmp_path, capsys):
    """They would be taken for newer ones than those that the run is going to make."""
    complete, unfinished, damaged = save(tmp_path, 10), unmark(save(tmp_path, 20)), save(tmp_path, 30)
    flip(damaged / "part_00000.safetensors")
    clean(tmp_path, 10)
    said = capsys.readouterr().out.splitlines()
    assert sorted(said) == [
        f"note: {path} is set aside as {path.name}.unusable" for path in (unfinished, damaged)
    ]
    assert steps(tmp_path) == [10] and verify(inspect(complete)) is None
    assert (damaged.with_name("step_000030.unusable") / "part_00000.safetensors").is_file()
    save(tmp_path, 30)
    clean(tmp_path, 10)  # in the place of the other
    assert capsys.readouterr().out.count("\n") == 1
    clean(tmp_path, 10)
    assert capsys.readouterr().out == ""


# The newest that counts


def newest(run, run_id="mine", below=None):
    """Its step."""
    found = latest_valid(run, run_id, below)
    return found and found.step


def test_the_newest_complete_one_is_taken_without_a_word(tmp_path, capsys):
    for step in (10, 30, 20):
        save(tmp_path, step)
    assert newest(tmp_path) == 30
    assert newest(tmp_path, below=30) == 20 and newest(tmp_path, below=20) == 10
    assert capsys.readouterr().out == ""


def test_it_falls_back_and_says_why(tmp_path, capsys):
    save(tmp_path, 10)
    save(tmp_path, 20, run_id="other")
    truncated, unfinished = save(tmp_path, 30), unmark(save(tmp_path, 40))
    truncate(truncated / "part_00000.safetensors", 3)
    assert newest(tmp_path) == 10
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"note: checkpoint {unfinished}: its save did not come to its end")
    assert said[1].startswith(f"note: checkpoint {truncated}: it is damaged: part_00000.safetensors has 3")
    assert "step_000020: it is of another run; looking for an older one" in said[2] and len(said) == 3
    assert newest(tmp_path, run_id=None) == 20  # where the run has no name, any will do


def test_none_where_there_is_none_or_only_unfinished_ones(tmp_path, capsys):
    assert newest(tmp_path) is None
    write_parts(tmp_path, 10)
    assert newest(tmp_path) is None and capsys.readouterr().out == ""
    unmark(save(tmp_path, 20))
    (tmp_path / "checkpoints" / "step_000030").mkdir()
    assert newest(tmp_path) is None and capsys.readouterr().out.count("\n") == 2


SPOILT = {
    "without its manifest": lambda folder: (folder / "manifest.json").unlink(),
    "with another marker": lambda folder: flip(folder / "COMPLETE"),
    "of another run": lambda folder: rewrite_manifest(folder, run_id="other"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_where_none_can_be_used_nothing_is_begun_anew(tmp_path, how):
    SPOILT[how](save(tmp_path, 10))
    unmark(save(tmp_path, 20))
    with pytest.raises(UserError) as caught:
        newest(tmp_path)
    assert caught.value.what == "no complete checkpoint to resume from"
    assert caught.value.where == str(tmp_path / "checkpoints")
    assert f"rm -r {tmp_path}" in caught.value.fix


def test_below_a_damaged_one_there_must_be_another(tmp_path):
    save(tmp_path, 10)
    with pytest.raises(UserError, match="no complete checkpoint"):
        newest(tmp_path, below=10)


# Which are kept, against the rule in words

LOSSES = st.sampled_from([None, 1.0, 1.5, 2.0])


def is_kept(step, newest, found, keep):
    """The rule for one step; `found`: step -> whether it is complete, whose it is, validation loss."""
    is_complete, run_id, loss = found[step]
    if step >= newest or (is_complete and run_id != "mine"):
        return True
    if not is_complete:
        return False
    losses = {
        other: loss
        for other, (is_complete, run_id, loss) in found.items()
        if is_complete and run_id == "mine" and other <= newest
    }
    is_last = sum(other > step for other in losses) < keep.keep_last
    is_every = keep.keep_every is not None and step % keep.keep_every == 0
    measured = [(loss, other) for other, loss in losses.items() if loss is not None]
    is_best = keep.keep_best and (loss, step) in measured and (loss, step) == min(measured)
    return is_last or is_every or is_best


@given(
    st.dictionaries(
        st.integers(1, 24),
        st.tuples(st.booleans(), st.sampled_from(["mine", "mine", "other"]), LOSSES),
        max_size=8,
    ),
    st.integers(1, 24),
    LOSSES,
    st.integers(1, 4),
    st.none() | st.integers(1, 6),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_what_nothing_says_to_keep_is_removed(found, newest, loss, keep_last, keep_every, keep_best):
    """One that is newer than the one just made was found damaged and passed over, or is another run's."""
    found[newest] = (True, "mine", loss)
    keep = TrainConfig(steps=1, keep_last=keep_last, keep_every=keep_every, keep_best=keep_best)
    with TemporaryDirectory() as folder:
        run = Path(folder)
        for step, (is_complete, run_id, loss) in found.items():
            path = save(run, step, (b"",), validation_loss=loss, run_id=run_id)
            if not is_complete:
                unmark(path)
        prune(folder_of(run, newest), keep)
        assert set(steps(run)) == {step for step in found if is_kept(step, newest, found, keep)}
        # What the rule is there for: the one just made stays, and all that is newer.
        assert {step for step in found if step >= newest} <= set(steps(run))
