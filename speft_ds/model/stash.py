"""What autograd saves for the backward, kept in few bits until it is needed: a low-bit stash.

The forward is as ever, to the bit; the backward works with what the codes stand for. Both gradients follow:
that of an activation, and that of a weight, whose inputs are taken from the stash or made again from it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from speft_ds.model.codecs import Codec
from speft_ds.model.input_recompute import keep_norms
from speft_ds.zero.shards import full_shape

MIN_HIDDEN_SHARE = 1 / 8  # of the elements of the hidden states; a smaller tensor is left as it is
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class SavedBytes:
    """What a forward saves for its backward, each storage once, without weights.

    Attributes:
        activations: bytes of what is packed, before it is. packed: after. others: of what is left as it is.
    """

    activations: int = 0
    packed: int = 0
    others: int = 0


class Stash:
    """Packs the activations that a model's forward saves.

    An activation is a tensor that needs a gradient and is no parameter: masks, positions and the normalizers
    of attention need none. Left as they are, too, are a few numbers per token, as a norm's; what is saved
    from the head on: logits and the loss's own gradient; and queries and keys of fused attention. Its
    backward makes probabilities again, exp(query @ key - normalizer): of other ones than the normalizer is
    of, they come out many times too large.

    Under activation checkpointing a forward saves the inputs of layers alone; what their recomputation saves
    in the backward is not packed.

    A block with an infinite or NaN value comes back as NaN throughout: the gradient shows it, and the step is
    skipped. Nothing is read from the device.

    Args:
        model: sharded, it is in its engine.
        codec: may be replaced between two forwards.
    Attributes:
        saved: by the last forward.
    """

    def __init__(self, model: nn.Module, codec: Codec):
        self.codec, self.saved = codec, SavedBytes()
        self.width = full_shape(model.get_input_embeddings().weight)[-1]
        self.min_numel = 0
        self.before_head = False
        self.sources: dict[int, _Source] = {}  # by the address of the storage
        self.attention = getattr(model.config, "_attn_implementation", None)
        keep_norms(model)
        if (head := model.get_output_embeddings()) is not None:
            head.register_forward_pre_hook(self._reach_head)

    @contextmanager
    def packing(self, num_tokens: int) -> Iterator[None]:
        """Pack what one forward inside the block saves.

        Args:
            num_tokens: of the batch, padding included.
        """
        self.saved, self.before_head = SavedBytes(), True
        self.min_numel = num_tokens * self.width * MIN_HIDDEN_SHARE
        try:
            with saved_tensors_hooks(self._pack, _unpack), self._keeping_queries_and_keys():
                yield
        finally:
            self.sources.clear()

    @contextmanager
    def _keeping_queries_and_keys(self) -> Iterator[None]:
        """Leave as they are what torch's fused attention, or one that transformers knows, compares."""
        name = self.attention
        attend = None if name == "sdpa" else ALL_ATTENTION_FUNCTIONS.get(name)  # eager is none of them
        if attend is not None:

            def watched(module: nn.Module, query: Tensor, key: Tensor, *args, **kwargs):
                self._keep(query, key)
                return attend(module, query, key, *args, **kwargs)

            ALL_ATTENTION_FUNCTIONS[name] = watched
        try:
            with _FusedAttention(self._keep):
                yield
        finally:
            if attend is not None:
                ALL_ATTENTION_FUNCTIONS[name] = attend

    def _keep(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            self._source_of(tensor).is_kept = True

    def _reach_head(self, head: nn.Module, inputs: tuple) -> None:
        self.before_head = False

    def _pack(self, tensor: Tensor) -> Tensor | _View:
        if isinstance(tensor, nn.Parameter):  # itself: ZeRO-3 frees its data until its backward
            return tensor
        if tensor.layout != torch.strided or isinstance(tensor._base, nn.Parameter):
            return tensor.detach()
        source = self._source_of(tensor)
        if source.is_kept or not self._is_activation(tensor):
            self.saved.others += source.count_once("others")
            return tensor.detach()
        self.saved.activations += source.count_once("activations")
        return self._packed_once(tensor, source)

    def _is_activation(self, tensor: Tensor) -> bool:
        return (
            self.before_head
            and tensor.requires_grad
            and tensor.dtype in DTYPES
            and tensor.numel() >= max(self.min_numel, 1)
            and all(stride or size == 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        )

    def _source_of(self, tensor: Tensor) -> _Source:
        """What is known of the storage of a tensor; it may have the address of one that was freed."""
        storage = tensor.untyped_storage()
        source = self.sources.get(storage._cdata)
        if source is None or source.storage() is None:
            source = self.sources[storage._cdata] = _Source(weakref.ref(storage), storage.nbytes())
        return source

    def _packed_once(self, tensor: Tensor, source: _Source) -> _View:
        """The same codes for all operations that save these values, whatever shape they see them in."""
        # As it lies in memory, so that it comes back with the same strides.
        sizes = list(zip(tensor.shape, tensor.stride(), strict=True))
        order = sorted(range(tensor.dim()), key=lambda dim: (sizes[dim][0] > 1, -sizes[dim][1]))
        in_memory = tensor.detach().permute(order)
        layout = tensor.numel() if in_memory.is_contiguous() else tuple(sizes)
        key = (tensor.dtype, tensor.storage_offset(), layout, tensor._version)
        packed = source.packed.get(key)
        if packed is None:
            packed = source.packed[key] = _Packed(self.codec, in_memory)
            self.saved.packed += packed.num_bytes
        return _View(packed, in_memory.shape, [order.index(dim) for dim in range(tensor.dim())])


@dataclass
class _Source:
    """A storage of which something is saved in the forward that runs.

    Attributes:
        is_kept: whether it is left as it is.
        packed: what is packed of it, for as long as an operation has it saved.
    """

    storage: weakref.ref
    num_bytes: int
    is_kept: bool = False
    packed: weakref.WeakValueDictionary = field(default_factory=weakref.WeakValueDictionary)
    counted: set[str] = field(default_factory=set)

    def count_once(self, what: str) -> int:
        """Its bytes, the first time that it is asked for them."""
        is_new = what not in self.counted
        self.counted.add(what)
        return self.num_bytes if is_new else 0


class _FusedAttention(TorchFunctionMode):
    """Tells a function of the queries and keys of every call of torch's fused attention."""

    def __init__(self, tell: Callable[[Tensor, Tensor], None]):
        super().__init__()
        self.tell = tell

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.nn.functional.scaled_dot_product_attention:
            names = ("query", "key")
            self.tell(*(args[n] if n < len(args) else kwargs[name] for n, name in enumerate(names)))
        return function(*args, **kwargs)


class _Packed:
    """Values in few bits, unpacked once, and then kept until the last operation is done with them."""

    def __init__(self, codec: Codec, values: Tensor):
        self.codec, self.dtype = codec, values.dtype
        rows = values.reshape(-1, values.shape[-1] if values.dim() else 1)
        self.shape = tuple(rows.shape)
        self.codes: tuple[Tensor, Tensor] | None = codec.encode(rows, check=False)
        self.num_bytes = sum(part.nbytes for part in self.codes)
        self.values: Tensor | None = None

    def decode(self) -> Tensor:
        if self.values is None:
            self.values = self.codec.decode(*self.codes, self.shape, self.dtype)
            self.codes = None
        return self.values


@dataclass(frozen=True)
class _View:
    """Packed values as one operation saved them: of a shape as they lie in memory, then permuted."""

    packed: _Packed
    shape: torch.Size
    order: list[int]

    def unpack(self) -> Tensor:
        return self.packed.decode().view(self.shape).permute(self.order)


def _unpack(saved: Tensor | _View) -> Tensor:
    return saved if isinstance(saved, Tensor) else saved.unpack()
