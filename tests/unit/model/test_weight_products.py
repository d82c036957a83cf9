"""Products with weights of every kind, seen from outside, against plain autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from speft_ds.model.kinds import find_weights
from speft_ds.selection.calibration import weight_gradient


class OwnForward(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


class Grouped(nn.Module):
    """Tokens sorted by expert, one product for all, as transformers' default has it."""

    def __init__(self, is_transposed):
        super().__init__()
        self.is_transposed = is_transposed
        self.weight = nn.Parameter(torch.randn(4, 16, 24))

    def forward(self, x):
        weight = self.weight if self.is_transposed else self.weight.transpose(-2, -1)
        counts = torch.tensor([3, 0, 5, len(x) - 8])  # the second expert is idle
        return F.grouped_mm(x, weight, offs=counts.cumsum(0).to(torch.int32))


class OneByOne(nn.Module):
    """A product for each expert that has tokens, in an order of its own."""

    def __init__(self, is_transposed):
        super().__init__()
        self.is_transposed = is_transposed
        self.weight = nn.Parameter(torch.randn(4, 16, 24))

    def forward(self, x):
        parts = {3: x[8:], 0: x[:3], 2: x[3:8]}
        if self.is_transposed:
            return torch.cat([x @ self.weight[number] for number, x in parts.items()])
        return torch.cat([F.linear(x, self.weight[number]) for number, x in parts.items()])


class EveryExpert(nn.Module):
    def __init__(self, is_transposed):
        super().__init__()
        self.is_transposed = is_transposed
        self.weight = nn.Parameter(torch.randn(4, 16, 24))

    def forward(self, x):
        x = x.repeat(4, 1).view(4, len(x), -1)
        return torch.bmm(x, self.weight if self.is_transposed else self.weight.transpose(-2, -1))


MODULES = {
    "own_forward": lambda: OwnForward(16, 24),
    "conv1d": lambda: Conv1D(24, 16),
    **{
        f"{kind.__name__}-{is_transposed}": lambda kind=kind, is_transposed=is_transposed: kind(is_transposed)
        for kind in (Grouped, OneByOne, EveryExpert)
        for is_transposed in (True, False)
    },
}


@pytest.mark.parametrize("needs_input_grad", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_forward_and_gradients_are_those_of_autograd(name, needs_input_grad):
    torch.manual_seed(0)
    plain = MODULES[name]()
    weight_shape, is_stack = plain.weight.shape, plain.weight.dim() == 3
    width = weight_shape[-2 if name == "conv1d" or name.endswith("True") else -1]
    live = copy.deepcopy(plain).requires_grad_(False)
    x = torch.randn(20, width, requires_grad=needs_input_grad)
    expected = plain(x)
    grad_y = torch.randn_like(expected)
    expected.backward(grad_y)
    expected_x, x.grad = x.grad, None

    (target,) = find_weights(live).values()
    target.adapt()
    seen = []
    target.weight_grad_hook = lambda *factors: seen.append(weight_gradient(*factors))
    y = live(x)
    assert torch.equal(y, expected)
    y.backward(grad_y)
    assert len(seen) == 1, "a hook is called once a forward"
    assert seen[0].shape == target.shape == (weight_shape[:-1].numel(), weight_shape[-1])
    torch.testing.assert_close(seen[0].view(weight_shape), plain.weight.grad)
    if needs_input_grad:
        torch.testing.assert_close(x.grad, expected_x)
    if is_stack and not name.startswith("Every"):
        assert not seen[0].view(weight_shape)[1].any(), "the idle expert"


def test_nothing_but_the_weight_is_saved_without_a_hook():
    linear = Conv1D(24, 16).requires_grad_(False)
    (target,) = find_weights(linear).values()
    target.adapt()
    saved, x = [], torch.randn(5, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(x)
    assert [id(tensor) for tensor in saved] == [id(linear.weight)]


def test_a_part_of_a_weight_is_no_product_with_it():
    class Half(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight[:12])

    half = Half(16, 24).requires_grad_(False)
    (target,) = find_weights(half).values()
    target.adapt()
    target.weight_grad_hook = lambda *factors: pytest.fail("half a gradient")
    half(torch.randn(5, 16, requires_grad=True)).sum().backward()


def test_convolutions_and_vectors_are_no_targets():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Parameter(torch.ones(1, 1, 16))
            self.scale = nn.Parameter(torch.ones(16))

    for module in (nn.Conv1d(4, 4, 3), nn.LayerNorm(8), nn.Embedding(8, 4), Gate()):
        assert find_weights(module) == {}
