"""What test_triton_kernels.py runs in processes of their own: importing Triton reads TRITON_INTERPRET."""

from __future__ import annotations

from functools import partial
from unittest.mock import patch

import numpy as np
import torch

from speft_ds.sparse.kernels import triton_backends
from speft_ds.sparse.tiles import Tiles


def is_interpreted() -> bool:
    """Whether programs run in Triton's interpreter."""
    from speft_ds.sparse.kernels import triton_programs

    _teach_bfloat16()
    return type(triton_programs.slot_products).__name__ == "InterpretedFunction"


def _teach_bfloat16() -> None:
    """The interpreter holds bf16 as 16-bit integers and multiplies those: here, fp32 of the same value."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    def widen(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widen(a), widen(b), *rest)


def gradient(
    index: np.ndarray,
    shape: tuple[int, int],
    x: np.ndarray,
    grad_y: np.ndarray,
    dtype: str,
    block: int | None = None,
    slab_bytes: int | None = None,
    rows: int | None = None,
) -> tuple[np.ndarray, dict]:
    """Values of one call of a backend, and facts of it: `splits`, `rows` of a group or strip, `segments`."""
    dtype = getattr(torch, dtype)
    index = torch.from_numpy(index)
    x, grad_y = (torch.from_numpy(array).to(dtype) for array in (x, grad_y))
    slab_bytes = slab_bytes or triton_backends.SLAB_BYTES
    group_rows = (rows,) if rows else triton_backends.GROUP_ROWS
    with patch.multiple(triton_backends, SLAB_BYTES=slab_bytes, GROUP_ROWS=group_rows):
        if block is None:
            backend = triton_backends.ElementGradient(index, shape)
            facts = {"rows": backend.slots.rows, "segments": backend.slots.segment_group.numel()}
        else:
            backend = triton_backends.BlockGradient(index, shape, Tiles.of("block", block, shape))
            facts = {"rows": backend.rows, "segments": backend.segments.shape[0]}
        tokens = x.reshape(-1, shape[1]).shape[0]
        facts["splits"], _ = triton_backends.split_tokens(tokens, shape[1], dtype.itemsize, index.numel())
        values = backend(x, grad_y)
    assert values.dtype == torch.float32
    return values.numpy(), facts


def transposed(x: np.ndarray, dtype: str) -> np.ndarray:
    """`transpose`, as fp32."""
    return triton_backends.transpose(torch.from_numpy(x).to(getattr(torch, dtype))).float().numpy()


def _untouched(*shape: int) -> torch.Tensor:
    """bf16 zeros of memory that is taken only where it is written; torch would write all of it."""
    return torch.from_numpy(np.zeros(shape, np.int16)).view(torch.bfloat16)


def far_apart() -> tuple[list[float], list[float]]:
    """Values and what they should be, where the activations' last elements are more than 2^31 away."""
    tokens, features = triton_backends.STEP_TOKENS + 3, 2**25 + 5
    x_t = _untouched(features, 2 * triton_backends.STEP_TOKENS)
    grad_y = _untouched(tokens, features)
    x_t[-1, :tokens], grad_y[-3:, -1] = 2.0, torch.tensor([1.0, 3.0, 5.0])
    x_t[0, :tokens], grad_y[-3:, 0] = 4.0, torch.tensor([7.0, 1.0, 1.0])
    index = torch.tensor([0, features - 1, features * features - 1])
    x = torch.zeros(1, dtype=torch.bfloat16).expand(tokens, features)
    values = triton_backends.ElementGradient(index, (features, features))(x, grad_y, x_t)
    return values.tolist(), [36.0, 18.0, 18.0]


def compile_for(capability: int, dtype: str) -> dict[str, str]:
    """Name and size -> PTX of each program that this dtype needs, compiled for a GPU that is not there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from speft_ds.sparse.kernels import triton_programs

    assert not is_interpreted()
    target = GPUTarget("cuda", capability, 32)
    options = triton_backends.options(getattr(torch, dtype))
    constants = {name: options.pop(name) for name in ("SLOTS", "TOKENS")}
    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[dtype]
    activations = {name: f"*{short}" for name in ("x", "x_t", "grad_y")}
    floats = {name: "*fp32" for name in ("partial", "values")}
    pointers = activations | floats | {"segments": "*i64", "entry_row": "*u8"}
    indices = ("segment_first", "segment_group", "slot_column", "slot_first", "block_column", "order")
    pointers |= {name: "*i32" for name in indices}

    def ptx(program, **constants) -> str:
        names = program.arg_names
        kinds = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
        aligned = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(names) if name not in constants}
        values = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(fn=program, signature=kinds, constexprs=values, attrs=aligned)
        return triton.compile(source, target=target, options=options).asm["ptx"]

    compiled = {
        f"slot_products {rows}": ptx(triton_programs.slot_products, ROWS=rows, **constants)
        for rows in triton_backends.GROUP_ROWS
    }
    block = partial(ptx, triton_programs.block_products, ROW_ALIGN=16, **constants)
    for rows in (16, triton_backends.MOST_ROWS):
        compiled[f"block_products {rows}"] = block(ROWS=rows, WIDTH=rows, COLUMN_ALIGN=16)
    compiled["transpose_tile"] = ptx(
        triton_programs.transpose_tile,
        TOKENS=triton_backends.STEP_TOKENS,
        FEATURES=triton_backends.STEP_TOKENS,
    )
    compiled["sum_splits"] = ptx(triton_programs.sum_splits, ORDERED=True, BLOCK=triton_backends.SUM_BLOCK)
    return compiled
