"""Numbers of many sizes, for the tests of 8-bit storage and of the optimizer on it."""

import torch

LENGTH = 8192  # bitsandbytes keeps fp32 moments below 4096


def numbers(seed=0, decades=7, length=LENGTH):
    """Both signs, log-uniform over so many decades; every seventh is 0."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(length, generator=generator)
    values *= 10 ** (torch.rand(length, generator=generator) * -decades)
    values[::7] = 0
    return values
