"""The linear network of SynFlow on plain models: what it computes, and that it leaves no trace."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from speft_ds.comm import collectives
from speft_ds.errors import UserError
from speft_ds.selection.synflow import linear_network, only_scale


@pytest.fixture(params=["llama", "gemma2", "gpt2"])
def model(request, tiny, monkeypatch):
    """Gated activations; a soft cap on the logits and shifted norm weights; LayerNorm and biases."""
    monkeypatch.setattr(collectives, "device", lambda: torch.device("cpu"))
    torch.manual_seed(0)
    if request.param == "llama":
        return AutoModelForCausalLM.from_pretrained(tiny["untied"], dtype=torch.float32)
    if request.param == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=2)).eval()
    sizes = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, final_logit_softcapping=1.0)).eval()


def logits(model) -> torch.Tensor:
    return model(input_ids=torch.arange(12).view(2, 6), use_cache=False).logits


def test_the_network_is_the_same_afterwards(model):
    with torch.no_grad():
        before, config = logits(model), model.config.to_dict()
        with linear_network(model):
            assert not torch.allclose(logits(model), before)
        assert torch.equal(logits(model), before)
        with pytest.raises(ZeroDivisionError), linear_network(model):
            raise ZeroDivisionError
        assert torch.equal(logits(model), before)
    assert model.config.to_dict() == config
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_input_is_one_token_of_ones(model):
    with linear_network(model.to(torch.bfloat16)) as all_ones:
        assert all_ones.shape == (1, 1, model.config.hidden_size) and all_ones.dtype == torch.bfloat16
        assert bool((all_ones == 1).all()) and all_ones.requires_grad


def test_the_output_is_linear_in_a_weight(model):
    """R(w + d) - R(w) = dR/dw . d for a large d, at a weight after which no factor of a norm changes."""
    if isinstance(model, GPT2LMHeadModel):
        weight = model.transformer.h[-1].mlp.c_fc.weight
    else:
        weight = model.model.layers[-1].mlp.up_proj.weight
    factors = {}

    def frozen(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if norm not in factors:  # as for the weights that the gradient is taken at
            one = x.detach().clone().requires_grad_()
            factors[norm] = torch.autograd.grad(only_scale(norm, one).sum(), one)[0]
        return x * factors[norm]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("speft_ds.selection.synflow.only_scale", frozen)
        with linear_network(model) as all_ones:

            def total() -> torch.Tensor:
                return model(inputs_embeds=all_ones, use_cache=False).logits.double().sum()

            before = total()
            gradient = torch.autograd.grad(before, weight)[0]
            step = torch.randn_like(weight) * 10
            with torch.no_grad():
                weight += step
                after = total()
    slope = (gradient.double() * step).sum()
    assert abs(after - before - slope) < 1e-4 * abs(slope)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_flows_through_queries_and_keys(model, dtype):
    """Exactly nothing, whatever the kernels round: a budget per layer takes the largest even of noise."""
    with linear_network(model.to(dtype)) as all_ones:
        model(inputs_embeds=all_ones, use_cache=False).logits.float().sum().backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    if isinstance(model, GPT2LMHeadModel):  # one [in, 3 out] weight
        parts = [g.chunk(3, -1) for name, g in gradients.items() if name.endswith("attn.c_attn.weight")]
        without, values = [part for q, k, _ in parts for part in (q, k)], [v for _, _, v in parts]
    else:
        without = [g for name, g in gradients.items() if name.endswith(("q_proj.weight", "k_proj.weight"))]
        values = [g for name, g in gradients.items() if name.endswith("v_proj.weight")]
    assert len(without) == 4 and not any(g.any() for g in without)
    assert len(values) == 2 and all(g.any() for g in values)


def test_a_network_without_activation_modules_is_refused():
    with pytest.raises(UserError) as caught, linear_network(nn.Linear(2, 2)):
        pass
    assert caught.value.where == "mask.salience=synflow"


class RMSNorm(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return x * self.weight / x.square().mean(-1, keepdim=True).add(1e-6).sqrt()


@pytest.mark.parametrize("kind", [RMSNorm, nn.LayerNorm])
def test_norms_scale_by_a_constant_factor(kind):
    """The factor of the root mean square times the weight; for a LayerNorm, without its mean and bias."""
    weight = torch.tensor([0.5, 2.0, 1.0, 0.0])
    norm = kind(weight) if kind is RMSNorm else nn.LayerNorm(4)
    with torch.no_grad():
        norm.weight.copy_(weight)
        if kind is nn.LayerNorm:
            norm.bias.fill_(3.0)
    x = torch.tensor([[1.0, 4.0, 2.0, 3.0], [0.0, 1.0, 1.0, 0.0]], requires_grad=True)
    scaled = only_scale(norm, x)
    size = torch.tensor([[7.5], [0.5]]).sqrt()
    assert torch.allclose(scaled, x * weight / size, atol=1e-5)
    (gradient,) = torch.autograd.grad(scaled.sum(), x)
    there = x.detach() != 0  # at an exact zero the factor of an unknown norm cannot be seen
    assert torch.allclose(gradient[there], (weight / size).expand(2, 4)[there], atol=1e-5)
    assert bool(torch.isfinite(gradient).all())
