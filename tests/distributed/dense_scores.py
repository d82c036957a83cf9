"""Dense, single-process references for the scores: a Llama written out in fp64, and ordinary autograd.

Rows are taken one at a time, without padding. Nothing here comes from the modules under test.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, silu

from speft_ds.data.dataset import Row

Weights = dict[str, Tensor]


class Llama:
    """A checkpoint's weights in fp64, with the forward pass written out.

    Args:
        model: a Llama, as transformers loads it.
        targets: names of the weights that are scored.
    """

    def __init__(self, model, targets: list[str]):
        self.config = model.config
        self.weights = {name: weight.detach().double() for name, weight in model.named_parameters()}
        self.targets = {name: self.weights[name].requires_grad_() for name in targets}

    def logits(self, hidden: Tensor, weights: Weights, linear: bool = False) -> Tensor:
        """[tokens, hidden] embeddings -> [tokens, vocabulary].

        Args:
            linear: activations pass their input on, the norms' factors are constants. For one token, whose
                attention passes v on, which is written so here.
        """
        config, num_tokens = self.config, len(hidden)
        num_heads, width = config.num_attention_heads, config.head_dim
        exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
        frequency = config.rope_parameters["rope_theta"] ** -exponents
        angle = torch.outer(torch.arange(num_tokens, dtype=torch.float64), frequency).repeat(1, 2)
        causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()

        def norm(name: str, x: Tensor) -> Tensor:
            factor = (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()
            return x * weights[f"{name}.weight"] * (factor.detach() if linear else factor)

        def project(name: str, x: Tensor) -> Tensor:
            return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

        def heads(x: Tensor) -> Tensor:
            """[tokens, n * width] -> [all heads, tokens, width]; n heads stand for as many each."""
            x = x.view(num_tokens, -1, width).transpose(0, 1)
            return x.repeat_interleave(num_heads // len(x), 0)

        def rotate(x: Tensor) -> Tensor:
            one, two = x.chunk(2, -1)
            return x * angle.cos() + torch.cat([-two, one], -1) * angle.sin()

        for layer in range(config.num_hidden_layers):
            attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
            x = norm(f"model.layers.{layer}.input_layernorm", hidden)
            q, k, v = (heads(project(f"{attention}.{part}_proj", x)) for part in "qkv")
            if linear:
                mixed = v
            else:
                affinity = rotate(q) @ rotate(k).mT / math.sqrt(width)
                mixed = affinity.masked_fill(~causal, -math.inf).softmax(-1) @ v
            hidden = hidden + project(f"{attention}.o_proj", mixed.transpose(0, 1).flatten(1))
            x = norm(f"model.layers.{layer}.post_attention_layernorm", hidden)
            gate, up = project(f"{mlp}.gate_proj", x), project(f"{mlp}.up_proj", x)
            hidden = hidden + project(f"{mlp}.down_proj", (gate if linear else silu(gate)) * up)
        head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        return norm("model.norm", hidden) @ weights[head].T

    def losses(self, row: Row, temperature: float = 1.0) -> Tensor:
        """[labels] cross-entropies of one row; the logits are divided by the temperature."""
        ids = torch.tensor(row.ids)
        logits = self.logits(self.weights["model.embed_tokens.weight"][ids], self.weights) / temperature
        first = row.loss_mask.index(True)  # up to the end
        return cross_entropy(logits[first - 1 : -1], ids[first:], reduction="none")

    def gradient(self, rows: list[Row], temperature: float = 1.0, create_graph: bool = False) -> Weights:
        """Of the mean token loss over all rows together."""
        loss = torch.cat([self.losses(row, temperature) for row in rows]).mean()
        return self.differentiate(loss, create_graph)

    def differentiate(self, value: Tensor, create_graph: bool = False) -> Weights:
        gradients = torch.autograd.grad(value, list(self.targets.values()), create_graph=create_graph)
        return dict(zip(self.targets, gradients, strict=True))


def fisher(llama: Llama, rows: list[Row]) -> Weights:
    """The mean over rows of the squared gradient of each row's own mean token loss."""
    gradients = [llama.gradient([row]) for row in rows]
    return {name: torch.stack([g[name].square() for g in gradients]).mean(0) for name in llama.targets}


def grasp(llama: Llama, rows: list[Row]) -> Weights:
    """w * (H g) at temperature 200 by double backward: H g is the gradient of g . constant(g)."""
    gradients = llama.gradient(rows, 200.0, create_graph=True)
    product = llama.differentiate(sum((g * g.detach()).sum() for g in gradients.values()))
    return {name: weight.detach() * product[name] for name, weight in llama.targets.items()}


def synflow(llama: Llama, rows: list[Row]) -> Weights:
    """abs(w * dR/dw), R the sum of the logits of one token of ones in the linear network of abs(w)."""
    absolute = {name: weight.detach().abs() for name, weight in llama.weights.items()}
    absolute |= {name: absolute[name].requires_grad_() for name in llama.targets}
    ones = torch.ones(1, llama.config.hidden_size, dtype=torch.float64)
    total = llama.logits(ones, absolute, linear=True).sum()
    scored = [absolute[name] for name in llama.targets]
    flows = torch.autograd.grad(total, scored, allow_unused=True)  # no use is made of queries and keys
    return {
        name: torch.zeros_like(weight) if flow is None else weight.detach() * flow
        for name, weight, flow in zip(llama.targets, scored, flows, strict=True)
    }


def lift(llama: Llama, rank: int) -> Weights:
    """Absolute values of each weight with all singular values but the `rank` largest set to zero."""
    scores = {}
    for name, weight in llama.targets.items():
        left, values, right = torch.linalg.svd(weight.detach(), full_matrices=False)
        values[rank:] = 0
        scores[name] = (left * values @ right).abs()
    return scores
