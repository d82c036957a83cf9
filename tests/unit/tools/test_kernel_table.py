"""`speft doctor --kernels`: the real command measures once and prints what it found."""

import json

import pytest

from speft_ds.sparse.kernels.costs import KernelCosts
from unit.commands import run, speft


def test_it_measures_once_and_prints_the_tables(tmp_path):
    environment = {"SPEFT_DS_CACHE": str(tmp_path), "SPEFT_DS_KERNELS": "measured", "DS_ACCELERATOR": "cpu"}
    first = speft("doctor", "--kernels", **environment)
    assert first.returncode == 0, first.stderr
    files = {path: path.read_bytes() for path in (tmp_path / "kernels").iterdir()}
    tables = [KernelCosts.from_json(json.loads(content)) for content in files.values()]
    assert {table.dtype for table in tables} == {"float32", "bfloat16"}
    for table in tables:
        assert f"{table.device}, {table.dtype}" in first.stdout and table.seconds < 60
        assert len(table.classes) == 6 and len(table.measurements) == 72
        for row in table.measurements:
            assert f"{row.over_dense:.2f}" in first.stdout
    second = speft("doctor", "--kernels", **{**environment, "SPEFT_DS_KERNELS": "rules"})
    assert {path: path.read_bytes() for path in (tmp_path / "kernels").iterdir()} == files
    assert "SPEFT_DS_KERNELS=rules" in second.stdout and second.returncode == 0


@pytest.mark.parametrize(("words", "code"), [(["--kernels", "--remeasure"], 0), (["--remeasure"], 2)])
def test_remeasure_is_for_the_kernels(monkeypatch, tmp_path, capsys, words, code):
    from speft_ds.sparse.kernels import measure

    monkeypatch.setenv("SPEFT_DS_CACHE", str(tmp_path))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setitem(measure.SHAPES, "cpu", [(48, 64)])
    monkeypatch.setattr(measure, "ENOUGH_S", 0.0)
    measured, real = [], measure.measure
    monkeypatch.setattr(measure, "measure", lambda *args: measured.append(args[1]) or real(*args))
    if code == 0:
        assert run(monkeypatch, "doctor", "--kernels") == 0
    assert run(monkeypatch, "doctor", *words) == code
    assert measured == (["float32", "bfloat16"] * 2 if code == 0 else [])
    assert code == 0 or "--kernels" in capsys.readouterr().err
