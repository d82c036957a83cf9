"""`speft compare-masks`: what it reads, prints and draws, and what it refuses."""

import shutil
from pathlib import Path

import pytest
import torch

from speft_ds.adapter.format import write_adapter
from speft_ds.cli.commands.compare_masks import compare, short_names
from speft_ds.sparse.mask import Mask, save_mask
from unit.adapter.samples import refused
from unit.commands import run

SHAPE = {"layers.0.q.weight": (10, 10), "layers.0.up.weight": (20, 10), "layers.1.q.weight": (10, 10)}
Q, UP, Q1 = SHAPE


def make(entries, shape=SHAPE):
    index = {name: torch.tensor(sorted(entries.get(name, ())), dtype=torch.int32) for name in shape}
    return Mask(index=index, shape=dict(shape))


@pytest.fixture
def write(tmp_path):
    """write("snip", {weight: positions}) -> the folder of a mask."""

    def mask(name, entries, shape=SHAPE, **facts):
        save_mask(tmp_path / name / "mask.safetensors", make(entries, shape), facts)
        return tmp_path / name

    return mask


@pytest.fixture
def write_run(tmp_path):
    """write_run("run", {weight: positions}) -> a run folder with an adapter."""

    def run(name, entries, **facts):
        mask = make(entries)
        entries = ((weight, index, torch.ones(len(index))) for weight, index in mask.index.items())
        needed = {"base": "base", "dtype": "float32", "fingerprint": "0", "shapes": SHAPE}
        (tmp_path / name).mkdir()
        write_adapter(tmp_path / name / "adapter", entries, {**needed, "mask": mask.facts(), **facts})
        return tmp_path / name

    return run


def printed(capsys):
    """The rows of the table that was printed: [number, name, entries, density, *values]."""
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    return [line for line in lines if line and line[0].isdigit() and len(line) > 4]


A = {Q: {1, 2, 3}, UP: {0, 199}}
B = {Q: {2, 3, 4}, Q1: {7}}


def test_masks_in_files_folders_and_runs(write, write_run, capsys, tmp_path, monkeypatch):
    first, trained, picture = write("first", A), write_run("run", B), tmp_path / "new" / "jaccard.png"
    paths = [first, first / "mask.safetensors", trained, trained / "adapter"]
    assert run(monkeypatch, "compare-masks", *map(str, paths), "--output", str(picture)) == 0
    rows = printed(capsys)
    value = f"{2 / 7:.4f}"
    assert [row[2:] for row in rows] == [
        ["5", "1.250%", "1", "1", value, value],
        ["5", "1.250%", "1", "1", value, value],
        ["4", "1.000%", value, value, "1", "1"],
        ["4", "1.000%", value, value, "1", "1"],
    ]
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize("mask", [None, {}, {"num_target_elements": "many"}])
def test_an_adapter_without_mask_facts_has_no_density(write_run, capsys, mask):
    a, b = write_run("a", A), write_run("b", {Q: {1}}, mask=mask)
    compare([a, b / "adapter" / "adapter.safetensors"], None)
    assert printed(capsys) == [
        ["1", "a", "5", "1.250%", "1", f"{1 / 5:.4f}"],
        ["2", "b", "1", "unknown", f"{1 / 5:.4f}", "1"],
    ]


def test_masks_of_different_bases_are_noted(write, capsys):
    a, b = write("a", A, fingerprint_bfloat16="1"), write("b", B, fingerprint_bfloat16="2")
    compare([a, write("c", A, fingerprint_bfloat16=["1"])], None)  # of another program, who knows
    assert "note:" not in capsys.readouterr().out
    compare([a, b], None)
    assert "note:" in capsys.readouterr().out
    compare([a, a, write("c", A)], None)
    assert "note:" not in capsys.readouterr().out


def refuse(paths, *where, output=None):
    refused(lambda: compare(paths, output), " and ".join(map(str, where)))


def test_masks_of_different_models_are_refused(write, write_run):
    a = write("a", A)
    for other in (
        write("other", A, {**SHAPE, UP: (10, 20)}),
        write("strange", {}, {"h.0.c.weight": (10, 10)}),  # no weight in common
    ):
        refuse([a, other], a / "mask.safetensors", other / "mask.safetensors")
    adapters = [write_run("r", {Q: {1}}), write_run("s", {UP: {1}})]
    refuse(adapters, *(run / "adapter" / "adapter.safetensors" for run in adapters))
    narrow = write("narrow", {}, {**SHAPE, UP: (10, 10)})
    refused(lambda: compare([write_run("t", A), narrow], None), "narrow", UP)


def test_what_is_no_mask_is_refused(write, write_run, tmp_path):
    a, run = write("a", A), write_run("run", A)
    refuse([a, tmp_path / "none"], tmp_path / "none")
    (tmp_path / "empty").mkdir()
    refuse([a, tmp_path / "empty"], tmp_path / "empty")
    (tmp_path / "text.safetensors").write_text("no")
    refuse([a, tmp_path / "text.safetensors"], tmp_path / "text.safetensors")
    content = (run / "adapter" / "adapter.safetensors").read_bytes()
    (run / "adapter" / "adapter.safetensors").write_bytes(content[:-1] + b"\7")
    refuse([a, run], run / "adapter")
    shutil.rmtree(run / "adapter")
    refuse([a, run], run)
    refuse([a, write("b", B)], tmp_path / "a", output=tmp_path / "a")  # a picture in the place of a folder
    refuse([a, tmp_path / "b"], output=tmp_path / "text.safetensors" / "jaccard.png")


def test_a_mask_beside_an_adapter_comes_first(write_run, capsys):
    run = write_run("run", A)
    save_mask(run / "mask.safetensors", make(B), {})
    compare([run, run / "adapter"], None)
    assert [row[1:3] for row in printed(capsys)] == [["run", "4"], ["adapter", "5"]]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        ("runs/snip/mask.safetensors runs/force/mask.safetensors", "snip force"),
        ("runs/a/adapter other/b", "a b"),
        ("x/a y/a/mask.safetensors y/b", "x/a y/a b"),
        ("a/adapter/adapter.safetensors a/mask.safetensors", "adapter.safetensors mask.safetensors"),
        ("masks/one.safetensors masks/two.safetensors", "one.safetensors two.safetensors"),
        ("a ./a b/../a", "a a a"),
        ("/ /mask.safetensors", "/ mask.safetensors"),
    ],
)
def test_short_names(tmp_path, monkeypatch, paths, names):
    monkeypatch.chdir(tmp_path)
    assert short_names(list(map(Path, paths.split()))) == names.split()
