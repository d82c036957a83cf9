"""Folders that cannot be written, and what a check leaves in those that can."""

from pathlib import Path

from speft_ds.doctor.folders import check_caches, check_folder


def test_a_file_where_a_cache_should_be(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPEFT_DS_CACHE", str(tmp_path / "file"))
    (check,) = check_caches({})
    assert check.status == "problem" and "export SPEFT_DS_CACHE=" in check.fix


def test_folders_are_left_as_they_were(tmp_path):
    check = check_folder("cache", tmp_path / "a" / "b", "CACHE")
    assert check.status == "ok" and not list(tmp_path.iterdir())
    assert check_folder("cache", tmp_path, "CACHE", enough_gib=1e9).status == "warning"
    assert check_folder("cache", Path("/proc/none"), "CACHE").status == "problem"
