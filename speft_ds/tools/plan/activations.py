"""Activation memory of one forward and backward, from a run of the model on fake tensors.

Fake tensors have shapes and no data, so nothing is computed or allocated: the model's own code runs through
its full depth, forty layers in two seconds. Every storage that an operation makes counts while it lives. What
the kernels of the weight gradients need for a moment is added by formula.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from speft_ds.model.attention import reads_packing
from speft_ds.model.codecs import base, codec
from speft_ds.model.fake_tensors import fake_tensors
from speft_ds.model.kinds import linear
from speft_ds.model.kinds.parameter import ParameterTarget
from speft_ds.model.linear_cross_entropy import HeadLoss, LogitTransform
from speft_ds.model.stash import Stash
from speft_ds.model.targets import all_weights, find_whole
from speft_ds.sparse.kernels import triton_backends
from speft_ds.sparse.kernels.torch_backends import BLOCK_ELEMENTS, samples_columns, split_for_cache
from speft_ds.tools.plan.gathered_weights import BACKWARD, FORWARD, RECOMPUTE, ModuleUse
from speft_ds.tools.plan.geometry import Geometry, build_model

aten = torch.ops.aten
# Attention on a CPU, which torch's table of formulas lacks -> what multiplies alike.
SAME_PRODUCTS = {
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        aten._scaled_dot_product_flash_attention_backward
    ),
}


@dataclass(frozen=True)
class Pass:
    """One forward and backward: all that its activations depend on, besides the geometry."""

    rows: int
    length: int  # tokens of every row
    collects: str  # by the backward of a target: `entries`, `gradient` (dense), `squares` (dense, per row)
    checkpointing: str
    packing: bool
    walks_all_layers: bool
    backend: str  # of the sparse gradient
    device: str  # `cuda` or `cpu`, where it is going to run
    is_partitioned: bool  # weights are gathered and freed
    compute: float = 1.0  # share of the columns that have entries
    stash: str | None = None  # format of the activations that are kept for the backward


@dataclass
class PassRun:
    """What a pass comes to.

    Attributes:
        uses: of the modules, in order of time.
        multiply_adds: of matrix products and attention: forward, recomputation, gradients of inputs.
        of_dense_gradient: those that the dense gradient of all targeted weights would add.
    """

    uses: list[ModuleUse]
    multiply_adds: int
    of_dense_gradient: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages made inside the block, as long as they live, and multiply-adds.

    Attributes:
        now: bytes alive.
        peak: most bytes alive since it was last set.
        multiply_adds, of_dense_gradient: see `PassRun`; who knows of the latter adds them.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.multiply_adds = self.of_dense_gradient = 0
        self.known: dict[int, object] = {}

    def ignore(self, tensors: list[Tensor]) -> None:
        """Do not count these, nor views of them."""
        self.known |= {tensor.untyped_storage()._cdata: tensor for tensor in tensors}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        self.multiply_adds += count_multiply_adds(function, args, kwargs or {}, result)
        return result

    def _count(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known[key] = weakref.finalize(storage, self._forget, key, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> None:
        self.now -= size
        del self.known[key]


def count_multiply_adds(function, args: tuple, kwargs: dict, result) -> int:
    """Multiply-adds of an operator of torch, where it is a matrix product, a convolution or attention."""
    operator = function.overloadpacket
    if operator is aten._grouped_mm:  # each row is multiplied by its group's matrix
        return result.numel() * args[0].shape[-1]
    formula = flop_registry.get(SAME_PRODUCTS.get(operator, operator))
    return 0 if formula is None else formula(*args, **kwargs, out_val=result) // 2


class SizesOnly:
    """A codec's results in size and type, and what it needs for a moment; nothing is computed.

    The tables that codecs keep are real tensors, with which fake ones do not go together.
    """

    def __init__(self, name: str, device: str):
        self.name, self.codec = name, codec(name)
        self.chunk = base.CHUNK if device == "cpu" else base.DEVICE_CHUNK

    def encode(self, weight: Tensor, check: bool = True) -> tuple[Tensor, Tensor]:
        num_bytes, num_scales = self.codec.sizes(weight.shape)
        packed = weight.new_empty(num_bytes, dtype=torch.uint8)
        scales = weight.new_empty(num_scales, dtype=self.codec.scale_dtype)
        weight.new_empty(3 * min(self.chunk, weight.numel()), dtype=torch.float32)
        return packed, scales

    def decode(self, packed: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        weight = packed.new_empty(shape, dtype=dtype)
        packed.new_empty(2 * min(self.chunk, weight.numel()), dtype=torch.float32)
        return weight


@lru_cache(maxsize=64)
def run_pass(geometry: Geometry, one: Pass, fake: bool = True) -> PassRun:
    """One forward and backward of a model: every use of a module in order, with the activations beside it.

    Args:
        fake: False for real tensors, with all their memory, to check the count by.
    """
    with fake_tensors(one.packing) if fake else reads_packing(one.packing):
        model = build_model(geometry.config, geometry.task, geometry.dtype).requires_grad_(False)
        live = LiveBytes()
        live.ignore([*model.parameters(), *model.buffers()])
        _prepare(model, geometry, one, live)
        uses = _record_uses(model, live)
        if one.walks_all_layers:  # after the hooks, as the engine does it after DeepSpeed's
            model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_(True))
        packing = nullcontext()
        if one.stash is not None:
            packing = Stash(model, SizesOnly(one.stash, one.device)).packing(one.rows * one.length)
        ids = torch.zeros(one.rows, one.length, dtype=torch.int64)
        with live:
            with packing:
                loss = _loss(model, geometry.task, ids, one.device) / one.rows
            loss.backward()
        uses[-1].peak = live.peak
    return PassRun(uses, live.multiply_adds, live.of_dense_gradient)


def _record_uses(model: nn.Module, live: LiveBytes) -> list[ModuleUse]:
    """A list that fills while the model runs, at the places where ZeRO-3 gathers and releases weights."""
    uses: list[ModuleUse] = []
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    module_names = {module: name for name, module in model.named_modules()}
    waits_for: Counter[nn.Module] = Counter()  # module -> gradients of its inputs that end its backward

    def begin(kind: str, module: nn.Module) -> None:
        if uses:
            uses[-1].peak = live.peak
        live.peak = live.now
        weights = tuple(names[id(p)] for p in module.parameters(recurse=False))
        uses.append(ModuleUse(kind, module_names[module], weights, live.now))

    def end(kind: str, module: nn.Module) -> None:
        uses[-1].ended.append((kind, module_names[module]))

    def before_forward(module: nn.Module, inputs: tuple) -> tuple:
        begin(forward_kind(), module)
        waits_for[module] = 0
        return tree_map(lambda leaf: followed(leaf, module), inputs)

    def followed(leaf: object, module: nn.Module) -> object:
        """An alias of an input: the gradient of this use of it alone."""
        if not (torch.is_grad_enabled() and isinstance(leaf, Tensor) and leaf.requires_grad):
            return leaf
        alias = aten.alias(leaf)
        waits_for[module] += 1
        alias.register_hook(lambda _: after_backward(module))
        return alias

    def after_forward(module: nn.Module, _inputs, output) -> None:
        end(forward_kind(), module)
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not tensors:
            return
        if not hasattr(tensors[0], "made_by"):
            tensors[0].made_by = made_by = []  # nested modules with one output, the outermost first
            tensors[0].register_hook(lambda _: before_backward(made_by))
        tensors[0].made_by.insert(0, module)

    def before_backward(made_by: list[nn.Module]) -> None:
        for module in made_by:
            begin(BACKWARD, module)

    def after_backward(module: nn.Module) -> None:
        waits_for[module] -= 1
        if waits_for[module] == 0:
            end(BACKWARD, module)

    for module in model.modules():
        module.register_forward_pre_hook(before_forward)
        module.register_forward_hook(after_forward)
    return uses


def forward_kind() -> str:
    """Of a forward that runs now."""
    return FORWARD if torch._C._current_graph_task_id() == -1 else RECOMPUTE


def _prepare(model: nn.Module, geometry: Geometry, one: Pass, live: LiveBytes) -> None:
    """Bring the model into the state in which the engine runs it."""
    model.train(one.collects == "entries" or one.checkpointing != "none")
    if one.checkpointing != "none":
        with warnings.catch_warnings():  # of its new name, which older transformers do not have
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": one.checkpointing == "reentrant"})
    for name, target in all_weights(model).items():
        target.adapt(recomputes_input=one.checkpointing == "none")
        if name in geometry.targets:
            target.weight_grad_hook = _temporaries_hook(geometry.density, target.shape[1], one, live)
        elif name.replace(".weight", ".lora_A.default.weight") in geometry.whole:
            target.weight_grad_hook = lambda *factors: None  # A has the same input
    if one.collects != "entries":
        return
    for name, target in find_whole(model, None).items():
        if name in geometry.whole:
            is_product = not isinstance(target, ParameterTarget)
            width = target.shape[1]
            target.weight_grad_hook = _whole_hook(width, one, live) if is_product else lambda gradient: None


def _temporaries_hook(
    density: float, width: int, one: Pass, live: LiveBytes
) -> Callable[[Tensor, Tensor], None]:
    """Counts what the real hook of a target of this width allocates while it runs."""

    def count(x: Tensor, grad_y: Tensor, ends: Tensor | None = None) -> None:
        numel, num_experts = grad_y.shape[-1] * width, 1 if ends is None else len(ends)
        live.of_dense_gradient += grad_y.numel() * width
        num_entries = round(density * numel)
        if one.collects != "entries":
            num_bytes = _dense_bytes(numel * num_experts, x.dtype.itemsize, one)
        elif ends is None:
            num_bytes = _kernel_bytes(x, grad_y, num_entries, one)
        else:  # one expert after the other, with its share of the tokens
            share = -(-x.shape[0] // num_experts)
            num_bytes = _kernel_bytes(x[:share], grad_y[:share], num_entries, one)
            num_bytes += 4 * num_entries * num_experts
        live.peak = max(live.peak, live.now + num_bytes)

    if one.collects == "entries" and one.backend == "columns":
        count.columns = torch.arange(max(1, round(one.compute * width)))
    return count


def _whole_hook(width: int, one: Pass, live: LiveBytes) -> Callable[..., None]:
    """The same of a weight that is trained whole: its dense gradient in fp32."""

    def count(x: Tensor, grad_y: Tensor, ends: Tensor | None = None) -> None:
        live.of_dense_gradient += grad_y.numel() * width
        num_experts = 1 if ends is None else len(ends)
        copies = 4 * (x.numel() + grad_y.numel()) if one.device == "cpu" and x.dtype.itemsize < 4 else 0
        num_bytes = 4 * grad_y.shape[-1] * width * num_experts + copies
        live.peak = max(live.peak, live.now + num_bytes)

    return count


def _kernel_bytes(x: Tensor, grad_y: Tensor, num_entries: int, one: Pass) -> int:
    """What a sparse gradient allocates (kernels/): transposed or fp32 copies, sums, the values."""
    rows, columns = grad_y.shape[-1], x.shape[-1]  # of x those that were saved
    tokens = x.numel() // columns
    in_columns = one.backend == "columns" and samples_columns(num_entries, rows * columns, one.device)
    if one.backend == "sampled" or in_columns:
        # The fp32 copy of x is complete; the pattern is copied with its sums.
        part = split_for_cache(grad_y, columns)[0].shape[0]
        return 4 * (x.numel() + part * rows) + 8 * num_entries + 4 * num_entries * (part < tokens)
    if one.backend == "element":
        splits, _ = triton_backends.split_tokens(tokens, columns, x.dtype.itemsize, num_entries)
        return x.nbytes + 4 * (splits + 1) * num_entries
    block = min(max(1, BLOCK_ELEMENTS[one.device] // columns), rows)
    copies = tokens * (block + columns) if one.device == "cpu" else 0
    return 4 * (copies + num_entries + block * columns)


def _dense_bytes(numel: int, itemsize: int, one: Pass) -> int:
    """What scoring allocates (calibration.py): a dense gradient, and what other ranks send of theirs."""
    on_cpu, squares = one.device == "cpu", one.collects == "squares"
    dense = numel * (itemsize if on_cpu and not squares else 4)
    of_a_row = numel * (itemsize + 4 if on_cpu and itemsize < 4 else 4) if squares else 0
    return dense + max(of_a_row, dense * one.is_partitioned)


def _loss(model: nn.Module, task: str, ids: Tensor, device: str) -> Tensor:
    """The objective's loss where every token but a row's first is a label, or each row has a class."""
    if task != "causal_lm":
        logits = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits.float(), ids[:, 0], reduction="sum")
    # By numbers: a fake tensor does not know how many a bool mask picks.
    rows, length = ids.shape
    picked = ids.new_zeros(rows * (length - 1))
    head = model.get_output_embeddings()
    if head is not None and linear.find(head):  # nor what the model makes of its head's logits
        ours = HeadLoss(head, LogitTransform(), device)
        if not ours.has_hook:
            with ours.compute(picked, picked, 1.0) as losses:
                model(input_ids=ids, use_cache=False)
            return losses[0]
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1][picked, picked].float(), picked, reduction="sum")
