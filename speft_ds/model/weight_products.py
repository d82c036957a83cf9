"""Products with a module's weights, seen from outside: what hands the factors of their gradients to a hook.

A module that is no plain `nn.Linear` keeps its own forward, bit for bit. While it runs, the products in which
one of its weights is the right operand are done by an autograd function of ours, which calls the module's own
operation, saves the weight's leaf (as `kinds.linear` does) and in its backward calls the hook.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Operation -> positions of the left operand and of the right one, the weight.
PRODUCTS = {
    torch.nn.functional.linear: (0, 1),
    torch.matmul: (0, 1),
    torch.Tensor.matmul: (0, 1),
    torch.Tensor.__matmul__: (0, 1),
    torch.mm: (0, 1),
    torch.Tensor.mm: (0, 1),
    torch.bmm: (0, 1),
    torch.Tensor.bmm: (0, 1),
    torch.addmm: (1, 2),
    torch.Tensor.addmm: (1, 2),
    torch.baddbmm: (1, 2),
    torch.Tensor.baddbmm: (1, 2),
    torch._grouped_mm: (0, 1),
    torch.nn.functional.grouped_mm: (0, 1),
}


def adapt(module: nn.Module, recomputes_input: bool = True) -> None:
    """Have a live module hand the factors of its weights' gradients to their hooks, `<weight>_grad_hook`.

    Args:
        recomputes_input: has no effect: inputs are saved.
    """
    if "grad_anchor" in module.__dict__:
        return
    module.grad_anchor = torch.zeros((), requires_grad=True)  # has no part in any value
    forward = module.forward

    def observed(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with _WeightProducts(module):
            return forward(*args, **kwargs)

    module.forward = observed


@dataclass
class _Factors:
    """What the products with one weight in one forward hand over, all at once when the last one has.

    Attributes:
        num_open: products whose backward is still to come.
        parts: expert -> its (columns, rows), where the products are with one expert at a time.
    """

    hook: Callable[..., None]
    num_experts: int | None
    num_open: int = 0
    parts: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def add(self, expert: int | None, columns: Tensor, rows: Tensor, ends: Tensor | None) -> None:
        if expert is None:
            self.hook(columns, rows, *([] if ends is None else [ends]))
            return
        if not self.parts:  # at the latest when the backward ends: a result that nothing uses has none
            torch.autograd.Variable._execution_engine.queue_callback(self.hand_over)
        self.num_open -= 1
        self.parts.setdefault(expert, []).append((columns, rows))
        if not self.num_open:
            self.hand_over()

    def hand_over(self) -> None:
        if not self.parts:
            return
        pairs = [self.parts.get(number, []) for number in range(self.num_experts)]
        self.parts = {}
        columns, rows = (
            torch.cat([pair[side].reshape(-1, pair[side].shape[-1]) for own in pairs for pair in own])
            for side in (0, 1)
        )
        counts = [sum(part.shape[:-1].numel() for part, _ in own) for own in pairs]
        self.hook(columns, rows, torch.tensor(counts).cumsum(0).to(columns.device))


@dataclass(frozen=True)
class _Operand:
    """How a product uses its weight.

    Attributes:
        expert: the one that it is with; None: with all, or the weight is no stack.
        rows_are_inputs: whether the weight as it is stored has the inputs in its rows.
    """

    expert: int | None
    rows_are_inputs: bool

    @classmethod
    def of(cls, operand: Tensor, weight: Tensor, is_linear: bool) -> _Operand | None:
        """None where it is not the weight, an expert of it, or the transpose of one of these, as they lie."""
        if operand.dim() not in (2, 3) or operand.dtype != weight.dtype:
            return None
        offset, expert = operand.storage_offset() - weight.storage_offset(), None
        layout = list(zip(weight.shape, weight.stride(), strict=True))
        if weight.dim() == 3 and operand.dim() == 2:
            (_, size), *layout = layout
            expert, offset = divmod(offset, size)
        if offset:
            return None
        own = list(zip(operand.shape, operand.stride(), strict=True))
        if own == layout:
            return cls(expert, not is_linear)
        if own == [*layout[:-2], layout[-1], layout[-2]]:
            return cls(expert, is_linear)
        return None

    def to_inputs(self, weight: Tensor) -> Tensor:
        """[..., out, in], by which a gradient of the output is multiplied."""
        weight = weight if self.expert is None else weight[self.expert]
        return weight.transpose(-2, -1) if self.rows_are_inputs else weight


class _Product(torch.autograd.Function):
    """One product: `run` does it; the backward hands its factors over."""

    @staticmethod
    def forward(ctx, x, grad_anchor, weight, bias, run, operand, factors, ends):
        ctx.save_for_backward(weight, *([] if factors is None else [x]))
        ctx.operand, ctx.factors, ctx.ends = operand, factors, ends
        ctx.bias_shape = None if bias is None else bias.shape
        return run(x)

    @staticmethod
    def backward(ctx, grad_y):
        weight, *saved = ctx.saved_tensors
        operand, ends = ctx.operand, ctx.ends
        if ctx.factors is not None:
            x, gradient = saved[0], grad_y
            stacked = ends
            if (
                weight.dim() == 3 and ends is None and operand.expert is None
            ):  # as many tokens for each expert
                stacked = torch.arange(1, x.shape[0] + 1, device=x.device) * x.shape[1]
                x, gradient = x.flatten(0, 1), gradient.flatten(0, 1)
            pair = (gradient, x) if operand.rows_are_inputs else (x, gradient)
            ctx.factors.add(operand.expert, *pair, stacked)
        grad_x = None
        if ctx.needs_input_grad[0]:
            matrix = operand.to_inputs(weight)
            if ends is None:
                grad_x = grad_y.matmul(matrix)
            else:
                grad_x = torch._grouped_mm(grad_y.contiguous(), matrix, offs=ends)
        grad_bias = grad_y.sum_to_size(ctx.bias_shape) if ctx.needs_input_grad[3] else None
        return grad_x, None, None, grad_bias, None, None, None, None


def _is_plain(function, places: tuple[int, int], args: tuple, kwargs: dict) -> bool:
    """Whether nothing but the left operand and a bias needs a gradient, each row being multiplied once."""
    left, right = places
    x, weight = args[left], args[right]
    if not kwargs.keys() <= {"offs", "bias", "beta", "alpha", "out_dtype"} or kwargs.get("alpha", 1) != 1:
        return False
    if kwargs.get("out_dtype") not in (None, x.dtype):
        return False
    biases = _trained_biases(places, args, kwargs)
    if len(biases) > kwargs.get("beta", 1) or not all(bias.is_leaf for bias in biases):
        return False
    if "grouped_mm" in function.__name__:
        if len(args) != 2 or weight.dim() != 3:
            return False
        if kwargs.get("offs") is not None:
            return x.dim() == 2
    return weight.dim() == 2 or (x.dim() == 3 and x.shape[0] == weight.shape[0])


def _trained_biases(places: tuple[int, int], args: tuple, kwargs: dict) -> list[Tensor]:
    """What needs a gradient beside the operands."""
    left, right = places
    others = [*args[:left], *args[right + 1 :], *kwargs.values()]
    return [other for other in others if isinstance(other, Tensor) and other.requires_grad]


class _WeightProducts(TorchFunctionMode):
    """While one module's forward runs: does its products with its own weights."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.names = {id(weight): name for name, weight in module.named_parameters(recurse=False)}
        self.factors: dict[str, _Factors | None] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (places := PRODUCTS.get(function)) and len(args) > places[1]:
            value = args[places[1]]
            weight = value if id(value) in self.names else getattr(value, "_base", None)
            if id(weight) in self.names:
                operand = _Operand.of(value, weight, function is torch.nn.functional.linear)
                if operand is not None and _is_plain(function, places, args, kwargs):
                    return self._product(function, places, args, kwargs, weight, operand)
        return function(*args, **kwargs)

    def _product(
        self, function, places: tuple[int, int], args: tuple, kwargs: dict, weight: Tensor, operand: _Operand
    ):
        left, bias = places[0], next(iter(_trained_biases(places, args, kwargs)), None)
        factors = self._factors(self.names[id(weight)], weight)
        setattr(self.module, f"{self.names[id(weight)]}_rows_are_inputs", operand.rows_are_inputs)
        if factors is not None and operand.expert is not None:
            if args[left].numel() == 0:  # an idle expert, whose result may be used or not
                factors = None
            else:
                factors.num_open += 1

        def run(x: Tensor) -> Tensor:
            return function(*args[:left], x, *args[left + 1 :], **kwargs)

        anchor = None if factors is None else self.module.grad_anchor
        return _Product.apply(args[left], anchor, weight, bias, run, operand, factors, kwargs.get("offs"))

    def _factors(self, name: str, weight: Tensor) -> _Factors | None:
        if name not in self.factors:
            hook = getattr(self.module, f"{name}_grad_hook", None)
            num_experts = weight.shape[0] if weight.dim() == 3 else None
            self.factors[name] = None if hook is None else _Factors(hook, num_experts)
        return self.factors[name]
