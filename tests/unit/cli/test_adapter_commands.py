"""The commands about adapters, as they are typed: what they write, print and refuse."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import speft_ds
from speft_ds.adapter.format import Adapter
from unit.adapter.matrices import SHAPES, Q, matrices, read, write
from unit.commands import run

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture
def typed(monkeypatch, capsys):
    """typed("diff", "a", ...) -> what it printed; `code`: how it is to exit."""

    def run_command(*arguments, code=0):
        assert run(monkeypatch, *map(str, arguments)) == code, capsys.readouterr().err
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return said.out if code == 0 else said.err

    return run_command


@pytest.fixture
def two(tmp_path):
    """An adapter `a`, and a run `b` whose adapter shares some entries with it."""
    a, b = matrices(0, 0.3), matrices(1, 0.3)
    b[Q] = a[Q]
    write(tmp_path / "a", a)
    write(tmp_path / "b" / "adapter", b)
    return a, b


@pytest.fixture
def tuned(tiny, tmp_path):
    """The folder of a model with other weights than `tiny["untied"]`."""
    model = AutoModelForCausalLM.from_pretrained(tiny["untied"])
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.01
    model.save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned"


def test_compose(typed, two):
    a, b = two
    out = typed("compose", "a", "b", "sum", "--weights", "1.0,0.5")
    got = read("sum")
    assert all(torch.equal(got[name], a[name] + b[name] * 0.5) for name in SHAPES)
    entries = {name: (a[name] != 0, b[name] != 0) for name in SHAPES}
    shared = sum(int((x & y).sum()) for x, y in entries.values())
    opposite = sum(int((a[name] * b[name] < 0).sum()) for name in SHAPES)
    assert f"{Adapter.open('sum').num_entries:,} entries\n" in out
    assert f"collisions: {shared:,} entries in two or more, {opposite:,} with opposite signs\n" in out
    assert out.endswith("  sum\n")
    assert (
        typed("compose", "a", "b", "spaces", "--weights", "1.0 0.5") and read("spaces").keys() == got.keys()
    )


def test_compose_refuses(typed, two):
    assert "--weights is 1.0;x" in typed("compose", "a", "b", "sum", "--weights", "1.0;x", code=2)
    assert "2 adapters and 3 weights" in typed("compose", "a", "b", "sum", "--weights", "1,2,3", code=2)
    assert "there is no adapter" in typed("compose", "a", "c", "sum", code=2)
    assert "is there already" in typed("compose", "a", "b", "b", code=2)


@pytest.mark.parametrize(
    "options",
    [["--method", "dare", "--keep", "0.5"], ["--method", "ternary", "--keep", "0.2"], ["--dtype", "bf16"]],
)
def test_compress(typed, two, options):
    out = typed("compress", "a", "small", *options)
    for name, when in (("a", "before"), ("small", "after")):
        adapter, size = Adapter.open(name), (Adapter.open(name).folder / "adapter.safetensors").stat().st_size
        count = adapter.num_entries
        assert f"{when}: {count:,} entries, {size:,} bytes, {size / count:.2f} an entry" in out
    assert (Adapter.open("small").delta_dtype() == torch.bfloat16) == ("bf16" in options)


def test_compress_refuses(typed, two):
    assert "add --method" in typed("compress", "a", "small", "--keep", "0.5", code=2)
    assert "--method" in typed("compress", "a", "small", "--method", "zip", code=2)


def test_diff(typed, two):
    a, b = two
    out = typed("diff", "a", "b")
    lines = [line.split() for line in out.splitlines()]
    (row,) = [line for line in lines if line[:1] == [Q]]
    count = int((a[Q] != 0).sum())
    norm = f"{float(a[Q].norm()):.4g}"
    assert row[1:] == ["0", "0", str(count), "0", norm, norm, "0"]
    only_a = sum(int(((a[name] != 0) & (b[name] == 0)).sum()) for name in SHAPES)
    (footer,) = [line for line in lines if line[:2] == ["all", str(len(SHAPES))]]
    assert footer[2] == str(only_a) and footer[4] == str(count)
    assert "cosine of the deltas 0." in out
    assert "the entries are the same" in typed("diff", "a", "a")
    alone = typed("diff", "b")
    assert f"{Adapter.open('b/adapter').num_entries:,}" in alone and "only in B" not in alone.splitlines()[-1]


def test_inspect(typed, two):
    out = typed("inspect", "a", "--against", "b", "--output", "entries.png")
    adapter = Adapter.open("a")
    largest = max(float(values.abs().max()) for values in two[0].values())
    assert f"largest {largest:.4g}" in out and "norm of the deltas" in out and "q_proj" in out
    (name, row, column, delta) = next(
        line.split() for line in out.splitlines() if line.split()[:1] and line.split()[0] in SHAPES
    )
    assert f"{float(two[0][name][int(row), int(column)]):+.6g}" == delta
    assert abs(float(delta)) == pytest.approx(largest, rel=1e-5)
    assert f"{adapter.num_entries:,}" in out and "overlap with b" in out and "bytes" in out
    with open("entries.png", "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    assert "cannot write" in typed("inspect", "a", "--output", "a", code=2)


def test_graft(typed, tiny, tuned):
    out = typed("graft", tiny["untied"], tuned, "grafted", "--num-entries", "200")
    adapter = Adapter.open("grafted")
    assert adapter.num_entries == 200 and out.startswith("200 entries of ")
    assert "lost: model.norm.weight: 35 elements differ, norm " in out
    assert typed("graft", tiny["untied"], tuned, "q", "--density", "0.01", "--target", "q_proj")
    assert all(name.endswith("q_proj.weight") for name in Adapter.open("q").names)
    assert "either --density" in typed("graft", tiny["untied"], tuned, "none", code=2)


def test_merge_and_apply_agree(typed, tiny, tuned):
    typed("graft", tiny["untied"], tuned, "runs/mine/adapter", "--density", "0.05")
    out = typed("merge", "runs/mine", "merged")
    model = AutoModelForCausalLM.from_pretrained(tiny["untied"])
    speft_ds.apply_adapter(model, "runs/mine/adapter")
    merged = AutoModelForCausalLM.from_pretrained("merged").state_dict()
    assert all(torch.equal(merged[name], value) for name, value in model.state_dict().items())
    assert "read back and compared" in out and out.endswith("  merged\n")
    typed("merge", "runs/mine", "half", "--base", tiny["untied"], "--alpha", "0.5", "--dtype", "float16")
    assert all(value.dtype == torch.float16 for value in load_file("half/model.safetensors").values())
    assert "another base" in typed("merge", "runs/mine", "no", "--base", tuned, code=2)
    assert "is there already" in typed("merge", "runs/mine", "merged", code=2)


def test_export(typed, tiny, tuned):
    typed("graft", tiny["untied"], tuned, "runs/mine/adapter", "--density", "0.05")
    out = typed("export", "runs/mine", "for_peft", "--format", "peft")
    count = Adapter.open("runs/mine/adapter").num_entries
    assert out.startswith(f"{count:,} entries, ") and out.endswith("  for_peft\n")
    with open("for_peft/adapter_config.json") as file:
        assert json.load(file)["base_model_name_or_path"] == str(tiny["untied"])
    assert "'--format'" in typed("export", "runs/mine", "other", "--format", "gguf", code=2)


def test_no_more_is_imported_than_is_needed(two):
    code = """
import sys
from speft_ds import cli
for arguments in (["compose", "a", "b", "sum", "--weights", "x"], ["diff", "a", "b"]):
    sys.argv = ["speft", *arguments]
    try:
        cli.main()
    except SystemExit as left:
        print(left.code, *({"torch", "transformers", "deepspeed"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-1]) == ("2", "0 torch") and "--weights is x" in done.stderr
