"""Masks over made-up decoders."""

import torch

from speft_ds.mask import Mask

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
