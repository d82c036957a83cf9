"""What a forward and backward hold for a while: activations and gathered weights, counted without weights.

The model's real code runs on fake tensors, which have shapes and no data: nothing is computed or allocated.
Every storage that an operation makes is counted while it lives. The hooks of ZeRO-3 are marked in the course
of the run, and `gathers.simulate` plays DeepSpeed's coordinator over the marks: which weights are gathered
when, and how often. The whole depth is run, so nothing is extrapolated; forty layers take two seconds.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from speft_ds.model import input_recompute
from speft_ds.model.linear import AdaptedLinear, WeightGradHook, adapt
from speft_ds.plan.gathers import Moment, Trace
from speft_ds.plan.geometry import build_model, linears_of
from speft_ds.sparse.kernels import launch, sampled
from speft_ds.sparse.kernels.dense import BLOCK_ELEMENTS
from speft_ds.sparse.kernels.transpose import SharedTranspose, transpose


@dataclass(frozen=True)
class Pass:
    """One forward and backward.

    Attributes:
        rows, length: of the micro-batch; every row is as long as it may be.
        checkpointing: as `train.activation_checkpointing`.
        collects: what the backward of a target feeds: `entries` (the sparse gradient), `gradient` (the dense
            one, to score by) or `squares` (one dense gradient a row).
        packing: several rows may share a row of the batch.
        walks_all_layers: see `config.recipe.Recipe`.
        density: fraction of a target's entries that are trained.
        backend: the sparse gradient's.
        device: `cuda` or `cpu`, where it is going to run.
        is_shared: more than one rank.
    """

    rows: int
    length: int
    checkpointing: str
    collects: str
    packing: bool
    walks_all_layers: bool
    density: float
    backend: str
    device: str
    is_shared: bool


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages made inside the block, as long as they live.

    Attributes:
        now: bytes alive.
        peak: most bytes alive since it was last set.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, object] = {}

    def ignore(self, tensors: list[Tensor]) -> None:
        """Do not count these, nor views of them."""
        self.known |= {tensor.untyped_storage()._cdata: tensor for tensor in tensors}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
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


@dataclass
class Recorder:
    """Cuts a pass at the places where ZeRO-3 fetches or releases the weights of a module."""

    live: LiveBytes
    moments: list[Moment] = field(default_factory=list)

    def mark(self, kind: str, module: int, is_backward: bool) -> None:
        self.close()
        in_graph = torch._C._current_graph_task_id() != -1
        self.moments.append(Moment(kind, module, is_backward, in_graph and not is_backward, self.live.now))
        self.live.peak = self.live.now

    def close(self) -> None:
        """Note how high the activations went since the last mark."""
        if self.moments:
            self.moments[-1].peak = self.live.peak

    def attach(self, number: int, module: nn.Module) -> None:
        """Mark where DeepSpeed's hooks on this module would act (parameter_offload.py), in their order."""
        remaining = 0  # inputs whose gradient is still to come

        def before_forward(_, inputs):
            nonlocal remaining
            self.mark("fetch", number, False)
            remaining = 0
            return _apply(lambda tensor: _Mark.apply(tensor, count(tensor)), inputs)

        def count(tensor: Tensor) -> Callable[[], None]:
            nonlocal remaining
            remaining += tensor.requires_grad
            return after_backward

        def after_backward() -> None:
            nonlocal remaining
            remaining -= 1
            if remaining == 0:
                self.mark("release", number, True)

        def after_forward(_, inputs, output):
            self.mark("release", number, False)
            return _apply(
                lambda tensor: _Mark.apply(tensor, lambda: self.mark("fetch", number, True)), output
            )

        module.register_forward_pre_hook(before_forward)
        module.register_forward_hook(after_forward)


class _Mark(torch.autograd.Function):
    """Passes a tensor on; its backward calls the action."""

    @staticmethod
    def forward(ctx, tensor, action):
        ctx.action = action
        return tensor.detach()

    @staticmethod
    def backward(ctx, gradient):
        ctx.action()
        return gradient, None


input_recompute.PASSTHROUGH_GRAD_FNS.add("_MarkBackward")


def _apply(function: Callable[[Tensor], Tensor], value):
    """`function` of every tensor in nested lists, tuples and dicts, as DeepSpeed goes through them."""
    if isinstance(value, list | tuple):
        return type(value)(_apply(function, item) for item in value)
    if isinstance(value, dict):
        for key in value:
            value[key] = _apply(function, value[key])
        return value
    return function(value) if isinstance(value, Tensor) else value


def dry_run(config, task: str, dtype: str, targets: list[str], one: Pass, fake: bool = True) -> Trace:
    """One pass of a model on fake tensors.

    Args:
        config: of `transformers`.
        task, dtype: as in a recipe's `model` section.
        targets: names of the weights that may be trained.
        fake: False for real tensors, with all their memory, to check the count by.
    """
    from speft_ds.zero.engine import require_grad  # late: it imports DeepSpeed

    with FakeTensorMode() if fake else nullcontext(), _packed(one.packing):
        model = build_model(config, task, dtype).requires_grad_(False)
        _prepare(model, set(targets), one)
        live = LiveBytes()
        live.ignore([*model.parameters(), *model.buffers()])
        recorder = Recorder(live)
        modules = list(model.modules())
        for number, module in enumerate(modules):
            recorder.attach(number, module)
        if one.walks_all_layers:  # after the marks, as the engine does it after DeepSpeed's hooks
            model.get_input_embeddings().register_forward_hook(require_grad)
        ids = torch.zeros(one.rows, one.length, dtype=torch.int64)
        with live:
            (_loss(model, task, ids) / one.rows).backward()
        recorder.close()
        return _trace(model, modules, recorder.moments)


@contextmanager
def _packed(packing: bool) -> Iterator[None]:
    """Say whether rows are packed: transformers reads it from positions, and fake ones have no values."""
    from transformers import masking_utils

    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = original if packing else lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


def _trace(model: nn.Module, modules: list[nn.Module], moments: list[Moment]) -> Trace:
    numbers = {id(parameter): number for number, parameter in enumerate(model.parameters())}
    owned = {
        number: [numbers[id(p)] for p in module.parameters(recurse=False)]
        for number, module in enumerate(modules)
    }
    return Trace([name for name, _ in model.named_parameters()], owned, moments)


def _prepare(model: nn.Module, targets: set[str], one: Pass) -> None:
    """Bring the model into the state in which the engine runs it."""
    model.train(one.collects == "entries" or one.checkpointing != "none")
    if one.checkpointing != "none":
        with warnings.catch_warnings():  # of its new name, which older transformers do not have
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": one.checkpointing == "reentrant"})
    for name, linear in linears_of(model).items():
        adapt(linear, recomputes_input=one.checkpointing == "none" and f"{name}.weight" in targets)
        if f"{name}.weight" in targets:
            linear.weight_grad_hook = _sink(one, linear)
        else:
            linear.__class__ = _Zero3Linear


class _Zero3Linear(AdaptedLinear):
    """DeepSpeed's own, which saves its input, needed or not (`zero3_linear_wrap`), if any gradient passes."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight_grad_hook = (lambda x, grad_y: None) if x.requires_grad else None
        return super().forward(x)


def _sink(one: Pass, linear: nn.Linear) -> WeightGradHook:
    """Holds for a moment what the real sink of a target holds."""
    rows, columns = linear.weight.shape
    if one.collects == "entries":
        num_entries = round(one.density * rows * columns)
        if one.backend == "sampled":
            return lambda x, grad_y: _hold_sampled(x, grad_y, num_entries)
        if one.backend == "element":
            return lambda x, grad_y: _hold_element(x, grad_y, num_entries)
        return lambda x, grad_y: _hold_blocks(
            x.reshape(-1, columns), grad_y.reshape(-1, rows), num_entries, one.device == "cpu"
        )
    return lambda x, grad_y: _hold_dense(
        x.reshape(-1, columns), grad_y.reshape(-1, rows), one.device, one.is_shared, one.collects == "squares"
    )


def _hold_sampled(x: Tensor, grad_y: Tensor, num_entries: int) -> None:
    """kernels/sampled.py: transposed fp32 copies, that of x shared and whole; the pattern, copied; sums."""
    parts = sampled.split_tokens(grad_y, x.shape[-1])
    _ = (
        sampled.shared_transpose(x),
        sampled.transpose_fp32(parts[0]),
        torch.empty(num_entries, 2, dtype=torch.int32),
        torch.empty(min(len(parts), 2) - 1, num_entries),
    )


_transposed = SharedTranspose(transpose)


def _hold_element(x: Tensor, grad_y: Tensor, num_entries: int) -> None:
    """kernels/element.py: a transposed copy of x, shared; sums of each split of the tokens; the values."""
    tokens = grad_y.numel() // grad_y.shape[-1]
    splits, _ = launch.split_tokens(tokens, x.shape[-1], x.dtype.itemsize, num_entries)
    _ = (_transposed(x), torch.empty(splits, num_entries), torch.empty(num_entries))


def _hold_blocks(x: Tensor, grad_y: Tensor, num_entries: int, on_cpu: bool) -> None:
    """kernels/dense.py: the values, and the dense gradient of a block of rows."""
    columns = x.shape[1]
    block = min(max(1, BLOCK_ELEMENTS // columns), grad_y.shape[1])
    copies = (grad_y[:, :block].float(), x.float()) if on_cpu else ()
    _ = (copies, torch.empty(num_entries), torch.empty(block, columns))


def _hold_dense(x: Tensor, grad_y: Tensor, device: str, is_shared: bool, squares: bool) -> None:
    """calibration.py: the dense gradient of a layer, and what the other ranks send of theirs."""
    wide = squares or device == "cuda"
    dense = torch.empty(grad_y.shape[1], x.shape[1], dtype=torch.float32 if wide else x.dtype)
    if squares:
        sample = torch.empty_like(dense, dtype=torch.float32 if device == "cuda" else x.dtype)
        _ = sample.float()
        del sample, _
    if is_shared:
        _ = torch.empty_like(dense)


def _loss(model: nn.Module, task: str, ids: Tensor) -> Tensor:
    """The objective's loss where every token but a row's first is learnt, or of one class a row."""
    if task != "causal_lm":
        logits = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits.float(), ids[:, 0], reduction="sum")
    logits = model(input_ids=ids, use_cache=False).logits
    # `batch.summed_loss` picks by a bool mask, whose count a fake tensor does not know: the same by numbers.
    rows, length = ids.shape
    picked = ids.new_zeros(rows * (length - 1))
    scaled = logits[:, :-1][picked, picked].float() / 1.0
    return F.cross_entropy(scaled, picked, reduction="sum")
