"""Density by layer and module: the numbers against a plain count, the table, the pictures."""

import struct
import subprocess
import sys
import zlib

import pytest
import torch
from speft_ds.model.targets import place

from speft_ds.report.plots import jaccard_picture, mask_heat_map
from speft_ds.report.tables import density_table, jaccard_text, print_mask_table, short_modules
from speft_ds.sparse.mask import Mask

MODULES = {
    "self_attn.q_proj": (24, 24),
    "self_attn.k_proj": (8, 24),
    "self_attn.v_proj": (8, 24),
    "self_attn.o_proj": (24, 24),
    "mlp.gate_proj": (40, 24),
    "mlp.up_proj": (40, 24),
    "mlp.down_proj": (24, 40),
}


def decoder(num_layers, *others, seed=0):
    """A mask of random densities over a decoder, and over other weights of 100 elements."""
    generator = torch.Generator().manual_seed(seed)
    shape = {f"model.layers.{n}.{m}.weight": s for n in range(num_layers) for m, s in MODULES.items()}
    shape |= dict.fromkeys(others, (10, 10))
    index = {}
    for name, (rows, columns) in shape.items():
        density = 0.1 * torch.rand(1, generator=generator)
        chosen = torch.rand(rows * columns, generator=generator) < density
        index[name] = chosen.nonzero()[:, 0].to(torch.int32)
    return Mask(index=index, shape=shape)


def png_size(path):
    """(width, height) of a PNG whose chunks are all whole."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    position, kinds = 8, []
    while position < len(content):
        length, kind = struct.unpack(">I4s", content[position : position + 8])
        body = content[position + 4 : position + 8 + length]
        assert struct.pack(">I", zlib.crc32(body)) == content[position + 8 + length :][:4]
        kinds.append(kind)
        position += 12 + length
    assert kinds[0] == b"IHDR" and kinds[-1] == b"IEND" and b"IDAT" in kinds
    return struct.unpack(">II", content[16:24])


@pytest.mark.parametrize(
    ("name", "layer", "module"),
    [
        ("model.layers.3.self_attn.q_proj.weight", 3, "self_attn.q_proj"),
        ("transformer.h.11.attn.c_proj.weight", 11, "attn.c_proj"),
        ("model.layers.3.mlp.experts.7.up_proj.weight", 3, "mlp.experts.*.up_proj"),
        ("lm_head.weight", None, "lm_head"),
        ("model.linear2.weight", None, "model.linear2"),
        ("layers.4.weight", 4, "layers.*"),
        ("0", 0, "*"),
    ],
)
def test_the_place_of_a_weight(name, layer, module):
    assert place(name) == (layer, module)


def test_density_table_against_a_plain_count():
    mask = decoder(12, "lm_head.weight", "model.embed.weight")
    layers, modules, cells = density_table(mask)
    assert layers == [*map(str, range(12)), "other"]
    assert modules == [*MODULES, "lm_head", "model.embed"]
    for layer, row in zip(layers, cells, strict=True):
        for module, cell in zip(modules, row, strict=True):
            name = f"{module}.weight" if layer == "other" else f"model.layers.{layer}.{module}.weight"
            known = name in mask.shape
            assert cell == ((len(mask.index[name]), mask.numel(name)) if known else None), name


def test_experts_of_a_layer_are_summed():
    names = [f"model.layers.0.mlp.experts.{number}.up.weight" for number in range(3)]
    index = {name: torch.arange(number) for number, name in enumerate(names)}
    table = density_table(Mask(index, dict.fromkeys(names, (2, 5))))
    assert table == (["0"], ["mlp.experts.*.up"], [[(3, 30)]])


def test_modules_are_named_as_shortly_as_they_differ():
    assert short_modules(list(MODULES)) == [module.split(".")[1] for module in MODULES]
    assert short_modules(["attn.c_proj", "mlp.c_proj", "c_fc", "c_proj"]) == [
        "attn.c_proj", "mlp.c_proj", "c_fc", "c_proj"
    ]  # fmt: skip
    assert short_modules([]) == []


def test_the_table_has_every_count_and_total(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")  # the table has its full width all the same
    mask = decoder(3, "[red]head[/].weight")
    print_mask_table(mask)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    heads = [*(module.split(".")[1] for module in MODULES), "[red]head[/]", "total", "density"]
    assert ["layer", *heads] in lines
    for layer in map(str, range(3)):
        counts = [len(mask.index[f"model.layers.{layer}.{module}.weight"]) for module in MODULES]
        density = sum(counts) / sum(rows * columns for rows, columns in MODULES.values())
        assert [layer, *map(str, counts), "-", str(sum(counts)), f"{density:.3%}"] in lines
    last = lines[-1]
    assert last[0] == "total" and last[-2:] == [f"{mask.num_trainable:,}", f"{mask.density:.3%}"]
    q_proj = sum(len(index) for name, index in mask.index.items() if "q_proj" in name)
    assert last[1] == str(q_proj)


@pytest.mark.parametrize("num_layers", [1, 30, 80])
def test_a_heat_map_is_a_picture(tmp_path, num_layers):
    path = tmp_path / "new" / "mask.png"
    mask_heat_map(path, decoder(num_layers, "lm_head.weight"), f"{num_layers} layers")
    width, height = png_size(path)
    assert 500 < width < 2000 and 400 < height < 2500
    assert [file.name for file in path.parent.iterdir()] == ["mask.png"]


def test_odd_masks_have_a_picture(tmp_path):
    name = "a$b_{.0.$\\frac$.weight"  # not a formula
    empty = Mask({name: torch.empty(0, dtype=torch.int32)}, {name: (3, 3)})
    mask_heat_map(tmp_path / "empty.png", empty, "costs $5 or $6_{")
    full = Mask({name: torch.arange(9)}, {name: (3, 3)})
    mask_heat_map(tmp_path / "full.png", full, "x" * 300)
    names = [f"block.0.module_{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(600)]
    mask_heat_map(
        tmp_path / "wide.png", Mask({n: torch.arange(2) for n in names}, dict.fromkeys(names, (3, 3))), ""
    )
    assert all(png_size(path) for path in tmp_path.iterdir())


@pytest.mark.parametrize("size", [2, 12, 60])
def test_a_jaccard_matrix_is_a_picture(tmp_path, size):
    matrix = [
        [1.0 if row == column else row * column / size**2 for column in range(size)] for row in range(size)
    ]
    jaccard_picture(tmp_path / "jaccard.png", [f"mask $number {n}" for n in range(size)], matrix)
    assert png_size(tmp_path / "jaccard.png")
    assert len(list(tmp_path.iterdir())) == 1


def test_a_picture_that_cannot_be_drawn_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "jaccard.png"
    jaccard_picture(path, ["a"], [[1.0]])
    before = path.read_bytes()

    def full(_):
        raise OSError("no space left")

    monkeypatch.setattr("speft_ds.report.plots.flush_to_disk", full)
    with pytest.raises(OSError):
        jaccard_picture(path, ["a", "b"], [[1.0, 0.5], [0.5, 1.0]])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_only_equal_masks_show_as_1():
    values = {1.0: "1", 0.0: "0", 0.99999: "0.9999", 1e-9: "0.0001", 0.5: "0.5000", 0.12344: "0.1234"}
    assert {value: jaccard_text(value) for value in values} == values


def test_matplotlib_is_imported_for_drawing_only():
    code = "import sys, speft_ds.report.plots, speft_ds.cli.commands.compare_masks; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
