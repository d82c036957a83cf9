"""The reference backend: the dense weight gradient, a block of rows at a time, and a gather."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of the dense gradient alive at once: a full-size weight gradient never is.
BLOCK_ELEMENTS = 2**21


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with fp32 accumulation and an fp32 result, whatever the inputs' dtype."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


class DenseGradient:
    """Row-blocked GEMM and gather.

    Args:
        index: [k] sorted flat indices.
        shape: (out_features, in_features) of the weight.
    """

    def __init__(self, index: Tensor, shape: tuple[int, int]):
        self.out_features, self.in_features = shape
        self.index = index
        self.block = max(1, BLOCK_ELEMENTS // self.in_features)
        edges = torch.arange(0, self.out_features, self.block, dtype=torch.int64) * self.in_features
        positions = torch.searchsorted(index.to("cpu", torch.int64), edges)
        self.bounds = [*positions.tolist(), index.numel()]

    def __call__(self, x: Tensor, grad_y: Tensor) -> Tensor:
        x, grad_y = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1])
        values = torch.empty(self.index.numel(), dtype=torch.float32, device=x.device)
        for number, row in enumerate(range(0, self.out_features, self.block)):
            start, stop = self.bounds[number], self.bounds[number + 1]
            if start == stop:
                continue
            gradient = matmul_fp32(grad_y[:, row : row + self.block].t(), x)  # [block, in]
            local = self.index[start:stop].to(torch.int64) - row * self.in_features
            torch.take(gradient, local, out=values[start:stop])
        return values
