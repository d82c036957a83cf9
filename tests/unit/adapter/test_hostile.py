"""Adapters that are damaged, by chance or on purpose: refused, or read to the very same entries."""

import contextlib
import hashlib
import json
import math
import os
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save

from speft_ds.adapter.apply import check_weights
from speft_ds.adapter.format import Adapter
from speft_ds.errors import UserError
from unit.adapter.samples import write
from unit.hostile import NUM_HOSTILE, changed, hostile_tensors, in_place_of, json_text, no_hang, only_opens

A, B, HEAD = "layers.0.q.weight", "layers.1.q.weight", "score.weight"
SHAPES = {A: [64, 32], B: [16, 16]}
NEEDED = {"format_version", "tensors_sha256", "base", "dtype", "fingerprint", "shapes", "num_entries"}
WRONG = [None, True, -1, 1.5, 10**30, float("nan"), "", "x\ny", "\ud800", [], [[]], {}, {"a": []}, [1, "x"]]
NAMES = TENSORS, JSON = "adapter.safetensors", "adapter.json"


@pytest.fixture
def folder(tmp_path):
    """An adapter with 40 entries of each of two weights, and a head of two classes."""
    generator, dense = torch.Generator().manual_seed(0), {}
    for name, shape in SHAPES.items():
        dense[name] = torch.zeros(shape)
        index = torch.randperm(dense[name].numel(), generator=generator)[:40]
        dense[name].view(-1)[index] = torch.randn(40, generator=generator)
    return write(tmp_path / "good", dense, {HEAD: torch.randn(2, 32)}, classes=["x", "y"])


def read(folder):
    """Everything that a reader takes from an adapter, for a model that has its weights."""
    adapter = Adapter.open(folder)
    check_weights(adapter, {A: (64, 32), B: (16, 16), HEAD: (2, 32)})
    entries = {name: [t.tolist() for t in adapter.entries(name)] for name in adapter.names}
    return entries, {name: adapter.value(name).tolist() for name in adapter.whole}


@pytest.fixture
def num_refused(folder):
    """num_refused(damages) -> how many of them were refused; the others must have read as before."""
    expected = read(folder)

    def count(damages):
        refused = 0
        for damage in damages:
            copy = Path(shutil.copytree(folder, folder.with_name("copy")))
            damage(copy)
            try:
                assert read(copy) == expected
            except UserError as error:
                assert str(error).encode() and error.where and error.fix, "a message that can be printed"
                refused += 1
            shutil.rmtree(copy)
        return refused

    return count


# Damages: functions of a copy of the adapter's folder


def facts_with(**changes):
    def damage(copy):
        facts = json.loads((copy / JSON).read_text())
        (copy / JSON).write_text(json.dumps({**facts, **changes}))

    return damage


def rewritten(file, change, rehash=False):
    """The bytes of a file changed; `rehash`: under their right hash."""

    def damage(copy):
        content = change((copy / file).read_bytes())
        (copy / file).write_bytes(content)
        if rehash:
            facts_with(tensors_sha256=hashlib.sha256(content).hexdigest())(copy)

    return damage


def tensors_with(changes):
    """Other tensors under the right hash; None leaves one out."""

    def change(content):
        tensors = {**load_tensors(content), **changes}
        return save({key: tensor for key, tensor in tensors.items() if tensor is not None})

    return rewritten(TENSORS, change, rehash=True)


def flip(chance, stop=None):
    def change(content):
        position, bit = chance.randrange(stop or len(content)), 1 << chance.randrange(8)
        return content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :]

    return change


def claimed_header(size):
    return rewritten(TENSORS, lambda content: struct.pack("<Q", size) + content[8:], rehash=True)


def test_bits_that_flipped_and_files_that_were_cut(num_refused):
    chance = random.Random(0)
    damages = [rewritten(TENSORS, flip(chance)) for _ in range(60)]
    damages += [rewritten(TENSORS, lambda c: c[: chance.randrange(len(c))]) for _ in range(20)]
    damages += [rewritten(JSON, lambda c: c[: chance.randrange(len(c) - 2)]) for _ in range(20)]
    damages.append(rewritten(TENSORS, lambda content: content + b"\0"))
    assert num_refused(damages) == len(damages)
    assert num_refused([rewritten(JSON, flip(chance)) for _ in range(60)]) > 10  # most are harmless


def test_headers_that_were_changed_under_a_right_hash(num_refused, folder):
    chance = random.Random(2)
    (size,) = struct.unpack("<Q", (folder / TENSORS).read_bytes()[:8])
    damages = [rewritten(TENSORS, flip(chance, 8), True) for _ in range(20)]
    damages += [rewritten(TENSORS, flip(chance, 8 + size), True) for _ in range(80)]
    assert num_refused(damages) > 60
    damages = [claimed_header(size) for size in (0, 1, 2**20, 2**26, 2**32, 2**40, 2**63, 2**64 - 1)]
    assert num_refused(damages) == len(damages)


def test_a_thousand_hostile_adapters(folder):
    """Under the right hash: refused, or entries that fit the weights of a model; nothing else is opened."""
    chance, facts, good = random.Random(6), (folder / JSON).read_text(), (folder / TENSORS).read_bytes()
    facts, num_read = json.loads(facts), 0
    for number in range(NUM_HOSTILE):
        content = hostile_tensors(good, chance) if number % 4 else good
        own = changed(facts, chance) if number % 4 == 0 else facts
        if isinstance(own, dict) and chance.random() < 0.9:
            own = {**own, "tensors_sha256": hashlib.sha256(content).hexdigest()}
        (folder / TENSORS).write_bytes(content)
        (folder / JSON).write_text(json_text(own, chance), encoding="utf-8", errors="surrogatepass")
        try:
            with no_hang(), only_opens(folder):
                entries, _ = read(folder)
        except UserError as error:
            assert str(error).encode() and error.where and error.fix
            continue
        num_read += 1
        for name, (index, delta) in entries.items():
            assert len(index) == len(delta) == 40 and index == sorted(set(index)) and index[0] >= 0
            assert index[-1] < SHAPES[name][0] * SHAPES[name][1] and all(map(math.isfinite, delta))
    assert NUM_HOSTILE // 100 < num_read < NUM_HOSTILE // 2


def peak_of_this_process():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    "damage",
    [
        claimed_header(2**30),
        facts_with(shapes={A: [2**31, 2**31], B: [2**31, 2**31]}),
        facts_with(num_entries=2**60),
        tensors_with({f"{A}.gaps": torch.full((40 * 9,), 0xFF, dtype=torch.uint8)}),
    ],
)
def test_no_more_memory_than_the_file(folder, damage):
    damage(folder)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_of_this_process()
    with contextlib.suppress(UserError):
        read(folder)
    assert peak_of_this_process() - before < 16 * 2**20


def gaps(*values):
    return torch.tensor(values, dtype=torch.uint8)


def test_tensors_that_are_not_the_formats(num_refused):
    ones, delta, head = gaps(*[1] * 40), torch.ones(40), torch.ones(2, 32)
    other_delta = [delta.double(), delta.half(), delta.int(), delta.view(4, 10), delta[:39], delta.sum()]
    other_delta += [delta[:0], torch.ones(41), delta.to(torch.float8_e4m3fn), delta.to(torch.complex64)]
    for bad in (float("nan"), float("inf"), -float("inf")):
        other_delta.append(torch.cat([delta[:39], torch.tensor([bad])]))
        other_delta.append(torch.cat([torch.tensor([bad]), delta[:39]]).bfloat16())
    # More gaps that are none are in test_format.py.
    other_gaps = [ones.short(), ones.view(4, 10), ones[:39], gaps(), ones.bool(), ones.float(), ones.char()]
    other_gaps.append(torch.cat([ones[:39], gaps(0)]))
    other_gaps.append(torch.cat([ones[:39], gaps(0xDA, 0x0F)]))  # the last index is 2,048 of 2,048
    other_gaps.append(torch.cat([gaps(*[0xFF] * 8, 0x7F), ones[:39]]))  # a gap of 2^63 - 1
    other_head = [head.view(-1), head.double(), head.int(), head[:0], head.view(2, 4, 8), head * float("nan")]
    other_head.append(torch.ones(3, 32))  # not as many as classes
    damages = [tensors_with({f"{A}.delta": tensor}) for tensor in other_delta]
    damages += [tensors_with({f"{A}.gaps": tensor}) for tensor in other_gaps]
    damages += [tensors_with({f"{HEAD}.value": tensor}) for tensor in other_head]
    odd_keys = ("", "x", ".delta", "x.delta", f"{A}.index", "\x1b[2J.delta", "x" * 10_000)
    damages += [tensors_with({key: delta}) for key in odd_keys]
    damages.append(tensors_with({"\x1b[2J.value": head}))
    damages.append(tensors_with({"x.delta": delta, "x.gaps": ones}))  # of no weight that has a shape
    damages += [tensors_with({f"{A}.{part}": None}) for part in ("gaps", "delta")]
    damages.append(tensors_with({f"{A}.gaps": None, f"{A}.delta": None}))  # the count does not fit
    assert num_refused(damages) == len(damages)


def test_facts_that_are_of_another_kind(num_refused, folder):
    facts = json.loads((folder / JSON).read_text())
    assert facts.keys() > NEEDED
    # Any text may name a base, or be the fingerprint of one.
    texts = {"base", "fingerprint"}
    damages = [facts_with(**{k: v}) for k in NEEDED for v in WRONG if not (k in texts and v == "")]
    sizes = [None, [], [64], [64, 32, 1], [64.0, 32], [True, 32], [-64, -32], [0, 0], [2**40, 2**40], "64"]
    damages += [facts_with(shapes={**SHAPES, A: shape}) for shape in sizes]
    damages.append(facts_with(shapes={**SHAPES, "a\nb": [1, 1]}))
    damages += [facts_with(**{k: 7}) for k in ("mask", "recipe", "task", "classes", "fingerprint_bfloat16")]
    damages += [facts_with(classes=classes) for classes in (["x", 3], ["x", "y", "z"])]
    texts = [json.dumps({k: v for k, v in facts.items() if k != needed}).encode() for needed in NEEDED]
    texts += [b"", b"[]", b"1", b"null", b"{", b"[" * 100_000, b"\xff\xfe{}", b'{"a": 1' + b"0" * 5000 + b"}"]
    damages += [rewritten(JSON, lambda content, text=text: text) for text in texts]
    assert num_refused(damages) == len(damages)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_file(num_refused, folder, name):
    expected, content = read(folder), (folder / name).read_bytes()
    for _ in in_place_of(folder / name):
        with pytest.raises(UserError), no_hang():
            read(folder)
    assert num_refused([rewritten(name, lambda content: b"")]) == 1
    (folder / name).rename(folder / "blob")  # as in the hub's cache
    (folder / name).symlink_to("blob")
    assert read(folder) == expected and (folder / "blob").read_bytes() == content
