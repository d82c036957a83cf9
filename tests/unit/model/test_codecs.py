"""Codecs of weights, each value against exact arithmetic in Python, and bitsandbytes' own functions."""

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from speft_ds.config.values import BASE_FORMATS
from speft_ds.errors import UserError
from speft_ds.model.codecs import CODECS, base, codec

ROOT = Path(__file__).resolve().parents[3]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCK = {"int8": 64, "nf4": 64, "bfp8": 16, "bfp6": 16, "bfp4": 16, "mxfp6": 32, "mxfp4": 32}
BITS = {"int8": 8.5, "nf4": 4.5, "bfp8": 8.5, "bfp6": 6.5, "bfp4": 4.5, "mxfp6": 6.25, "mxfp4": 4.25}
# The numbers of E2M1 as the specification lists them, and of E2M3: subnormal ones, then 1.m times 1, 2 and 4.
E2M1 = [Fraction(number) for number in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]
E2M3 = [Fraction(m, 8) for m in range(8)] + [(8 + m) * Fraction(2**e, 8) for e in range(3) for m in range(8)]


def exponent_of(value: Fraction) -> int:
    """The largest e with 2**e <= value."""
    e = value.numerator.bit_length() - value.denominator.bit_length()
    return e if Fraction(2) ** e <= value else e - 1


def block_float(values: list[Fraction], bits: int) -> list[Fraction]:
    """The magnitudes of a block in block floating point."""
    largest = max(values)
    e = max(exponent_of(largest), -127) if largest else -127
    unit = Fraction(2) ** (e - (bits - 2))
    return [min(round(value / unit), 2 ** (bits - 1) - 1) * unit for value in values]  # round: half to even


def microscaling(values: list[Fraction], numbers: list[Fraction]) -> list[Fraction]:
    """The magnitudes of a block in an MX format, by section 6.3 of the specification."""
    largest = max(values)
    scale = Fraction(2) ** max(exponent_of(largest) - 2, -127) if largest else Fraction(1)

    def nearest(value: Fraction) -> Fraction:
        near = sorted(range(len(numbers)), key=lambda code: (abs(numbers[code] - value), code % 2))
        return numbers[near[0]]

    return [nearest(value / scale) * scale for value in values]


def nearest_level(values: list[Fraction], levels: torch.Tensor) -> list[set[Fraction]]:
    """Of each value the levels times the largest magnitude that are nearest, to a rounding error of fp32."""
    absmax = max(abs(value) for value in values)
    choices = [Fraction(level) * absmax for level in levels.tolist()]
    found = []
    for value in values:
        least = min(abs(choice - value) for choice in choices)
        close = least + absmax * Fraction(1, 2**23)
        found.append({choice for choice in choices if abs(choice - value) <= close})
    return found


def hostile(columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of ordinary weights, of all exponents, and of what is known to break codecs."""
    torch.manual_seed(columns)
    largest = torch.finfo(dtype).max
    rows = torch.randn(12, columns, dtype=torch.float64) * 0.02
    rows[1] = 0.0
    rows[2] = -0.0
    exponents = torch.randint(-149, 127, (columns,))
    rows[3] = torch.exp2(exponents.double()) * torch.randn(columns).sign()
    rows[4] = torch.randint(-40, 41, (columns,)) / 16.0  # ties
    rows[5] *= 2.0**-125  # not normal
    rows[6] = 2.0**-149 * torch.randint(-3, 4, (columns,))  # the smallest numbers of fp32
    rows[7, columns // 2] = largest
    rows[8, -1] = -largest
    rows[9] = torch.randint(-255, 256, (columns,)) / 128.0  # all that 8 bits hold, and ties
    rows[10] *= -1e30
    rows[11] = torch.linspace(-7.99, 7.99, columns)
    return rows.clamp(-largest, largest).to(dtype)


def round_trip(name: str, weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    packed, scales = CODECS[name].encode(weight)
    return CODECS[name].decode(packed, scales, weight.shape, dtype)


@pytest.mark.parametrize("columns", [1, 15, 16, 33, 70])
@pytest.mark.parametrize("name", [name for name in CODECS if BITS[name] % 0.5 == 0.25 or "bfp" in name])
def test_shared_exponents_are_exact(name, columns):
    weight = hostile(columns)
    decoded = round_trip(name, weight)
    for row, got in zip(weight, decoded, strict=True):
        for start in range(0, columns, BLOCK[name]):
            values = row[start : start + BLOCK[name]].tolist()
            magnitudes = [abs(Fraction(value)) for value in values]
            if "bfp" in name:
                wanted = block_float(magnitudes, int(name[-1]))
            else:
                wanted = microscaling(magnitudes, {"mxfp4": E2M1, "mxfp6": E2M3}[name])
            block = got[start : start + BLOCK[name]]
            assert [abs(Fraction(value)) for value in block.tolist()] == wanted
            assert torch.equal(block.signbit(), row[start : start + BLOCK[name]].signbit())


@pytest.mark.parametrize("columns", [1, 70])
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_levels_of_the_largest_value_are_the_nearest(name, columns):
    # Below 2**-125, an fp32 product with a level is itself rounded.
    weight = hostile(columns)[[0, 1, 2, 4, 7, 8, 9, 10, 11]]
    decoded = round_trip(name, weight)
    levels = torch.arange(-127, 128) / 127 if name == "int8" else CODECS[name].levels
    for row, got in zip(weight, decoded, strict=True):
        for start in range(0, columns, 64):
            values = [Fraction(value) for value in row[start : start + 64].tolist()]
            absmax = max(abs(value) for value in values)
            for value, choices in zip(
                got[start : start + 64].tolist(), nearest_level(values, levels), strict=True
            ):
                assert min(abs(Fraction(value) - choice) for choice in choices) <= absmax * Fraction(1, 2**23)
            at_most = row[start : start + 64].abs().argmax()
            assert got[start + at_most] == row[start + at_most]


def test_bitsandbytes_reads_and_writes_the_same():
    from bitsandbytes import functional

    torch.manual_seed(0)
    weight = torch.randn(96, 128) * 0.02
    packed, scales = codec("nf4").encode(weight)
    theirs, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    assert torch.equal(theirs.view(-1), packed) and torch.equal(state.absmax, scales)
    for dtype in (torch.float32, torch.bfloat16):
        state.dtype = dtype
        ours = codec("nf4").decode(packed, scales, weight.shape, dtype)
        assert torch.equal(ours, functional.dequantize_4bit(theirs, state))

    packed, scales = codec("int8").encode(weight)
    read = functional.dequantize_blockwise(
        packed.view(weight.shape), absmax=scales, code=codec("int8").levels, blocksize=64
    )
    assert torch.equal(codec("int8").decode(packed, scales, weight.shape, torch.float32), read)
    theirs, state = functional.quantize_blockwise(weight, blocksize=64)
    assert (read - weight).norm() < (functional.dequantize_blockwise(theirs, state) - weight).norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CODECS)
def test_what_was_decoded_is_encoded_to_the_same_bits(name, dtype):
    weight = hostile(70, dtype)
    if name in ("nf4", "int8"):  # but for blocks of numbers that are not normal
        weight = weight[weight.abs().amax(1) >= 64 * torch.finfo(dtype).tiny]
        assert len(weight) >= 7
    packed, scales = CODECS[name].encode(weight)
    again = CODECS[name].encode(CODECS[name].decode(packed, scales, weight.shape, dtype))
    assert torch.equal(packed, again[0]) and torch.equal(scales, again[1])


@pytest.mark.parametrize("name", CODECS)
def test_decoding_rounds_once(name):
    weight = hostile(70, torch.bfloat16)
    exact = round_trip(name, weight)
    assert torch.equal(round_trip(name, weight, torch.bfloat16), exact.to(torch.bfloat16))
    assert torch.equal(round_trip(name, weight.float()), exact)


@pytest.mark.parametrize("columns", [1, 16, 33, 64, 70])
@pytest.mark.parametrize("name", CODECS)
def test_sizes_are_what_is_stored(name, columns):
    each = CODECS[name]
    packed, scales = each.encode(torch.randn(7, columns))
    assert each.sizes((7, columns)) == (packed.numel(), scales.numel())
    assert packed.dtype == torch.uint8 and scales.dtype == each.scale_dtype
    assert packed.is_contiguous() and packed.dim() == scales.dim() == 1
    assert each.block == BLOCK[name] and each.bits_per_weight == BITS[name]
    if columns == 64:
        bits = 8 * (packed.nbytes + scales.nbytes) / (7 * 64)
        assert bits == BITS[name]


@pytest.mark.parametrize("name", CODECS)
def test_rows_are_independent(name, monkeypatch):
    weight = hostile(70)
    packed, scales = CODECS[name].encode(weight)
    decoded = CODECS[name].decode(packed, scales, weight.shape, torch.float32)
    monkeypatch.setattr(base, "CHUNK", 200)  # two rows at a time
    again = CODECS[name].encode(weight)
    assert torch.equal(packed, again[0]) and torch.equal(scales, again[1])
    assert torch.equal(decoded, CODECS[name].decode(packed, scales, weight.shape, torch.float32))
    for row in (0, 5, 11):
        one = CODECS[name].encode(weight[row : row + 1])
        assert torch.equal(one[0], packed.view(12, -1)[row]) and torch.equal(one[1], scales.view(12, -1)[row])


@pytest.mark.parametrize("name", CODECS)
def test_any_memory_will_do(name):
    """A transposed weight; codes and scales that were gathered behind other bytes."""
    weight = hostile(70)
    packed, scales = CODECS[name].encode(weight.t().contiguous().t())
    wanted = CODECS[name].encode(weight)
    assert torch.equal(packed, wanted[0]) and torch.equal(scales, wanted[1])
    moved = torch.cat([packed[:1], packed])[1:], torch.cat([scales[:1], scales])[1:]
    decoded = CODECS[name].decode(*moved, weight.shape, torch.float32)
    assert torch.equal(decoded, round_trip(name, weight))


class Largest(TorchDispatchMode):
    """The most bytes of a tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor) and not function.is_view:
            self.num_bytes = max(self.num_bytes, result.nbytes)
        return result


@pytest.mark.parametrize("name", CODECS)
def test_nothing_of_a_large_weight_is_made_but_the_result(name):
    weight = torch.randn(4096, 2048).to(torch.bfloat16)
    CODECS[name].encode(weight[:1])  # what is made once
    with Largest() as encoding:
        packed, scales = CODECS[name].encode(weight)
    with Largest() as decoding:
        CODECS[name].decode(packed, scales, weight.shape, torch.bfloat16)
    assert encoding.num_bytes <= weight.nbytes // 2
    assert decoding.num_bytes == weight.nbytes


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("name", CODECS)
def test_what_is_not_finite_is_refused(name, value):
    weight = torch.zeros(3, 40)
    weight[2, 39] = value
    with pytest.raises(UserError) as error:
        CODECS[name].encode(weight)
    assert name in error.value.what and error.value.fix


def test_an_unknown_format_is_refused():
    assert tuple(CODECS) == BASE_FORMATS
    with pytest.raises(UserError) as error:
        codec("bfp7")
    assert "bfp7" in error.value.what and "bfp8" in error.value.fix


def test_the_table_of_formats():
    """docs/formats.md has these rows."""
    torch.manual_seed(0)
    weight = torch.randn(1024, 1024)
    scale_names = {torch.uint8: "8-bit exponent", torch.float32: "float32"}
    rows = []
    for name, each in CODECS.items():
        error = 100 * ((round_trip(name, weight) - weight).norm() / weight.norm()).item()
        scale = scale_names[each.scale_dtype]
        rows.append(
            f"| `{name}` | {each.bits} | {each.block} | {scale} | {each.bits_per_weight} | {error:.2g}% |"
        )
    page = (ROOT / "docs" / "formats.md").read_text()
    assert [row for row in rows if row not in page] == []


@pytest.mark.parametrize("name", [name for name in CODECS if BITS[name] % 0.5 == 0.25 or "bfp" in name])
def test_unchecked_blocks_that_are_not_finite_are_nan_and_the_others_as_ever(name):
    weight, block = hostile(70), BLOCK[name]
    wanted = round_trip(name, weight)
    for row, value in ((0, float("inf")), (4, float("nan")), (9, -float("inf"))):
        weight[row, block + 3] = value
        wanted[row, block : 2 * block] = float("nan")
    packed, scales = CODECS[name].encode(weight, check=False)
    decoded = CODECS[name].decode(packed, scales, weight.shape, torch.float32)
    assert torch.equal(decoded.nan_to_num(7.0), wanted.nan_to_num(7.0))
