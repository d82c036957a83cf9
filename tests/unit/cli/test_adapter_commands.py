"""The commands about adapters, as they are typed: what they write, print and refuse."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from speft_ds import apply_adapter
from speft_ds.adapter.format import Adapter
from unit.adapter.samples import SHAPES, Q, assert_same, flat, load, matrices, read, tune, write
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
def two():
    """An adapter `a`, and a run `b` whose adapter shares some entries with it."""
    a, b = matrices(0, 0.3), matrices(1, 0.3)
    b[Q] = a[Q]
    write(Path("a"), a)
    write(Path("b/adapter"), b)
    return a, b


@pytest.fixture
def tuned(tiny):
    return tune(tiny["untied"], "tuned")


def row_of(name, out):
    """The numbers of a weight's row in a table."""
    return next(line.split()[1:] for line in out.splitlines() if line.split()[:1] == [name])


@pytest.mark.parametrize("weights", ["1.0,0.5", "1.0 0.5"])
def test_compose(typed, two, weights):
    out = typed("compose", "a", "b", "sum", "--weights", weights)
    assert_same(read("sum"), {name: two[0][name] + two[1][name] * 0.5 for name in SHAPES})
    a, b = map(flat, two)
    shared, opposite = int(((a != 0) & (b != 0)).sum()), int((a * b < 0).sum())
    assert all(f"{count:,}" in out for count in (Adapter.open("sum").num_entries, shared, opposite))


def test_compress(typed, two):
    out = typed("compress", "a", "small", "--method", "ternary", "--keep", "0.2", "--dtype", "bf16")
    for line, adapter in zip(out.splitlines(), map(Adapter.open, ("a", "small")), strict=False):
        count, size = adapter.num_entries, adapter.num_bytes
        assert all(text in line for text in (f"{count:,}", f"{size:,}", f"{size / count:.2f}"))
    assert Adapter.open("small").delta_dtype == torch.bfloat16
    typed("compress", "a", "dropped", "--method", "dare", "--keep", "0.5", "--seed", "3")
    assert Adapter.open("dropped").facts["history"][0]["seed"] == 3


def test_diff(typed, two):
    a, b = two
    out = typed("diff", "a", "b")
    count, norm = str(int((a[Q] != 0).sum())), f"{float(a[Q].norm()):.4g}"
    assert row_of(Q, out) == ["0", "0", count, "0", norm, norm, "0"]
    only = [str(int(((x != 0) & (y == 0)).sum())) for x, y in ((flat(a), flat(b)), (flat(b), flat(a)))]
    assert row_of("all", out)[:4] == [str(len(SHAPES)), *only, count]
    assert "cosine" in out and "cosine" not in typed("diff", "a", "a")
    assert f"{Adapter.open('b/adapter').num_entries:,}" in row_of("all", typed("diff", "b"))


def test_inspect(typed, two):
    out = typed("inspect", "a", "--against", "b", "--output", "entries.png")
    adapter = Adapter.open("a")
    largest = max(float(values.abs().max()) for values in two[0].values())
    name, (row, column, delta) = next((n, row_of(n, out)) for n in SHAPES if n in out)
    assert f"{float(two[0][name][int(row), int(column)]):+.6g}" == delta
    assert f"{largest:.4g}" in out and f"{adapter.num_entries:,}" in out and f"{adapter.num_bytes:,}" in out
    assert Path("entries.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    facts = json.loads(Path("a/adapter.json").read_text())
    quantised = {"base_format": "mxfp6", "quantised": list(SHAPES)[:2]}
    Path("a/adapter.json").write_text(json.dumps(facts | quantised))
    (line,) = [line for line in typed("inspect", "a").splitlines() if line.startswith("base ")]
    assert all(part in line for part in (" 2 ", "mxfp6", "6.25")) and "mxfp6" not in out


def test_graft(typed, tiny, tuned):
    out = typed("graft", tiny["untied"], tuned, "grafted", "--num-entries", "200")
    assert Adapter.open("grafted").num_entries == 200 and out.startswith("200 ")
    lost = [line for line in out.splitlines() if line.startswith("lost: ")]
    assert any("model.norm.weight" in line and " 35 " in line for line in lost)
    assert typed("graft", tiny["untied"], tuned, "q", "--density", "0.01", "--target", "q_proj")
    assert all(name.endswith("q_proj.weight") for name in Adapter.open("q").names)


def test_merge_and_export(typed, tiny, tuned):
    typed("graft", tiny["untied"], tuned, "runs/mine/adapter", "--density", "0.05")
    assert typed("merge", "runs/mine", "merged").endswith("  merged\n")
    model = apply_adapter(load(tiny["untied"]), "runs/mine/adapter")
    assert_same(load("merged").state_dict(), model.state_dict())
    typed("merge", "runs/mine", "half", "--base", tiny["untied"], "--alpha", "0.5", "--dtype", "float16")
    assert all(value.dtype == torch.float16 for value in load_file("half/model.safetensors").values())
    typed("merge", "runs/mine", "parts", "--max-shard-size", "20KB")
    index = json.loads(Path("parts/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    out = typed("export", "runs/mine", "for_peft", "--format", "peft")
    assert out.startswith(f"{Adapter.open('runs/mine/adapter').num_entries:,} ")
    config = json.loads(Path("for_peft/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny["untied"])
    assert "runs/mine/adapter" in typed("merge", "runs/mine", "no", "--base", tuned, code=2)


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        ("compose a b sum --weights 1.0;x", "where: --weights"),
        ("compose a c sum", "where: c"),
        ("compress a small --keep 0.5", "where: --keep"),
        ("compress a small --method zip", "'--method'"),
        ("graft a b none", "where: graft"),
        ("inspect a --output a", "where: a"),
        ("merge a b", "where: OUTPUT"),
        ("export a new --format gguf", "'--format'"),
    ],
)
def test_what_is_refused(typed, two, arguments, where):
    assert where in typed(*arguments.split(), code=2)


def test_no_more_is_imported_than_is_needed(two):
    code = """
import sys
from speft_ds.cli import main as cli
for arguments in (["compose", "a", "b", "sum", "--weights", "x"], ["diff", "a", "b"]):
    sys.argv = ["speft", *arguments]
    try:
        cli.main()
    except SystemExit as left:
        print(left.code, *({"torch", "transformers", "deepspeed"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-1]) == ("2", "0 torch") and "--weights" in done.stderr
