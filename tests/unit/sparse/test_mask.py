"""Masks: counts, hash, the file, and how far two overlap. References are Python sets and dicts."""

import json
import random
import resource

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from speft_ds.errors import UserError
from speft_ds.io import write_json, write_safetensors
from speft_ds.sparse.mask import Mask, jaccard, overlap, read_mask, save_mask

Q, K, UP = "model.layers.0.q.weight", "model.layers.0.k.weight", "model.layers.1.up.weight"
SHAPE = {UP: (7, 9), Q: (5, 3), K: (2, 4)}  # not in the order of their names
FACTS = {"base": "owner/nämé", "fingerprint": "12ab", "samples": 32, "none": None}
LARGE = (70_000, 70_000)  # 4.9e9 elements: more than int32 can count


def make(entries, shape=SHAPE, dtype=torch.int32):
    """A mask of weight -> positions, in any order."""
    index = {name: torch.tensor(sorted(entries.get(name, ())), dtype=dtype) for name in shape}
    return Mask(index=index, shape=dict(shape))


def pairs(mask):
    return {(name, position) for name, index in mask.index.items() for position in index.tolist()}


MASK = make({UP: {0, 5, 62}, Q: {14}})


def test_a_mask_is_read_as_it_was_saved(tmp_path):
    path = tmp_path / "folder" / "mask.safetensors"
    save_mask(path, MASK, FACTS)
    mask, facts = read_mask(path)
    assert facts == FACTS and mask.shape == SHAPE and mask.sha256 == MASK.sha256
    assert list(mask.index) == list(mask.shape) == list(SHAPE)
    for name, index in mask.index.items():
        assert torch.equal(index, MASK.index[name]) and index.dtype == torch.int32, name
    assert mask.facts() == MASK.facts()
    assert sorted(path.parent.iterdir()) == [path]


def test_columns_with_entries_are_counted_and_what_they_cost():
    shape, width = {UP: (4, 6), Q: (2, 3)}, 9
    mask = Mask({UP: torch.tensor([1, 7, 9]).int(), Q: torch.tensor([5]).int()}, shape)
    facts = mask.facts()  # columns 1, 1, 3 of the one, 2 of the other
    assert (facts["num_used_columns"], facts["num_columns"]) == (3, width)
    assert facts["compute"] == (2 * 4 + 1 * 2) / (4 * 6 + 2 * 3)
    assert "3 of 9 (33.3%), 33.3% of" in mask.cost_in_words()


def test_the_file_is_what_the_format_says(tmp_path):
    path = tmp_path / "mask.safetensors"
    save_mask(path, MASK, FACTS)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == {f"{UP}.index", f"{Q}.index"}  # none for a weight without entries
    assert set(metadata) == {"format_version", "shape", "sha256", "facts"}
    assert metadata["format_version"] == "1" and metadata["sha256"] == MASK.sha256
    assert json.loads(metadata["shape"]) == {name: list(shape) for name, shape in SHAPE.items()}
    assert json.loads(metadata["facts"]) == FACTS
    (tmp_path / "any").touch()
    assert path.stat().st_mode == (tmp_path / "any").stat().st_mode  # readable for whom the umask says


def test_indices_beyond_int32(tmp_path):
    entries = {"large": {0, 2**31 - 1, 2**31, 2**32 + 1, 70_000**2 - 1}, "small": {3}}
    mask = make(entries, {"large": LARGE, "small": (2, 2), "empty": (2, 3)}, torch.int64)
    save_mask(tmp_path / "mask.safetensors", mask, {})
    read, _ = read_mask(tmp_path / "mask.safetensors")
    assert {name: set(index.tolist()) for name, index in read.index.items()} == {**entries, "empty": set()}
    assert {index.dtype for index in read.index.values()} == {torch.int64}
    assert read.sha256 == mask.sha256 and read.num_target_elements == 70_000**2 + 10
    other = make({"large": {2**32 + 1, 2**32 + 2, 1}, "small": {3}}, mask.shape, torch.int64)
    assert overlap(read, other) == 2 and jaccard(read, other) == 2 / 8


@pytest.mark.parametrize("entries", [{Q: {1, 2}}, {}])
def test_int64_indices_of_a_small_weight_become_int32(tmp_path, entries):
    save_mask(tmp_path / "mask.safetensors", make(entries, dtype=torch.int64), {})
    mask, _ = read_mask(tmp_path / "mask.safetensors")
    assert {index.dtype for index in mask.index.values()} == {torch.int32} and list(mask.index) == list(SHAPE)
    assert pairs(mask) == {(name, place) for name, places in entries.items() for place in places}
    assert overlap(mask, make({Q: {2, 3}}, dtype=torch.int64)) == len(pairs(mask)) / 2


def metadata_of(mask, **changes):
    """What `save_mask` would record, with changes; None leaves a key out."""
    shape = json.dumps(mask.shape)
    metadata = {"format_version": "1", "shape": shape, "sha256": mask.sha256, "facts": "{}", **changes}
    return {key: value for key, value in metadata.items() if value is not None}


def refuse(path, *messages):
    with pytest.raises(UserError) as caught:
        read_mask(path)
    text = str(caught.value)
    assert str(path) in text and "fix: " in text
    assert all(message in text for message in messages), text


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([-1, 2], dtype=torch.int32), "from -1 to 2"),
        (torch.tensor([0, 15], dtype=torch.int32), "the weight has 15 elements"),
        (torch.tensor([2**40]), "the weight has 15 elements"),
        (torch.tensor([2, 1, 3], dtype=torch.int32), "not strictly increasing"),
        (torch.tensor([1, 1, 3], dtype=torch.int32), "not strictly increasing"),
        (torch.tensor([[1, 2]], dtype=torch.int32), "the index is I32 of shape [1, 2]"),
        (torch.tensor(1, dtype=torch.int32), "the index is I32 of shape []"),
        (torch.tensor([1.0, 2.0]), "the index is F32"),
        (torch.tensor([1, 2], dtype=torch.uint64), "the index is U64"),
        (torch.tensor([1.0], dtype=torch.float8_e4m3fn), "the index is F8_E4M3"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path, index, message):
    path = tmp_path / "mask.safetensors"
    save_file({f"{Q}.index": index}, path, metadata_of(MASK))
    refuse(path, Q, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": None}, "no format_version"),
        ({"format_version": "2"}, "mask format 2, this version reads 1"),
        ({"shape": None}, "no shape"),
        ({"shape": "{"}, "no shape"),
        ({"shape": "[" * 100_000}, "no shape"),
        ({"shape": "{}"}, "names no weight"),
        ({"facts": None}, "no facts"),
        ({"facts": "1"}, "no facts"),
        ({"sha256": None}, "hash"),
        ({"sha256": "0" * 64}, "hash"),
        ({"shape": json.dumps({UP: [7, 9], K: [2, 4]})}, f"{Q}.index"),
        ({"shape": json.dumps({**SHAPE, "b": 3})}, "'b' has no shape"),
        ({"shape": json.dumps({**SHAPE, "b": [3]})}, "'b' has no shape"),
        ({"shape": json.dumps({**SHAPE, "b": [3, 0]})}, "'b' has no shape"),
        ({"shape": json.dumps({**SHAPE, "b": [2.5, True]})}, "'b' has no shape"),
        ({"shape": json.dumps({**SHAPE, "b": [2**40, 2**40]})}, "'b' has no shape"),
        ({"shape": json.dumps({**SHAPE, "b": ["3", None]})}, "'b' has no shape"),
        ({"shape": f'{{"b": [{"9" * 5000}, 1]}}'}, "no shape"),
        ({"shape": json.dumps({**SHAPE, "b\n": [2, 2]})}, "'b\\n' has no shape"),
        ({"shape": '{"\\ud800": [2, 2]}'}, "has no shape"),
        ({"shape": json.dumps({**SHAPE, K: [4, 2]})}, "hash"),
    ],
)
def test_damaged_metadata_is_refused(tmp_path, changes, message):
    path = tmp_path / "mask.safetensors"
    tensors = {f"{name}.index": index for name, index in MASK.index.items() if index.numel()}
    save_file(tensors, path, metadata_of(MASK, **changes))
    refuse(path, message)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 100, b"\x02" + b"\0" * 7 + b"[]", bytes(4096)])
def test_other_tensors_and_files_are_refused(tmp_path, content):
    path = tmp_path / "mask.safetensors"
    path.write_bytes(content)
    refuse(path, "not a readable mask")
    save_file({f"{Q}.index": torch.tensor([14]), f"{Q}.delta": torch.tensor([0.5])}, path, metadata_of(MASK))
    refuse(path, f"{Q}.delta")
    save_file({f"{UP}.index": MASK.index[UP]}, path, metadata_of(MASK))  # those of Q are missing
    refuse(path, "hash")
    save_file({"weight": torch.zeros(3)}, path)
    refuse(path, "not a mask")
    refuse(tmp_path / "none.safetensors", "not a readable mask")
    refuse(tmp_path, "not a readable mask")


def test_truncated_and_flipped_files_are_refused(tmp_path):
    path = tmp_path / "mask.safetensors"
    save_mask(path, MASK, FACTS)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refuse(path)
    chance = random.Random(0)
    for _ in range(400):
        content = bytearray(whole)
        position = chance.randrange(len(content))
        content[position] = (content[position] + chance.randrange(1, 256)) % 256
        path.write_bytes(content)
        try:
            mask, _ = read_mask(path)
        except UserError:
            continue
        assert mask.sha256 == MASK.sha256  # the byte was of the facts, of a name of nothing, or of padding


positions = st.dictionaries(
    st.sampled_from(["a", "b", "c"]), st.sets(st.sampled_from([*range(12), 2**31, 2**32, 2**32 + 1]))
)


@given(positions, positions)
def test_overlap_and_jaccard_against_sets(left, right):
    a = make(left, dict.fromkeys(left, LARGE), torch.int64)
    b = make(right, dict.fromkeys(right, LARGE), torch.int64)
    both, either = pairs(a) & pairs(b), pairs(a) | pairs(b)
    assert overlap(a, b) == overlap(b, a) == len(both)
    assert jaccard(a, b) == jaccard(b, a) == (len(both) / len(either) if either else 1.0)


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "mask.safetensors"
    save_mask(path, MASK, FACTS)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = Mask({"w": torch.arange(2**19, dtype=torch.int32)}, {"w": (2**10, 2**10)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limit[1]))  # a write beyond it fails
    try:
        with pytest.raises(OSError):
            save_mask(path, large, {})
        with pytest.raises(OSError):
            write_json(tmp_path / "new.json", {"text": "x" * 2**21})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [file.name for file in tmp_path.iterdir()] == ["mask.safetensors"]
    assert read_mask(path)[0].sha256 == MASK.sha256


def test_what_reads_back_differently_is_not_kept(tmp_path, monkeypatch):
    def flip(tensors, path, metadata):
        save_file({name: -tensor for name, tensor in tensors.items()}, path, metadata)

    monkeypatch.setattr("safetensors.torch.save_file", flip)
    with pytest.raises(OSError, match="read back differs"):
        write_safetensors(tmp_path / "a.safetensors", {"zero": torch.zeros(2)})  # -0.0 equals 0.0
    assert not list(tmp_path.iterdir())


def test_tensors_of_any_kind_are_written(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {
        "nan": torch.tensor([float("nan"), -0.0]),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "half": torch.tensor([[1.5]], dtype=torch.bfloat16),
        "bool": torch.tensor([True, False]),
    }
    write_safetensors(path, tensors)
    with safe_open(path, framework="pt") as file:
        assert {name: str(file.get_tensor(name)) for name in file.keys()} == {  # noqa: SIM118
            name: str(tensor) for name, tensor in tensors.items()
        }


def test_json_is_written_whole(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"ü": 1, "set": {2}, "path": tmp_path})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ü": 1, "set": [2], "path": str(tmp_path)}
    endless = {}
    endless["self"] = endless
    with pytest.raises(ValueError):
        write_json(path, endless)
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]
    assert "ü" in path.read_text(encoding="utf-8")
