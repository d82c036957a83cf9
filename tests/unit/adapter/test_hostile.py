"""Adapters that are damaged, by chance or on purpose: refused, or read to the very same entries."""

import contextlib
import hashlib
import json
import os
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from speft_ds.adapter.apply import check_weights
from speft_ds.adapter.format import Adapter, write_adapter
from speft_ds.errors import UserError

A, B, HEAD = "layers.0.q.weight", "layers.1.q.weight", "score.weight"
SHAPES = {A: [64, 32], B: [16, 16]}
FACTS = {"base": "b", "dtype": "float32", "fingerprint": "f" * 64, "shapes": SHAPES, "classes": ["x", "y"]}
WRONG = [None, True, -1, 1.5, 10**30, float("nan"), "", "x\ny", "\ud800", [], [[]], {}, {"a": []}, [1, "x"]]


@pytest.fixture
def folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    entries = [
        (name, torch.randperm(rows * columns, generator=generator)[:40].sort().values, torch.randn(40))
        for name, (rows, columns) in SHAPES.items()
    ]
    write_adapter(tmp_path / "good", entries, FACTS, {HEAD: torch.randn(2, 32)})
    return tmp_path / "good"


def read(folder):
    """Everything that a reader takes from an adapter, for a model that has its weights."""
    adapter = Adapter.open(folder)
    check_weights(adapter, {A: (64, 32), B: (16, 16), HEAD: (2, 32)})
    entries = {name: [t.tolist() for t in adapter.entries(name)] for name in adapter.names}
    return entries, {name: adapter.head(name).tolist() for name in adapter.heads}


@pytest.fixture
def try_all(folder):
    """try_all(damages) -> how many of them were refused; the others must have read as before."""
    expected = read(folder)

    def count(damages):
        num_refused = 0
        for damage in damages:
            copy = Path(shutil.copytree(folder, folder.with_name("copy")))
            damage(copy)
            try:
                assert read(copy) == expected
            except UserError as error:
                assert str(error).encode(), "a message that can be printed"
                num_refused += 1
            shutil.rmtree(copy)
        return num_refused

    return count


def write_tensors(folder, content):
    """Bytes of the tensors' file, and facts with their hash."""
    (folder / "adapter.safetensors").write_bytes(content)
    edit_facts(folder, tensors_sha256=hashlib.sha256(content).hexdigest())


def edit_facts(folder, **changes):
    facts = json.loads((folder / "adapter.json").read_text())
    (folder / "adapter.json").write_text(json.dumps({**facts, **changes}))


def edit_tensors(changes):
    """A damage: other tensors in a whole file, with the right hash; None leaves one out."""

    def damage(folder):
        tensors = {**load_file(folder / "adapter.safetensors"), **changes}
        write_tensors(folder, save({key: tensor for key, tensor in tensors.items() if tensor is not None}))

    return damage


def edit_bytes(file, change, rehash=False):
    def damage(folder):
        content = bytearray((folder / file).read_bytes())
        content = change(content) or content
        if rehash:
            write_tensors(folder, bytes(content))
        else:
            (folder / file).write_bytes(content)

    return damage


def flip(chance, stop=None):
    def change(content):
        content[chance.randrange(stop or len(content))] ^= 1 << chance.randrange(8)

    return change


def test_bits_that_flipped_and_files_that_were_cut(try_all):
    chance = random.Random(0)
    damages = [edit_bytes("adapter.safetensors", flip(chance)) for _ in range(60)]
    for _ in range(20):
        damages.append(edit_bytes("adapter.safetensors", lambda c: c[: chance.randrange(len(c))]))
        damages.append(edit_bytes("adapter.json", lambda c: c[: chance.randrange(len(c) - 2)]))
    damages.append(edit_bytes("adapter.safetensors", lambda content: content + b"\0"))
    assert try_all(damages) == len(damages)


def test_bits_that_flipped_in_the_facts(try_all):
    chance = random.Random(1)
    damages = [edit_bytes("adapter.json", flip(chance)) for _ in range(60)]
    assert try_all(damages) > 10  # most are of no consequence for the entries


def test_headers_that_were_changed_under_a_right_hash(try_all, folder):
    chance = random.Random(2)
    (size,) = struct.unpack("<Q", (folder / "adapter.safetensors").read_bytes()[:8])
    damages = [edit_bytes("adapter.safetensors", flip(chance, 8), True) for _ in range(20)]
    damages += [edit_bytes("adapter.safetensors", flip(chance, 8 + size), True) for _ in range(80)]
    assert try_all(damages) > 60


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**26, 2**32, 2**40, 2**63, 2**64 - 1])
def test_a_header_that_claims_to_be_long(try_all, size):
    change = edit_bytes("adapter.safetensors", lambda c: struct.pack("<Q", size) + c[8:], True)
    assert try_all([change]) == 1


def peak_of_this_process():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_no_more_memory_than_the_file(folder):
    claims = [
        edit_bytes("adapter.safetensors", lambda c: struct.pack("<Q", 2**30) + c[8:], True),
        lambda copy: edit_facts(copy, shapes={A: [2**31, 2**31], B: [2**31, 2**31]}),
        lambda copy: edit_facts(copy, num_entries=2**60),
        edit_tensors({f"{A}.gaps": torch.full((40 * 9,), 0xFF, dtype=torch.uint8)}),
    ]
    for damage in claims:
        copy = Path(shutil.copytree(folder, folder.with_name("copy")))
        damage(copy)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = peak_of_this_process()
        with contextlib.suppress(UserError):
            read(copy)
        assert peak_of_this_process() - before < 16 * 2**20
        shutil.rmtree(copy)


def gaps(*values):
    return torch.tensor(values, dtype=torch.uint8)


def test_tensors_that_are_not_the_formats(try_all):
    ones, delta = gaps(*[1] * 40), torch.ones(40)
    other_delta = [delta.double(), delta.half(), delta.int(), delta.view(4, 10), delta[:39], delta.sum()]
    other_delta += [delta[:0], torch.ones(41), delta.to(torch.float8_e4m3fn), delta.to(torch.complex64)]
    for bad in (float("nan"), float("inf"), -float("inf")):
        other_delta.append(torch.cat([delta[:39], torch.tensor([bad])]))
        other_delta.append(torch.cat([torch.tensor([bad]), delta[:39]]).bfloat16())
    other_gaps = [ones.short(), ones.view(4, 10), ones[:39], gaps(), ones.bool(), ones.float(), ones.char()]
    other_gaps.append(torch.cat([ones[:39], gaps(0)]))
    other_gaps.append(torch.cat([ones[:39], gaps(0x81, 0)]))  # longer than it need be
    other_gaps.append(torch.cat([ones[:39], gaps(0x81)]))  # without an end
    other_gaps.append(torch.cat([ones[:39], gaps(*[0xFF] * 8, 0x7F)]))  # a gap of 2^63 - 1
    other_gaps.append(torch.cat([gaps(*[0xFF] * 8, 0x7F), ones[:39]]))
    other_gaps.append(torch.cat([ones[:39], gaps(*[0xFF] * 20, 1)]))
    other_gaps.append(torch.cat([ones[:39], gaps(0xDA, 0x0F)]))  # the last index is 2,048 of 2,048
    head = torch.ones(2, 32)
    other_head = [head.view(-1), head.double(), head.int(), head[:0], head.view(2, 4, 8), head * float("nan")]
    other_head.append(torch.ones(3, 32))  # not as many as classes
    damages = [edit_tensors({f"{A}.delta": tensor}) for tensor in other_delta]
    damages += [edit_tensors({f"{A}.gaps": tensor}) for tensor in other_gaps]
    damages += [edit_tensors({f"{HEAD}.value": tensor}) for tensor in other_head]
    for key in ("", "x", ".delta", "x.delta", f"{A}.index", "\x1b[2J.delta", "x" * 10_000):
        damages.append(edit_tensors({key: delta}))
    damages.append(edit_tensors({"x.delta": delta, "x.gaps": ones}))  # of no weight that has a shape
    damages += [edit_tensors({f"{A}.{part}": None}) for part in ("gaps", "delta")]
    damages.append(edit_tensors({f"{A}.gaps": None, f"{A}.delta": None}))  # the count does not fit
    assert try_all(damages) == len(damages)


def test_facts_that_are_of_another_kind(try_all, folder):
    facts = json.loads((folder / "adapter.json").read_text())
    needed = {"format_version", "tensors_sha256", "base", "dtype", "fingerprint", "shapes", "num_entries"}
    assert needed < facts.keys()
    # Any text may name a base, or be the fingerprint of one.
    bad = [(key, value) for key in needed - {"base", "fingerprint"} for value in WRONG]
    bad += [(key, value) for key in ("base", "fingerprint") for value in WRONG if value != ""]
    damages = [lambda copy, change=change: edit_facts(copy, **dict([change])) for change in bad]
    sizes = [None, [], [64], [64, 32, 1], [64.0, 32], [True, 32], [-64, -32], [0, 0], [2**40, 2**40], "64"]
    for shape in sizes:
        damages.append(lambda copy, shape=shape: edit_facts(copy, shapes={**SHAPES, A: shape}))
    damages.append(lambda copy: edit_facts(copy, shapes={**SHAPES, "a\nb": [1, 1]}))
    for key in ("mask", "recipe", "task", "classes", "fingerprint_bfloat16"):
        damages.append(lambda copy, key=key: edit_facts(copy, **{key: 7}))
    damages.append(lambda copy: edit_facts(copy, classes=["x", 3]))
    damages.append(lambda copy: edit_facts(copy, classes=["x", "y", "z"]))
    for key in needed:
        left = {other: value for other, value in facts.items() if other != key}
        damages.append(lambda copy, left=left: (copy / "adapter.json").write_text(json.dumps(left)))
    texts = [b"", b"[]", b"1", b"null", b"{", b"[" * 100_000, b"\xff\xfe{}", b'{"a": 1' + b"0" * 5000 + b"}"]
    for text in texts:
        damages.append(lambda copy, text=text: (copy / "adapter.json").write_bytes(text))
    assert try_all(damages) == len(damages)


def test_what_is_no_file(try_all, folder):
    damages = []
    for name in ("adapter.safetensors", "adapter.json"):

        def replace(make, name=name):
            def damage(copy):
                (copy / name).unlink()
                make(copy / name)

            damages.append(damage)

        replace(lambda path: None)
        replace(lambda path: path.mkdir())
        replace(lambda path: path.symlink_to("nowhere"))
        replace(lambda path: path.symlink_to(path.name))
        replace(lambda path: path.symlink_to("/dev/zero"))
        replace(os.mkfifo)  # which nobody writes to
        replace(lambda path: path.touch())
    assert try_all(damages) == len(damages)
    for name in ("adapter.safetensors", "adapter.json"):  # as the hub's cache has them
        assert try_all([lambda copy, name=name: link(copy / name, folder / name)]) == 0


def link(path, target):
    path.unlink()
    path.symlink_to(target)
