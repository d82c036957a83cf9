"""What a forward saves in few bits: against rounding by hand, and with a codec that loses nothing."""

import gc
import math
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from speft_ds.model import stash as module
from speft_ds.model.codecs import codec
from speft_ds.model.kinds.linear import adapt
from speft_ds.model.linear_cross_entropy import HeadLoss, LogitTransform
from speft_ds.model.stash import Stash
from speft_ds.model.targets import all_weights
from speft_ds.tools.plan.activations import LiveBytes
from unit.model.test_input_recompute import IDS, SIZES, layers_of, make_model

MANTISSA = {"bfp4": 3, "bfp6": 5, "bfp8": 7}  # bits of an element, without its sign


def rounded(x: torch.Tensor, name: str) -> torch.Tensor:
    """Block floating point, element by element: 16 neighbours share the exponent of their largest."""
    rows = x.reshape(-1, x.shape[-1])
    found = torch.empty(rows.shape, dtype=torch.float64)
    for row in range(rows.shape[0]):
        for start in range(0, rows.shape[1], 16):
            block = rows[row, start : start + 16].double().tolist()
            largest = max(map(abs, block))
            exponent = math.frexp(largest)[1] - 1 if largest else 0
            step = 2.0 ** (exponent - MANTISSA[name] + 1)
            limit = 2 ** MANTISSA[name] - 1
            values = [max(-limit, min(limit, round(value / step))) * step for value in block]  # ties to even
            found[row, start : start + 16] = torch.tensor(values, dtype=torch.float64)
    return found.view(x.shape).to(x.dtype)


class Exact:
    """A codec that keeps every bit, and notes what it is asked for."""

    name = "exact"

    def __init__(self):
        self.encoded, self.num_decoded = [], 0

    def encode(self, weight, check=True):
        assert weight.dim() == 2 and not check
        self.encoded.append(tuple(weight.shape))
        packed = weight.contiguous().clone().view(torch.uint8).flatten()
        return packed, packed.new_zeros(1)

    def decode(self, packed, scales, shape, dtype):
        self.num_decoded += 1
        return packed.view(dtype).view(shape).clone()


class Net(nn.Module):
    """A gated layer between two linears, with what `Stash` asks of a model."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.gate, self.up, self.down = (
            nn.Linear(a, b, bias=False) for a, b in ((20, 40), (40, 24), (40, 24), (24, 8))
        )
        self.embedding, self.config = nn.Embedding(4, 20), None
        self.requires_grad_(False)
        self.seen = {}
        for name in ("first", "gate", "up", "down"):
            adapt(getattr(self, name))
            getattr(self, name).weight_grad_hook = lambda x, g, n=name: self.seen.update({n: (x, g)})

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return None

    def forward(self, x):
        h = self.first(x)
        return self.down(self.gate(h).tanh() * self.up(h))


@pytest.mark.parametrize("name", ["bfp8", "bfp4"])
def test_gradients_are_those_of_the_packed_values(name):
    """Of weights and of activations, by the chain rule written out."""
    net, x = Net(), torch.randn(3, 5, 20, requires_grad=True)
    with Stash(net, codec(name)).packing(15):
        y = net(x)
    asked = torch.randn_like(y)
    (y * asked).sum().backward()
    first, gate, up, down = (linear.weight for linear in (net.first, net.gate, net.up, net.down))
    h = x.detach() @ first.T
    assert torch.equal(y, (((h @ gate.T).tanh() * (h @ up.T)) @ down.T))
    # What the backward knows of the forward.
    x_, h_, tanh, u = (rounded(t, name) for t in (x.detach(), h, (h @ gate.T).tanh(), h @ up.T))
    assert not torch.equal(x_, x)
    of_product = asked @ down
    of_gate, of_up = of_product * u * (1 - tanh**2), of_product * tanh
    of_h = of_gate @ gate + of_up @ up
    factors = {"first": (x_, of_h), "gate": (h_, of_gate), "up": (h_, of_up), "down": (tanh * u, asked)}
    assert net.seen.keys() == factors.keys()
    for linear, expected in factors.items():
        for got, wanted in zip(net.seen[linear], expected, strict=True):
            assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-6), linear
    assert torch.allclose(x.grad, of_h @ first, rtol=1e-5, atol=1e-6)


def gradients(kind, checkpointing, stashed, dtype=torch.float32, columns=None):
    """What the hooks of all linears of a model are given, and the stash or None."""
    model, given = make_model(kind, dtype), {}
    model.get_input_embeddings().register_forward_hook(lambda module, x, y: y.requires_grad_(True))
    if checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    for name, target in all_weights(model).items():
        target.adapt(recomputes_input=checkpointing == "none")
        if ".layers." in name or ".h." in name:

            def hook(*factors, name=name):
                given.setdefault(name, []).extend(factors)

            hook.columns = columns
            target.weight_grad_hook = hook
    stash = Stash(model, Exact()) if stashed else None
    positions = torch.arange(30).expand(2, -1) % 20  # packed rows, which need a mask
    with nullcontext() if stash is None else stash.packing(IDS.numel()):
        logits = model(input_ids=IDS, position_ids=positions, use_cache=False).logits
    assert stash is None or not stash.codec.num_decoded, "unpacked in the forward"
    logits.float().square().sum().backward()
    return given, stash


@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "non_reentrant"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "opt", "gpt2", "mixtral"])
def test_without_loss_of_bits_nothing_changes(kind, checkpointing):
    """Every value comes back where it belongs: freed storages, views, transposes, what is made again."""
    plain, _ = gradients(kind, checkpointing, False)
    packed, stash = gradients(kind, checkpointing, True)
    assert stash.codec.encoded and plain.keys() == packed.keys()
    for name, factors in plain.items():
        for one, other in zip(factors, packed[name], strict=True):
            # A half of gate_up comes back without the gaps between its rows: other loops of torch round it.
            is_same = torch.allclose(one, other, rtol=1e-5, atol=1e-6) if kind == "mixtral" else False
            assert is_same or torch.equal(one, other), name


def test_columns_of_inputs_and_bfloat16():
    how = ("llama", "none", torch.bfloat16, torch.tensor([3, 7, 11]))
    plain, _ = gradients(how[0], how[1], False, *how[2:])
    packed, _ = gradients(how[0], how[1], True, *how[2:])
    for name, factors in plain.items():
        assert all(map(torch.equal, factors, packed[name])), name


def test_values_are_packed_once_and_unpacked_once():
    """However many operations save them: a norm twice, the input of q, k and v."""
    _, stash = gradients("llama", "none", True)
    # Of each layer: both norms' inputs, v, attention's output, gate, up and their activation; and of the last
    # norm.
    assert len(stash.codec.encoded) == 3 * 7 + 1
    assert stash.codec.num_decoded == len(stash.codec.encoded)
    _, stash = gradients("llama", "reentrant", True)
    assert stash.codec.encoded == [(60, 32)] * 4  # the layers' inputs, and the last norm's


def test_what_is_no_activation_is_left_as_it_is():
    """Parameters themselves, views of them, masks, integers, a few numbers per token, what is expanded."""
    net = Net()
    stash, x, tokens = Stash(net, Exact()), torch.randn(6, 20, requires_grad=True), 6
    weight = nn.Parameter(torch.randn(20, 20), requires_grad=True)
    with stash.packing(tokens):
        ys = [
            nn.functional.linear(x, net.first.weight[:, :20]),  # a view of a frozen weight
            x.detach() @ weight.t(),  # a view of a trained one, and an input without gradient
            (x * torch.full((6, 20), -math.inf)).clamp(-1, 1),  # saves x
            x.sum(1, keepdim=True).exp(),
            x[:, :1].expand(6, 20).exp() * 2,  # its result is none, its input is not saved
            x[:1].expand(6, 20).square(),
            x.double().exp(),
            x.gather(1, torch.zeros(6, 20, dtype=torch.int64)),
        ]
    assert set(stash.codec.encoded) == {(6, 20)} and len(stash.codec.encoded) == 3
    sum(y.sum() for y in ys).backward()
    with stash.packing(tokens):
        loss = net(x).sum()
    node = next(n for n in nodes(loss.grad_fn) if "LinearWithHook" in n.name())
    assert node.saved_tensors[0] is net.down.weight


def nodes(node):
    while node is not None:
        yield node
        node = next((parent for parent, _ in node.next_functions if parent is not None), None)


def attend(module, query, key, value, mask, scaling=None, **kwargs):
    """An attention that a user registers, fused as others are."""
    heads = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(heads, 1) for x in (key, value))
    return Exponent.apply(query, key, value).transpose(1, 2), None


class Exponent(torch.autograd.Function):
    """Makes its probabilities again in the backward, from what it has then."""

    @staticmethod
    def forward(ctx, query, key, value):
        ctx.save_for_backward(query, key, value)
        return (query @ key.mT / 8).softmax(-1) @ value

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            own = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            (own[0] @ own[1].mT / 8).softmax(-1).matmul(own[2]).backward(grad)
        return tuple(x.grad for x in own)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "mine"])
def test_queries_and_keys_of_fused_attention_stay(attention, monkeypatch):
    """Else probabilities, made again beside their old normalizer, would grow without bound."""
    monkeypatch.setitem(module.ALL_ATTENTION_FUNCTIONS._global_mapping, "mine", attend)
    given, asked = {}, torch.randn(2, 30, 32)
    for name in (None, "bfp4"):
        model = make_model("llama", initializer_range=0.3)
        model.config._attn_implementation = attention
        stash = None if name is None else Stash(model, codec(name))
        model.get_input_embeddings().register_forward_hook(lambda module, x, y: y.requires_grad_(True))
        for linear in layers_of(model).values():
            adapt(linear)
        proj = model.model.layers[1].self_attn.q_proj
        proj.weight_grad_hook = lambda x, grad_y, name=name: given.update({name: grad_y})
        with nullcontext() if stash is None else stash.packing(IDS.numel()):
            hidden = model.model(input_ids=IDS, use_cache=False).last_hidden_state
        (hidden * asked).sum().backward()
        if stash is not None and attention != "eager":
            assert stash.saved.others >= 3 * 2 * 4 * 30 * 8 * 4  # of each layer, queries alone
    assert torch.nn.functional.cosine_similarity(*(g.flatten() for g in given.values()), dim=0) > 0.8
    assert 0.7 < given["bfp4"].norm() / given[None].norm() < 1.4
    assert module.ALL_ATTENTION_FUNCTIONS["mine"] is attend


def test_from_the_head_on_nothing_is_packed():
    model = make_model("llama")
    model.get_input_embeddings().register_forward_hook(lambda module, x, y: y.requires_grad_(True))
    head = model.get_output_embeddings()
    adapt(head)
    for own_loss in (True, False):
        stash = Stash(model, Exact())
        with stash.packing(IDS.numel()):
            if own_loss:
                ours = HeadLoss(head, LogitTransform(), "cpu")
                with ours.compute(torch.arange(58), torch.zeros(58, dtype=torch.int64), 1.0) as losses:
                    model(input_ids=IDS, use_cache=False)
                (loss,) = losses
            else:
                logits = model(input_ids=IDS, use_cache=False).logits
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), IDS.flatten())
        widths = {columns for _, columns in stash.codec.encoded}
        assert widths <= {SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["head_dim"]}
        assert stash.saved.others >= 60 * 32 * 4
        loss.backward()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_is_seen_in_the_gradient(bad):
    net, x = Net(), torch.randn(4, 20)
    x[1, 3] = bad
    with Stash(net, codec("bfp4")).packing(4):
        net(x.requires_grad_()).nansum().backward()
    of_rows = net.seen["first"][0].isnan().sum(1)
    assert of_rows.tolist() == [0, 16, 0, 0]  # its block


def live_after_forward(name):
    model = make_model("llama", hidden_size=128, head_dim=32)
    model.get_input_embeddings().register_forward_hook(lambda module, x, y: y.requires_grad_(True))
    for linear in layers_of(model).values():
        adapt(linear)
        linear.weight_grad_hook = lambda x, grad_y: None
    stash = Stash(model, codec(name)) if name else None
    with LiveBytes() as live:
        live.ignore([*model.parameters(), *model.buffers()])
        with nullcontext() if stash is None else stash.packing(IDS.numel()):
            hidden = model.model(input_ids=IDS, use_cache=False).last_hidden_state.sum()
        kept = live.now
    hidden.backward()
    return kept, stash and stash.saved


def test_bytes_that_are_kept_are_counted():
    """Against all storages alive after the forward, but for the logits."""
    plain, _ = live_after_forward(None)
    embedded = 60 * 128 * 4  # autograd holds the leaf, packed or not
    for name, bits in (("bfp8", 8.5), ("bfp4", 4.5)):
        kept, saved = live_after_forward(name)
        assert saved.packed == pytest.approx(saved.activations * bits / 32, rel=0.01)
        assert kept == pytest.approx(embedded + saved.packed + saved.others, abs=8000)  # weights of norms
        assert plain == pytest.approx(saved.activations + saved.others, abs=8000)
    assert kept < 0.4 * plain


def test_as_many_inputs_are_made_again_as_without():
    model = make_model("llama")
    for linear in layers_of(model).values():
        adapt(linear)
        linear.weight_grad_hook = lambda x, grad_y: None
    seen = []
    for stash in (None, Stash(model, codec("bfp8"))):
        with nullcontext() if stash is None else stash.packing(IDS.numel()):
            model(input_ids=IDS, use_cache=False)
        seen.append([linear.saves_input for linear in layers_of(model).values()])
    assert seen[0] == seen[1] and True in seen[0] and False in seen[0]


def test_nothing_outlives_the_backward():
    model, made = make_model("llama"), []
    model.get_input_embeddings().register_forward_hook(lambda module, x, y: y.requires_grad_(True))
    stash, real = Stash(model, codec("bfp4")), module._Packed.__init__

    def watched(self, *arguments):
        made.append(weakref.ref(self))
        real(self, *arguments)

    gc.collect()
    gc.disable()
    module._Packed.__init__ = watched
    try:
        for does_backward in (True, False):
            with stash.packing(IDS.numel()):
                loss = model(input_ids=IDS, use_cache=False).logits.sum()
            assert sum(ref() is not None for ref in made) > 20
            if does_backward:
                loss.backward()
            del loss
            assert not any(ref() is not None for ref in made)
    finally:
        module._Packed.__init__ = real
        gc.enable()


def test_without_packing_there_are_no_hooks():
    model = make_model("llama")
    stash = Stash(model, Exact())
    model.get_input_embeddings().register_forward_hook(lambda module, x, y: y.requires_grad_(True))
    model(input_ids=IDS, use_cache=False).logits.sum().backward()
    with stash.packing(IDS.numel()), torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    assert not stash.codec.encoded
