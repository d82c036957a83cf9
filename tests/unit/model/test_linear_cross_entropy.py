"""The loss at the head against that of the model's own logits."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from speft_ds.data.collate import IGNORED, collate
from speft_ds.data.dataset import Row
from speft_ds.model import linear_cross_entropy
from speft_ds.model.kinds import parameter
from speft_ds.model.kinds.parameter import ParameterTarget
from speft_ds.model.linear_cross_entropy import LogitTransform, find_head_loss
from speft_ds.model.loss import NextToken
from unit.data.test_collate import CPU, ROWS

SIZES = dict(
    vocab_size=97,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
)
# Family -> its own configuration, and what it does to logits.
FAMILIES = {
    "Llama": (dict(tie_word_embeddings=False), LogitTransform()),
    "Qwen2": (dict(tie_word_embeddings=True), LogitTransform()),
    "Gemma2": (dict(final_logit_softcapping=3.0), LogitTransform(cap=3.0)),
    "Granite": (dict(logits_scaling=7.0), LogitTransform(scale=1 / 7)),
    "Cohere": (dict(logit_scale=0.0625), LogitTransform(scale=0.0625)),
    "OPT": (dict(ffn_dim=40, word_embed_proj_dim=24, dropout=0.0), LogitTransform()),
    "Phi": (dict(resid_pdrop=0.0), LogitTransform()),  # its head has a bias
}


def make_model(family, **sizes):
    import transformers

    torch.manual_seed(0)
    own = FAMILIES[family][0] | sizes
    config = getattr(transformers, f"{family}Config")(**SIZES | own, pad_token_id=0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model.requires_grad_(False).eval()


def loss_of_logits(model, batch, temperature=1.0):
    """Of all logits, summed over the labels."""
    logits, labels = model(batch["input_ids"]).logits[:, :-1] / temperature, batch["labels"][:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def embedded_loss(model, compute):
    """The loss that `compute` comes to, and its gradient by the embedded tokens."""
    embedded = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda *call: embedded.append(call[-1].requires_grad_(True))
    )
    loss = compute()
    handle.remove()
    return loss, torch.autograd.grad(loss, embedded[-1])[0]


@pytest.mark.parametrize("chunk", [1, 3, 100])  # label tokens at a time: of 12 or more
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_are_those_of_the_logits(family, chunk, monkeypatch):
    monkeypatch.setitem(linear_cross_entropy.CHUNK_BYTES, "cpu", 4 * 97 * chunk)
    model = make_model(family)
    batch = collate(ROWS, 0, CPU)
    objective = NextToken(model, packing=False, head_loss=find_head_loss(model))
    assert objective.head_loss is not None
    for temperature in (1.0, 1.7):
        ours, gradient = embedded_loss(model, lambda t=temperature: objective(model, batch, t)[0])
        logits, expected = embedded_loss(model, lambda t=temperature: loss_of_logits(model, batch, t))
        torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_model_does_to_its_logits_is_found(family):
    found, expected = find_head_loss(make_model(family)).transform, FAMILIES[family][1]
    assert found.scale == pytest.approx(expected.scale, rel=1e-6) and found.cap == expected.cap


def test_a_model_that_changes_its_logits_otherwise_computes_them_all():
    model = make_model("Llama")
    plain = model.forward

    def forward(**inputs):
        outputs = plain(**inputs)
        outputs.logits[..., 5] = -1e9  # a token that must not be said
        return outputs

    model.forward = forward
    assert find_head_loss(model) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_that_is_trained_gets_its_gradient(family, monkeypatch):
    monkeypatch.setitem(linear_cross_entropy.CHUNK_BYTES, "cpu", 4 * 97 * 3)
    model = make_model(family)
    objective = NextToken(model, packing=False, head_loss=find_head_loss(model))
    weight, batch = model.lm_head.weight.requires_grad_(True), collate(ROWS, 0, CPU)
    expected = torch.autograd.grad(loss_of_logits(model, batch, 1.7), weight)[0]
    (gradient,) = torch.autograd.grad(objective(model, batch, 1.7)[0], weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    # The same by the hook that a whole weight has; where it is tied, by two calls.
    seen = []
    target = ParameterTarget(model.lm_head, "weight", parameter)
    target.weight_grad_hook = seen.append
    objective(model, batch, 1.7)[0].backward()
    torch.testing.assert_close(sum(seen), expected, rtol=1e-4, atol=1e-5)
    assert len(seen) == (2 if model.config.tie_word_embeddings else 1) and weight.grad is None


def test_a_batch_without_labels_has_a_loss_of_zero_and_a_gradient():
    model = make_model("Llama")
    rows = [Row([1, 2, 3], [False] * 3)]
    loss, gradient = embedded_loss(
        model,
        lambda: NextToken(model, packing=False, head_loss=find_head_loss(model))(
            model, collate(rows, 0, CPU)
        )[0],
    )
    assert loss.item() == 0 and not gradient.any()


class Sizes(TorchDispatchMode):
    """The largest tensor that an operation makes; views of the head's weight are none."""

    def __init__(self, head):
        super().__init__()
        self.weight, self.largest = head.weight.data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.data_ptr() != self.weight:
            self.largest = max(self.largest, result.numel())
        return result


def test_no_tensor_has_the_logits_of_more_than_a_chunk(monkeypatch):
    monkeypatch.setitem(linear_cross_entropy.CHUNK_BYTES, "cpu", 4 * 5000 * 2)
    model = make_model("Llama", vocab_size=5000)
    objective = NextToken(model, packing=False, head_loss=find_head_loss(model))
    rows = [Row(list(range(1, 41)), [False] * 2 + [True] * 38)]
    batch = collate(rows, 0, CPU)
    with Sizes(model.lm_head) as sizes:
        embedded_loss(model, lambda: objective(model, batch)[0])
    assert sizes.largest == 5000 * 2
