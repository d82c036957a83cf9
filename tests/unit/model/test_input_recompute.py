"""What adapted linears keep for their backward: nothing that a frozen model does not keep anyway."""

import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from speft_ds.model.kinds.linear import adapt

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
OPT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
IDS = torch.arange(60).view(2, 30)


def make_model(kind: str, dtype: torch.dtype = torch.float32, **config) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**(OPT if kind == "opt" else SIZES), **config})
    return AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False).train()


def layers_of(model: nn.Module) -> dict[str, nn.Linear]:
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {name: linear for name, linear in linears.items() if ".layers." in name}


def saved_bytes(model: nn.Module) -> int:
    """Bytes of the storages that a forward saves for its backward, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=IDS, use_cache=False).logits.float().sum()
    return sum(size for size, _ in found.values())


def frozen_bytes(kind: str, dtype: torch.dtype) -> int:
    model = make_model(kind, dtype)
    model.get_input_embeddings().register_forward_hook(lambda module, x, y: y.requires_grad_(True))
    return saved_bytes(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
def test_nothing_more_is_saved_than_by_a_frozen_model(kind, dtype):
    model = make_model(kind, dtype)
    for linear in layers_of(model).values():
        adapt(linear)
        linear.weight_grad_hook = lambda x, grad_y: None
    small = sum(p.numel() * p.element_size() for p in model.parameters() if p.dim() == 1)
    # The lowest layer's input comes from frozen layers alone: there is nothing to make it from again.
    first_input = 2 * IDS.numel() * SIZES["hidden_size"] * dtype.itemsize
    assert saved_bytes(model) <= frozen_bytes(kind, dtype) + small + first_input


@pytest.mark.parametrize("recomputes", [True, False])
def test_of_an_input_that_is_saved_only_the_columns_are_that_the_hook_needs(recomputes):
    """An input that can be made again is complete, as without columns."""
    seen, saved = {}, []
    for columns in (None, torch.tensor([3, 7])):
        model = make_model("llama")
        for name, linear in layers_of(model).items():
            adapt(linear, recomputes)

            def hook(x, grad_y, name=name):
                seen.setdefault(name, []).append(x)

            hook.columns = columns
            linear.weight_grad_hook = hook
        saved.append(saved_bytes(model))
        model(input_ids=IDS, use_cache=False).logits.sum().backward()
    assert saved[1] < saved[0]
    for name, (complete, cut) in seen.items():
        assert torch.equal(cut, complete if cut.shape == complete.shape else complete[..., [3, 7]]), name
    num_cut = sum(cut.shape[-1] == 2 for _, cut in seen.values())
    assert num_cut == len(seen) if not recomputes else 0 < num_cut < len(seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma", "gemma2", "opt"])
@pytest.mark.parametrize("recomputes", [True, False])
def test_the_input_comes_back_to_the_bit(kind, dtype, recomputes):
    model = make_model(kind, dtype, **({"activation_function": "relu"} if kind == "opt" else {}))
    seen, fed = {}, {}
    for name, linear in layers_of(model).items():
        adapt(linear, recomputes_input=recomputes)
        linear.register_forward_pre_hook(lambda m, x, n=name: seen.update({n: x[0].detach().clone()}))
        linear.weight_grad_hook = lambda x, grad_y, n=name: fed.update({n: x})
    model(input_ids=IDS, use_cache=False).logits.float().square().sum().backward()
    assert seen.keys() == fed.keys() == layers_of(model).keys()
    for name, x in seen.items():
        assert torch.equal(fed[name].view_as(x), x), name
    if kind == "llama" and recomputes:  # made once for all layers that have it
        attention, mlp = "model.layers.1.self_attn.", "model.layers.1.mlp."
        assert fed[attention + "q_proj"] is fed[attention + "k_proj"] is fed[attention + "v_proj"]
        assert fed[mlp + "gate_proj"] is fed[mlp + "up_proj"] is not fed[mlp + "down_proj"]


def test_inputs_behind_dropout_come_back_to_the_bit():
    torch.manual_seed(0)
    linear, seen, fed = nn.Linear(8, 4).requires_grad_(False), [], []
    adapt(linear)
    linear.weight_grad_hook = lambda x, grad_y: fed.append(x)
    x = torch.randn(16, 8, requires_grad=True)
    y = torch.nn.functional.dropout(x * x, 0.5) * 2.0
    seen.append(y.detach().clone())
    linear(y).sum().backward()
    assert torch.equal(fed[0], seen[0])


def test_nothing_is_saved_below_the_lowest_layer_that_is_trained():
    model = make_model("llama")
    everything = frozen_bytes("llama", torch.float32)
    top = [linear for name, linear in layers_of(model).items() if ".layers.2." in name]
    for linear in layers_of(model).values():
        adapt(linear)
    for linear in top:
        linear.weight_grad_hook = lambda x, grad_y: None
    inside = []
    model.model.layers[1].register_forward_hook(lambda m, x, y: inside.append(y.requires_grad))
    assert saved_bytes(model) < 0.55 * everything
    assert inside == [False]
    model(input_ids=IDS, use_cache=False).logits.sum().backward()


def test_no_input_outlives_its_backward():
    model, kept = make_model("llama"), []
    for linear in layers_of(model).values():
        adapt(linear)
        linear.weight_grad_hook = lambda x, grad_y: kept.append(weakref.ref(x))
    loss = model(input_ids=IDS, use_cache=False).logits.sum()
    gc.disable()
    try:
        loss.backward()
        assert len(kept) == 21 and not any(ref() is not None for ref in kept)
    finally:
        gc.enable()


def test_a_graph_with_shared_inputs_is_freed_without_the_collector():
    model = make_model("llama")
    for linear in layers_of(model).values():
        adapt(linear)
        linear.weight_grad_hook = lambda x, grad_y: None
    gc.collect()
    gc.disable()
    try:
        logits = model(input_ids=IDS, use_cache=False).logits
        node = weakref.ref(logits.grad_fn.metadata.setdefault("watched", type("Watched", (), {})()))
        del logits  # its backward never ran
        assert node() is None
    finally:
        gc.enable()
