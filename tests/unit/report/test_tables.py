"""Density by layer and module against a plain count, and numbers as text."""

import pytest

from speft_ds import terminal
from speft_ds.model import targets
from speft_ds.report import tables
from unit.report.sample import MODULES, decoder


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
    assert targets.place(name) == (layer, module)


def test_density_table_against_a_plain_count():
    experts = [f"model.layers.0.mlp.experts.{number}.up.weight" for number in range(3)]  # one place: summed
    mask = decoder(12, "lm_head.weight", *experts)
    layers, modules, cells = tables.density_table(mask)
    assert layers == [*map(str, range(12)), "other"]
    assert modules == [*MODULES, "lm_head", "mlp.experts.*.up"]
    for layer, row in zip(layers, cells, strict=True):
        for module, cell in zip(modules, row, strict=True):
            name = f"{module}.weight" if layer == "other" else f"model.layers.{layer}.{module}.weight"
            names = experts if (layer, module) == ("0", modules[-1]) else {name} & set(mask.shape)
            counts = sum(len(mask.index[n]) for n in names), sum(mask.numel(n) for n in names)
            assert cell == (counts if names else None), name


def test_modules_have_the_shortest_names_that_differ():
    assert tables.short_modules(list(MODULES)) == [module.split(".")[1] for module in MODULES]
    names = ["attn.c_proj", "mlp.c_proj", "c_fc", "c_proj"]
    assert tables.short_modules(names) == names and tables.short_modules([]) == []


def test_the_table_has_every_count_and_total(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")  # the table has its full width all the same
    mask = decoder(3, "[red]head[/]\x1b.weight")
    tables.print_mask_table(mask)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    names = [module.split(".")[1] for module in MODULES]
    assert ["layer", *names, "[red]head[/]\ufffd", "total", "density"] in lines
    for layer in map(str, range(3)):
        counts = [len(mask.index[f"model.layers.{layer}.{module}.weight"]) for module in MODULES]
        density = sum(counts) / sum(rows * columns for rows, columns in MODULES.values())
        assert [layer, *map(str, counts), "-", str(sum(counts)), f"{density:.3%}"] in lines
    q_proj = sum(len(index) for name, index in mask.index.items() if "q_proj" in name)
    assert lines[-1][:2] == ["total", str(q_proj)]
    assert lines[-1][-2:] == [f"{mask.num_trainable:,}", f"{mask.density:.3%}"]


def test_numbers_as_text():
    for function, texts in {
        # Only equal masks show as 1, only disjoint ones as 0.
        tables.jaccard_text: {1.0: "1", 0.0: "0", 0.99999: "0.9999", 1e-9: "0.0001", 0.12344: "0.1234"},
        tables.in_bytes: {0: "0 bytes", 1024: "1.00 KiB", 3 * 2**20: "3.00 MiB", 2**45: "32768.00 GiB"},
        terminal.duration: {59.6: "1 min 0 s", 331: "5 min 31 s", 11_220: "3 h 7 min", 1e999: "unknown"},
    }.items():
        assert {value: function(value) for value in texts} == texts
