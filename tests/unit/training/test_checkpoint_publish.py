"""Making a checkpoint of its parts: interrupted at any moment, it leaves nothing that only looks whole."""

import contextlib
import errno
import io
import os
import shutil
import sys

import pytest

from speft_ds.training.checkpoint.folder import (
    folder_of,
    inspect,
    latest_valid,
    list_checkpoints,
    part_name,
    publish,
    remove,
    temporary_of,
    verify,
)
from unit.saved import CONTENTS, manifest_of, save, unmark, write_parts

OLD = (b"of step 10",)
OTHER = (b"of another save", b"of as many", b"ranks", b"and one more")
# Of the interpreter's audit events, those that touch the disk; they come before the operation.
OPERATIONS = {"open", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir"}


def contents(folder):
    return tuple((folder / part["file"]).read_bytes() for part in inspect(folder).manifest["parts"])


def test_strays_of_another_world_size_are_removed(tmp_path):
    write_parts(tmp_path, 10, OTHER)
    temporary = temporary_of(folder_of(tmp_path, 10))
    (temporary / "part_00000.safetensors.1a2b3c4d.tmp").write_bytes(b"half")
    folder = save(tmp_path, 10)
    names = {path.name for path in folder.iterdir()}
    assert names == {"manifest.json", "COMPLETE", *(part_name(rank) for rank in range(len(CONTENTS)))}
    assert contents(folder) == CONTENTS and verify(inspect(folder)) is None


@pytest.mark.parametrize("spoil", [unmark, lambda folder: folder])
def test_a_folder_of_the_same_step_is_replaced(tmp_path, spoil):
    spoil(save(tmp_path, 10, OTHER))
    folder = save(tmp_path, 10)
    assert len(list(folder.iterdir())) == len(CONTENTS) + 2
    assert inspect(folder).problem is None and contents(folder) == CONTENTS


@pytest.mark.parametrize("what", ["missing", "short"])
def test_without_all_parts_there_is_no_checkpoint(tmp_path, what):
    """As where the nodes do not share the run folder."""
    parts = write_parts(tmp_path, 10)
    folder = folder_of(tmp_path, 10)
    part = temporary_of(folder) / part_name(1)
    part.unlink() if what == "missing" else os.truncate(part, part.stat().st_size - 1)
    with pytest.raises(OSError, match=r"part_00001.*do all nodes see this folder"):
        publish(temporary_of(folder), folder, manifest_of(10, parts))
    assert not folder.exists()


# Interruptions. Each state is what a save of step 20 may find.

STATES = {
    "nothing": lambda run: None,
    "an older one": lambda run: save(run, 10, OLD),
    "an unfinished one": lambda run: (save(run, 10, OLD), unmark(save(run, 20, OTHER))),
    "another one": lambda run: (save(run, 10, OLD), save(run, 20, OTHER)),
    "only another one": lambda run: save(run, 20, OTHER),
}
WITH_OLDER = {"an older one", "an unfinished one", "another one"}


def interrupted(action, moment, interrupt):
    """Run an action in a forked process up to one moment; False where it ended without reaching it.

    Moments are: before a file operation; once a file is open to write, and empty; before a flush.
    """
    pid = os.fork()
    if pid:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, 1), f"moment {moment} ended with {code}"
        return code == 1
    left = moment + 1

    def pass_by():
        nonlocal left
        left -= 1
        if left == 0:
            interrupt()

    def opening(*arguments, plain=io.open, **more):
        file = plain(*arguments, **more)
        if file.writable():
            pass_by()
        return file

    try:
        io.open, os.fsync = opening, lambda descriptor: pass_by()
        sys.addaudithook(lambda event, _: pass_by() if event in OPERATIONS else None)
        with contextlib.suppress(OSError):
            action()
        os._exit(0 if left > 0 else 1)
    finally:
        os._exit(3)


def die():
    os._exit(1)


def fail():
    raise OSError(errno.ENOSPC, "no space left")


def interruptions(folder, state, action, interrupt):
    """A run folder for every moment at which an action was interrupted."""
    runs = []
    for moment in range(200):
        run = folder / f"{moment}"
        STATES[state](run)
        if not interrupted(action(run), moment, interrupt):
            assert moment > 5
            return runs
        runs.append(run)
    raise AssertionError("it does not end")


def publishing(run):
    """The end of a save of step 20."""
    parts = write_parts(run, 20)
    folder = folder_of(run, 20)
    return lambda: publish(temporary_of(folder), folder, manifest_of(20, parts))


@pytest.fixture(scope="module", params=[f"{how}, {state}" for how in ("die", "fail") for state in STATES])
def left(request, tmp_path_factory):
    """(What was there before, a run folder for every moment at which the save was interrupted.)"""
    how, state = request.param.split(", ")
    folder = tmp_path_factory.mktemp("left")
    return state, interruptions(folder, state, publishing, {"die": die, "fail": fail}[how])


def test_an_interrupted_save_leaves_the_old_state_or_a_whole_checkpoint(left):
    state, runs = left
    for run in runs:
        counting = {c.step: c for c in list_checkpoints(run) if c.problem is None}
        assert all(verify(checkpoint) is None for checkpoint in counting.values()), run
        assert state not in WITH_OLDER or contents(counting.pop(10).path) == OLD
        assert counting.keys() <= {20}
        assert all(contents(checkpoint.path) in (CONTENTS, OTHER) for checkpoint in counting.values()), run


def test_after_an_interrupted_save_a_run_goes_on(left):
    """From an older one, from this one or, where it was the first, from the beginning; it never refuses."""
    state, runs = left
    older = 10 if state in WITH_OLDER else None
    for run in runs:
        found = latest_valid(run, "mine")
        assert (found and found.step) in (older, 20), run


def test_whatever_an_interrupted_save_left_the_next_comes_to_its_end(left, tmp_path):
    for run in left[1]:
        again = shutil.copytree(run, tmp_path / run.name)
        assert contents(save(again, 20)) == CONTENTS and inspect(folder_of(again, 20)).problem is None
        assert not temporary_of(folder_of(again, 20)).exists()


@pytest.mark.parametrize("interrupt", [die, fail])
def test_half_removed_a_checkpoint_does_not_count(tmp_path, interrupt):
    def removing(run):
        return lambda: remove(folder_of(run, 20))

    first, *others = interruptions(tmp_path, "another one", removing, interrupt)
    assert inspect(folder_of(first, 20)).problem is None
    for run in others:
        assert inspect(folder_of(run, 20)).problem.startswith("its save did not come to its end"), run
