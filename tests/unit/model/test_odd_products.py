"""Weights used in odd ways: a hook gets the factors of all of their gradient, or the weight is no target."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from speft_ds.model.reach import find_reach
from speft_ds.model.targets import all_weights
from speft_ds.model.weight_grad_hooks import weight_grad_hooks
from speft_ds.selection.calibration import weight_gradient

WIDTH, EXPERTS = 8, 4
IDS = torch.tensor([[3, 1, 4, 1], [5, 2, 6, 5]])


def use(forward, shape=(WIDTH, WIDTH)):
    """A class of modules with a weight that is used by `forward(weight, x)`."""

    class Odd(nn.Linear):
        def __init__(self):
            super().__init__(WIDTH, WIDTH)
            self.weight = nn.Parameter(torch.randn(*shape) / 3)
            self.passes = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return forward(self.weight, self.passes(x))

    return Odd


def stack(forward):
    """The same with a stack of experts, over the tokens [tokens, width] of all rows."""
    return use(lambda w, x: forward(w, x.flatten(0, 1)).view(x.shape), (EXPERTS, WIDTH, WIDTH))


def in_chunks(w, x):
    """Experts one by one, in two chunks of tokens each."""
    return torch.cat([F.linear(half, w[i]) for i in (2, 0) for half in x[4 * (i == 0) :][:4].split([3, 1])])


def with_an_unused_result(w, x):
    results = [F.linear(x, w[number]) for number in range(EXPERTS)]
    return results[0] + results[2]


def shifted(w, x):
    """The weight itself for all tokens but the last, twice the weight for that one."""
    return torch.cat([x[:, :-1] @ w.T, x[:, -1:] @ (w * 2).T], 1)


def out_of_a_square(w, x):
    return x @ w.view(2, 4, WIDTH).transpose(0, 1).reshape(WIDTH, WIDTH)


EXACT = {
    "mm": use(lambda w, x: torch.mm(x.flatten(0, 1), w).view(x.shape)),
    "Tensor.mm": use(lambda w, x: x.flatten(0, 1).mm(w.t()).view(x.shape)),
    "baddbmm": stack(lambda w, x: torch.baddbmm(torch.ones(EXPERTS, 1, WIDTH), x.view(EXPERTS, 2, WIDTH), w)),
    "twice": use(lambda w, x: torch.tanh(x @ w) @ w.T),
    "detached use beside it": use(lambda w, x: (x @ w) * w.detach().norm()),
    "chunks of experts": stack(in_chunks),
    "results of experts that nothing uses": stack(with_an_unused_result),
    "grouped, twice": stack(
        lambda w, x: sum(
            F.grouped_mm(x, w.mT, offs=torch.tensor(ends, dtype=torch.int32))
            for ends in ([2, 2, 5, 8], [8] * 4)
        )
    ),
}
REFUSED = {
    "addmm onto an activation": use(lambda w, x: torch.addmm(x[0], x[1], w).expand(x.shape)),
    "addmm by a factor": use(lambda w, x: torch.addmm(torch.ones(WIDTH), x[0], w, alpha=3).expand(x.shape)),
    "a norm beside it": use(lambda w, x: (x @ w) / w.norm()),
    "a penalty": use(lambda w, x: x @ w + w.sum()),
    "scaled": use(lambda w, x: x @ (w * 0.5)),
    "scaled for one token": use(shifted),
    "einsum": use(lambda w, x: torch.einsum("bti,oi->bto", x, w)),
    "einsum beside it": use(lambda w, x: x @ w + torch.einsum("bti,oi->bto", x, w)),
    "a slice": use(lambda w, x: F.pad(F.linear(x, w[:3]), (0, WIDTH - 3))),
    "a slice beside it": use(lambda w, x: F.linear(x, w) + F.pad(F.linear(x, w[:3]), (0, WIDTH - 3))),
    "a row for all": use(lambda w, x: x @ w[0].expand(WIDTH, WIDTH)),
    "other strides": use(out_of_a_square),
    "from the left": use(lambda w, x: (w @ x.mT).mT),
    "on both sides": use(lambda w, x: x + (w @ w).sum()),
    "cast": use(lambda w, x: (x.double() @ w.double()).float()),
    "by name": use(lambda w, x: F.linear(x, weight=w)),
    "all experts on all tokens": stack(lambda w, x: torch.matmul(x, w).sum(0)),
    "an expert beside all": stack(lambda w, x: F.linear(x, w.sum(0)) + F.linear(x, w[1])),
}


class Model(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.embed, self.layers = nn.Embedding(8, WIDTH), nn.ModuleList([layer])

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=torch.sin(self.layers[0](self.embed(input_ids))))


def adapted(layer):
    torch.manual_seed(0)
    plain, live = Model(layer()), Model(layer()).requires_grad_(False)
    live.load_state_dict(plain.state_dict())
    targets = all_weights(live)
    for target in targets.values():
        target.adapt()
    return plain, live, targets, find_reach(live, targets)


@pytest.mark.parametrize("name", EXACT)
def test_all_of_a_gradient_reaches_the_hook(name):
    plain, live, targets, reach = adapted(EXACT[name])
    assert reach.fed == targets.keys() == {"layers.0.weight", "layers.0.passes.weight"}
    assert not any(weight.requires_grad for weight in live.parameters())
    expected = plain(IDS).logits
    expected.sum().backward()
    sums = {key: torch.zeros(target.shape) for key, target in targets.items()}
    hooks = {key: lambda *factors, s=total: s.add_(weight_gradient(*factors)) for key, total in sums.items()}
    with weight_grad_hooks(targets, hooks):
        got = live(IDS).logits
        got.sum().backward()
    assert torch.equal(got, expected)
    weights = dict(plain.named_parameters())
    for key, total in sums.items():
        torch.testing.assert_close(total.view(weights[key].shape), weights[key].grad)


@pytest.mark.parametrize("name", REFUSED)
def test_a_use_beside_the_product_is_seen(name):
    *_, reach = adapted(REFUSED[name])
    assert reach.fed == {"layers.0.passes.weight"} and "layers.0.weight" in reach.used
    (line,) = [line for line in reach.lines({}, ["layers.0.weight"], False) if line.startswith("note")]
    assert "layers.*.weight" in line or "layers.0" in line


def test_another_modules_use_is_seen():
    class Peeks(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.outer(self.inner(x)) @ self.outer.weight

    assert adapted(Peeks)[-1].fed == {"layers.0.inner.weight"}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("normed", [parametrizations.weight_norm, nn.utils.weight_norm])
def test_a_weight_that_is_computed_is_no_target(normed):
    class Normed(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(WIDTH, WIDTH), normed(nn.Linear(WIDTH, WIDTH)))

    assert adapted(Normed)[-1].fed == {"layers.0.0.weight"} == adapted(Normed)[2].keys()
