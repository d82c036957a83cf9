"""Density by layer and module against a plain count, and numbers as text."""

import pytest
import torch

from speft_ds.mask import Mask
from speft_ds.report.tables import (
    density_table,
    duration,
    in_bytes,
    jaccard_text,
    place,
    print_mask_table,
    short_modules,
)
from unit.report.masks import MODULES, decoder


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


def test_modules_have_the_shortest_names_that_differ():
    assert short_modules(list(MODULES)) == [module.split(".")[1] for module in MODULES]
    names = ["attn.c_proj", "mlp.c_proj", "c_fc", "c_proj"]
    assert short_modules(names) == names and short_modules([]) == []


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
    assert last[1] == str(sum(len(index) for name, index in mask.index.items() if "q_proj" in name))


def test_numbers_as_text():
    values = {1.0: "1", 0.0: "0", 0.99999: "0.9999", 1e-9: "0.0001", 0.5: "0.5000", 0.12344: "0.1234"}
    assert {value: jaccard_text(value) for value in values} == values  # only equal masks show as 1
    sizes = {0: "0 bytes", 1023: "1023 bytes", 1024: "1.00 KiB", 3 * 2**20: "3.00 MiB", 2**45: "32768.00 GiB"}
    assert {size: in_bytes(size) for size in sizes} == sizes
    times = {0.4: "0 s", 59.6: "1 min 0 s", 331: "5 min 31 s", 11_220: "3 h 7 min", float("inf"): "unknown"}
    assert {seconds: duration(seconds) for seconds in times} == times
