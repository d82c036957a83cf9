"""`model.dtype: auto`: what the hardware is asked, what all ranks come to, what is said."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from speft_ds.comm import collectives
from speft_ds.config.load_recipe import ROOT
from speft_ds.errors import UserError
from speft_ds.model.dtype import agree_on_dtype, multiplies_bfloat16, resolve_dtype
from speft_ds.training.checkpoint.resume import Resume, check_unchanged, find_start
from speft_ds.training.run_dir import start_folder
from unit.written import load

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.mark.parametrize(
    ("architecture", "onednn", "avx512_bf16", "multiplies"),
    [
        ("x86_64", True, True, True),
        ("x86_64", False, True, False),  # ONEDNN_MAX_CPU_ISA=AVX2
        ("x86_64", True, False, False),  # AVX-512 of 2017: oneDNN supports it by emulation
        ("x86_64", False, False, False),
        ("aarch64", True, False, True),
        ("aarch64", False, False, False),
    ],
)
def test_a_cpu_multiplies_bfloat16_by_its_instructions(
    monkeypatch, architecture, onednn, avx512_bf16, multiplies
):
    monkeypatch.setattr(platform, "machine", lambda: architecture)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    assert multiplies_bfloat16("cpu") == multiplies
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not multiplies_bfloat16("cpu")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names instructions of x86_64")
def test_a_limit_of_the_instructions_is_heeded():
    code = "from speft_ds.model.dtype import multiplies_bfloat16; print(multiplies_bfloat16('cpu'))"
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("multiplies", [True, False])
def test_a_gpu_multiplies_bfloat16_if_it_need_not_emulate_it(monkeypatch, multiplies):
    def is_supported(including_emulation=True):
        return including_emulation or multiplies

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert multiplies_bfloat16("cuda") == multiplies


@pytest.mark.parametrize("multiplies", [True, False])
@pytest.mark.parametrize("recorded", [None, "bfloat16", "float32"])
def test_auto_is_what_the_run_has_or_the_hardware_multiplies(tmp_path, multiplies, recorded):
    recipe = load(tmp_path, "", "model.dtype=auto")
    found = resolve_dtype(recipe, multiplies, recorded)
    assert found.model.dtype == (recorded or ("bfloat16" if multiplies else "float32"))
    same = recipe.model_copy(update={"model": found.model})
    assert found == same and found.where("model.dtype") == recipe.where("model.dtype")
    for dtype in ("bfloat16", "float32"):
        explicit = load(tmp_path, "", f"model.dtype={dtype}")
        assert resolve_dtype(explicit, multiplies, recorded) == explicit


@pytest.fixture
def ranks(monkeypatch):
    """ranks(has_instructions of each): what this process takes for the answers of the ranks; it is rank 0."""
    monkeypatch.setattr(collectives, "device", lambda: torch.device("cpu"))
    monkeypatch.setenv("RANK", "0")

    def answer(*multiplies):
        monkeypatch.setattr(collectives, "all_gather_objects", lambda own: list(multiplies))

    return answer


def test_one_rank_without_the_instructions_decides_for_all(tmp_path, ranks, capsys, monkeypatch):
    recipe = load(tmp_path, "", "model.dtype=auto")
    for answers, dtype in [((True, True), "bfloat16"), ((True, False), "float32"), ((False,), "float32")]:
        ranks(*answers)
        assert agree_on_dtype(recipe).model.dtype == dtype
        (said,) = capsys.readouterr().out.splitlines()
        assert "model.dtype=auto" in said and dtype in said
    monkeypatch.setenv("RANK", "1")
    agree_on_dtype(recipe)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("overrides", [["model.dtype=bfloat16"], []])
def test_bfloat16_without_the_instructions_is_warned_of_once(tmp_path, ranks, capsys, overrides):
    recipe = load(tmp_path, "", *overrides)
    ranks(True, False)
    assert agree_on_dtype(recipe) == recipe
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("warning: ") and "model.dtype=float32" in said
    ranks(True, True)
    agree_on_dtype(recipe)
    ranks(False, False)
    agree_on_dtype(load(tmp_path, "", "model.dtype=float32"))
    assert capsys.readouterr().out == ""


def test_a_resumed_run_keeps_its_dtype(tmp_path, ranks, capsys):
    recipe = load(tmp_path, "", "model.dtype=auto")
    ran = resolve_dtype(recipe, True)
    start_folder(ran)  # stopped before its first checkpoint
    start = find_start(recipe, Resume("auto"))
    assert (start.state, start.dtype) == ("resumed", "bfloat16")
    capsys.readouterr()
    ranks(False, False)
    assert agree_on_dtype(recipe, start.dtype) == ran
    said, warned = capsys.readouterr().out.splitlines()
    assert "bfloat16" in said and warned.startswith("warning: ")
    with pytest.raises(UserError):  # only `auto` gives way
        check_unchanged(ran.model_dump(mode="json"), resolve_dtype(recipe, False), (), Path("run"))
