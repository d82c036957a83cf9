"""The files: what is written is read, in the bytes of the documentation, and in no more than promised."""

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speft_ds.adapter.format import Adapter, write_adapter
from speft_ds.adapter.gaps import decode_gaps, encode_gaps
from speft_ds.model.fingerprint import fingerprint
from unit.adapter.samples import FACTS, assert_same, load, matrices, read, refused, write

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "adapter_format.md"
Q, UP = "layers.0.q.weight", "layers.0.up.weight"
SHAPES = {UP: [4096, 1024], Q: [8, 8], "layers.0.o.weight": [8, 8]}


def write_one(folder, index, delta):
    """An adapter with a few entries of one weight."""
    write_adapter(folder, [(Q, torch.tensor(index), torch.tensor(delta))], FACTS | {"shapes": SHAPES})


def decode(folder):
    """Weight -> (indices, deltas), and whole: a reader written after docs/adapter_format.md alone."""
    facts = json.loads((folder / "adapter.json").read_bytes())
    assert facts["format_version"] == 2
    content = (folder / "adapter.safetensors").read_bytes()
    (size,) = struct.unpack_from("<Q", content)
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]

    def tensor(key):
        start, end = header[key]["data_offsets"]
        raw, dtype = data[start:end], header[key]["dtype"]
        if dtype == "BF16":
            values = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
        else:
            values = np.frombuffer(raw, {"F32": "<f4", "F16": "<f2", "U8": "u1"}[dtype])
        return values.reshape(header[key]["shape"])

    entries, whole = {}, {key[:-6]: tensor(key) for key in header if key.endswith(".value")}
    for key in header:
        if key.endswith(".gaps"):
            indices, index, gap, shift = [], -1, 0, 0
            for byte in tensor(key).tolist():
                gap |= (byte & 127) << shift
                shift += 7
                if byte < 128:
                    index, gap, shift = index + gap, 0, 0
                    indices.append(index)
            entries[key[:-5]] = indices, tensor(f"{key[:-5]}.delta")
    return entries, whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reader_written_after_the_documentation_reads_it(tmp_path, dtype):
    dense, head = matrices(0, 0.02, SHAPES), torch.randn(3, 5).bfloat16()
    found, whole = decode(write(tmp_path / "a", dense, {"score.weight": head}, dtype))
    written = {name: values.view(-1) for name, values in dense.items() if values.any()}
    assert found.keys() == written.keys() and len(written) > 1
    for name, values in written.items():
        assert found[name][0] == values.nonzero()[:, 0].tolist()
        assert np.array_equal(found[name][1], values[values != 0].to(dtype).float().numpy())
    assert np.array_equal(whole["score.weight"], head.float().numpy())


def test_the_bytes_of_the_documentation():
    index = [0, 5, 127, 300, 16_684, 2_113_836]
    coded = " ".join(f"{byte:02x}" for byte in encode_gaps(torch.tensor(index)).tolist())
    text = DOCUMENT.read_text(encoding="utf-8")
    assert f"`{', '.join(map(str, index))}`" in text and f"`{coded}`" in text


def mix(x):
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ x >> np.uint64(shift)) * np.uint64(factor)
    return x ^ x >> np.uint64(31)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fingerprint_of_the_documentation(tiny, dtype):
    model, lines = load(tiny["tied"], dtype), ""
    width = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    for name, parameter in model.named_parameters():
        bits = parameter.detach().view(-1).view(width).numpy().astype(np.int64).view(np.uint64)
        position = np.arange(len(bits), dtype=np.uint64)
        mixed = mix(bits * np.uint64(0x9E3779B97F4A7C15) + position * np.uint64(0x2545F4914F6CDD1D))
        lines += f"{name} {tuple(parameter.shape)} {dtype} {int(mixed.sum()):016x}\n"
    assert fingerprint(model) == hashlib.sha256(lines.encode()).hexdigest()


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 7), (torch.bfloat16, 5)])
@pytest.mark.parametrize("density", [0.0001, 0.005, 0.3])
def test_bytes_per_entry(tmp_path, dtype, most, density):
    """At mean gaps below 16,384; the names in the header weigh nothing in an adapter of real size."""
    adapter = Adapter.open(write(tmp_path / "a", matrices(0, density, {UP: [4096, 2048]}), None, dtype))
    assert (most - 3) * adapter.num_entries < adapter.num_bytes <= most * adapter.num_entries


def test_what_is_written_is_read_a_weight_at_a_time(tmp_path):
    dense = matrices(0, 0.1, SHAPES)
    dense["layers.0.o.weight"].zero_()  # a weight without entries is left out
    facts = {"num_entries": -5, "tensors_sha256": "old", "mask": {"density": 0.1}, "notes": "ä"}
    # In the order of the shapes, whatever the order of writing.
    adapter = Adapter.open(write(tmp_path / "a", dict(reversed(dense.items())), shapes=SHAPES, **facts))
    assert adapter.names == [UP, Q] and adapter.whole == [] and adapter.shape[UP] == (4096, 1024)
    assert adapter.num_entries == sum(int(values.count_nonzero()) for values in dense.values())
    assert adapter.facts["notes"] == "ä" and adapter.facts["mask"] == {"density": 0.1}
    assert_same(read(tmp_path / "a"), dense)
    for name in SHAPES:
        index, delta = adapter.entries(name)
        assert (index.dtype, delta.dtype) == (torch.int64, torch.float32)
        assert adapter.count(name) == len(index) == len(delta)


def test_what_could_not_be_read_is_not_written(tmp_path):
    odd = [([-1, 5, 6], 1.0), ([0, 5, 64], 1.0), ([5, 0, 7], 1.0), ([5, 5, 7], 1.0), ([0, 5], 1.0)]
    odd += [([0, 5, 63], float("nan")), ([0, 5, 63], float("inf"))]
    for index, delta in odd:
        refused(lambda i=index, d=delta: write_one(tmp_path / "a", i, [1.0, d, 1.0]), tmp_path)
        assert list(tmp_path.iterdir()) == []


def test_only_an_adapter_is_replaced(tmp_path):
    write_one(tmp_path / "a", [3], [1.0])
    (tmp_path / "a" / "README.md").touch()
    write_one(tmp_path / "a", [4], [1.0])
    assert Adapter.open(tmp_path / "a").entries(Q)[0].tolist() == [4]
    (tmp_path / "a" / "thesis.tex").touch()
    refused(lambda: write_one(tmp_path / "a", [3], [1.0]), tmp_path / "a")
    assert (tmp_path / "a" / "thesis.tex").exists() and [p.name for p in tmp_path.iterdir()] == ["a"]


@settings(deadline=None, max_examples=60)
@given(st.sets(st.integers(0, 2**62) | st.integers(0, 300), max_size=40))
def test_gaps_of_any_indices(positions):
    index = torch.tensor(sorted(positions), dtype=torch.int64)
    assert torch.equal(decode_gaps(encode_gaps(index), len(index), 2**62 + 1), index)


def test_bytes_that_are_no_gaps():
    without_end, too_long = ["80", "0181"], ["8100"]  # 1, in two bytes
    too_large = ["ff" * 8 + "7f", "ff" * 9 + "01", "80" * 30 + "01"]  # 2^63 - 1, 2^64 - 1
    bad = {0: ["01"], 1: ["", "00", "65", *without_end, *too_long, *too_large]}  # 0x65: index 100 of 100
    bad |= {2: ["0181", "0500", "3c3c"], 4: ["64" + ("ff" * 8 + "7f") * 3]}  # the last one overflows twice
    for count, codes in bad.items():
        for code in codes:
            with pytest.raises(ValueError):
                decode_gaps(torch.tensor(list(bytes.fromhex(code)), dtype=torch.uint8), count, 100)


def test_new_tokens_have_a_tokenizer_and_as_many_rows(tmp_path):
    """Its folder is replaced with the adapter; a vocabulary of another size is refused."""
    facts = FACTS | {"shapes": SHAPES, "new_tokens": ["<a>"], "vocabulary": [8, 9]}
    entries = [(Q, torch.tensor([3]), torch.tensor([1.0]))]
    for text in ("first", "second"):
        write_adapter(tmp_path / "adapter", entries, facts, save_tokenizer=save(text))
    adapter = Adapter.open(tmp_path / "adapter")
    assert adapter.vocabulary == (8, 9) and (adapter.tokenizer / "tokenizer.json").read_text() == "second"
    (tmp_path / "adapter" / "tokenizer" / "tokenizer.json").unlink()
    (tmp_path / "adapter" / "tokenizer").rmdir()
    refused(lambda: Adapter.open(tmp_path / "adapter").tokenizer, tmp_path / "adapter")
    for vocabulary in ([9, 8], [8, 2**40], [8]):
        odd = facts | {"vocabulary": vocabulary}
        refused(lambda odd=odd: write_adapter(tmp_path / "odd", entries, odd), tmp_path / "odd")


def save(text):
    """What writes a tokenizer's folder."""

    def write(folder):
        folder.mkdir()
        (folder / "tokenizer.json").write_text(text)

    return write
