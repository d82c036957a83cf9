"""Fingerprint of the pretrained weights."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from speft_ds.comm import collectives
from speft_ds.config.model_config import HEAD
from speft_ds.zero.shards import full_shape, is_sharded, own_elements

# Elements hashed at once, to bound the int64 temporaries; on a GPU few launches count more.
HASH_CHUNK = {"cpu": 2**20, "cuda": 2**25}


INTEGER_VIEW = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.uint8: torch.uint8,  # codes of a base in few bits, and scales
}


def element_hash(values: Tensor, start: int) -> Tensor:
    """Sum over elements of a mix of (bits, global flat index), modulo 2^64: an int64 scalar, of either sign.

    A sum, so that the hashes of the shards of a weight add up to the hash of the weight. It stays where the
    values are: a GPU is not waited for.
    """
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    bits = values.reshape(-1).view(INTEGER_VIEW[values.dtype])
    size = HASH_CHUNK[values.device.type]
    for offset in range(0, bits.numel(), size):
        chunk = bits[offset : offset + size].to(torch.int64)
        position = torch.arange(start + offset, start + offset + chunk.numel(), device=chunk.device)
        total += mix64(chunk * -0x61C8864680B583EB + position * 0x2545F4914F6CDD1D).sum()
    return total


def mix64(value: Tensor) -> Tensor:
    """A bijective scrambling of 64-bit values, held as int64: the finaliser of splitmix64."""
    value = (value ^ _shift_right(value, 30)) * -0x40A7B892E31B1A47
    value = (value ^ _shift_right(value, 27)) * -0x6B2FB644ECCEEE15
    return value ^ _shift_right(value, 31)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically, which would copy the sign bit down and lose bits in the xor.
    return (value >> bits) & (2 ** (64 - bits) - 1)


def fingerprint(model: nn.Module, rounded: torch.dtype | None = None) -> str:
    """Hash of all pretrained weights: names, shapes, dtypes, bits. The same for a sharded and a plain model.

    A classifier's head is left out: it is not pretrained.

    Args:
        rounded: hash the weights rounded to this dtype, so that one checkpoint has one hash whether it
            is loaded in this dtype or in a wider one.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if name != HEAD}
    hashes = []
    for parameter in parameters.values():
        values, start = own_elements(parameter) if is_sharded(parameter) else (parameter.detach(), 0)
        hashes.append(element_hash(values if rounded is None else values.to(rounded), start))
    hashes = torch.stack(hashes).tolist()
    if any(is_sharded(parameter) for parameter in parameters.values()):
        hashes = [sum(column) for column in zip(*collectives.all_gather_objects(hashes), strict=True)]
    digest = hashlib.sha256()
    for (name, parameter), value in zip(parameters.items(), hashes, strict=True):
        dtype = rounded or parameter.dtype
        digest.update(f"{name} {tuple(full_shape(parameter))} {dtype} {value % 2**64:016x}\n".encode())
    return digest.hexdigest()
