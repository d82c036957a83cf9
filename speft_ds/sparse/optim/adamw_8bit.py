"""AdamW on the flat delta with moments of 8 bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from speft_ds.comm.collectives import log_rank0
from speft_ds.sparse.optim.adamw import advance_adamw, zero_entry_step
from speft_ds.sparse.optim.blockwise import BLOCK, Blockwise, paged_memory, plain_memory, slots_of
from speft_ds.sparse.optim.flat import FlatOptimizer, OptimizerState

CHUNK = 1024  # blocks that are fp32 at a time
NAMES = ("exp_avg", "exp_avg_sq")


class AdamW8bit(FlatOptimizer):
    """AdamW with the moments in bitsandbytes' blockwise 8 bits; see `blockwise.Blockwise`.

    A step turns some blocks at a time to fp32, is that of `AdamW`, and rounds them again. The moments of an
    entry lie in a slot. Slots are numbered like the entries until the mask changes; then an entry that
    stays keeps its slot, so that nothing is rounded anew, and a new one takes a free slot or one at the end.
    An entry that rests keeps its codes unless another one exceeds the largest moment of the block.

    Which entries share a block depends on the number of ranks, and with it the rounding: runs at different
    world sizes agree to 8 bits, not to the order of sums.

    Args:
        delta: [num_local] fp32.
        entry_steps: as for `AdamW`.
        is_paged: codes in paged memory, which a GPU that is full moves to the host; on a CPU in ordinary
            memory, and says so.
    """

    def __init__(
        self,
        delta: nn.Parameter,
        lr: float,
        betas,
        eps: float,
        weight_decay: float,
        entry_steps: bool,
        is_paged: bool = False,
    ):
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(delta, settings, {"entry_step": zero_entry_step(delta, entry_steps)})
        if is_paged and delta.device.type != "cuda":
            log_rank0(
                "note: optimizer.name=paged_adamw_8bit: only a GPU has paged memory; ordinary memory is used"
            )
            is_paged = False
        self.allocate = paged_memory if is_paged else plain_memory
        self._make_moments(-(-delta.numel() // BLOCK))

    def _make_moments(self, num_blocks: int) -> None:
        device, allocate = self.delta.device, self.allocate
        self.moments = {n: Blockwise(n == "exp_avg", num_blocks, device, allocate) for n in NAMES}
        # [num_slots] int32, -1 where a slot is free; None: the entries in their order.
        self.entry_at: Tensor | None = None

    @torch.no_grad()
    def step(self, closure=None, active: Tensor | None = None) -> None:
        """As `FlatOptimizer.step`; resting entries keep their moments as the class says."""
        entry_step = self.state[self.delta]["entry_step"]
        if active is not None:
            self._check_entry_steps("entries that pause need entry_steps")
        entry_step.add_(1 if active is None else active)
        for blocks in self._chunks():
            self._step_chunk(blocks, entry_step, active)

    def _step_chunk(self, blocks: slice, entry_step: Tensor, active: Tensor | None) -> None:
        delta = self.delta
        slot, entry = self._entries_in(blocks)
        whole = {name: moment.read(blocks) for name, moment in self.moments.items()}
        resting = None
        if active is not None:
            steps = active[entry]
            resting = torch.zeros_like(whole["exp_avg"], dtype=torch.bool)
            resting[slot[~steps]] = True
            slot, entry = slot[steps], entry[steps]
        values, own = delta[entry], {name: value[slot] for name, value in whole.items()}
        own_step = entry_step[entry] if entry_step.dim() else entry_step
        advance_adamw(values, delta.grad[entry], **own, entry_step=own_step, group=self.param_groups[0])
        delta[entry] = values
        for name, moment in self.moments.items():
            whole[name][slot] = own[name]
            moment.write(blocks, whole[name], resting)

    def _chunks(self) -> Iterator[slice]:
        num_blocks = self.moments["exp_avg"].absmax.numel()
        for start in range(0, num_blocks, CHUNK):
            yield slice(start, min(start + CHUNK, num_blocks))

    def _entries_in(self, blocks: slice) -> tuple[Tensor, Tensor]:
        """The slots of these blocks that are taken, counted from their first, and the entries; [n] int64."""
        slots = slots_of(blocks)
        if self.entry_at is None:
            entry = torch.arange(slots.start, min(slots.stop, self.delta.numel()), device=self.delta.device)
            return entry - slots.start, entry
        entry = self.entry_at[slots]
        slot = (entry >= 0).nonzero()[:, 0]
        return slot, entry[slot].to(torch.int64)

    @torch.no_grad()
    def carry(self, delta: nn.Parameter, position: Tensor, found: Tensor) -> None:
        entry_at = self._entry_of_every_slot()
        now = torch.full_like(self.delta, -1, dtype=torch.int32, requires_grad=False)
        now[position[found]] = found.nonzero()[:, 0].to(torch.int32)
        super().carry(delta, position, found)
        taken = (entry_at >= 0).nonzero()[:, 0]
        entry_at[taken] = now[entry_at[taken].to(torch.int64)]
        new = (~found).nonzero()[:, 0].to(torch.int32)
        free = (entry_at < 0).nonzero()[:, 0]
        for moment in self.moments.values():
            moment.code[free] = moment.zero
        if new.numel() > free.numel():
            num_blocks = -(-(new.numel() - free.numel()) // BLOCK)
            for moment in self.moments.values():
                moment.grow(num_blocks)
            entry_at = torch.cat([entry_at, entry_at.new_full((num_blocks * BLOCK,), -1)])
            free = (entry_at < 0).nonzero()[:, 0]
        entry_at[free[: new.numel()]] = new
        self.entry_at = entry_at

    def _entry_of_every_slot(self) -> Tensor:
        if self.entry_at is not None:
            return self.entry_at
        num_slots, num_local = self.moments["exp_avg"].code.numel(), self.delta.numel()
        entry_at = torch.arange(num_slots, dtype=torch.int32, device=self.delta.device)
        return entry_at.masked_fill_(entry_at >= num_local, -1)

    @torch.no_grad()
    def snapshot(self) -> OptimizerState:
        """As `FlatOptimizer.snapshot`, with the moments' fp32 values as columns, on the CPU."""
        saved = super().snapshot()
        for name, moment in self.moments.items():
            saved.columns[name] = torch.empty(self.delta.numel())
            saved.own |= {f"{name}.code": moment.code, f"{name}.absmax": moment.absmax}
            for blocks in self._chunks():
                slot, entry = self._entries_in(blocks)
                saved.columns[name][entry.cpu()] = moment.read(blocks)[slot].cpu()
        if self.entry_at is not None:
            saved.own["entry_at"] = self.entry_at
        return saved

    @torch.no_grad()
    def restore(self, delta: nn.Parameter, saved: OptimizerState) -> None:
        """As `FlatOptimizer.restore`: bit for bit from `own`, rounded to 8 bits from the columns alone."""
        entry_steps = {name: value for name, value in saved.columns.items() if name not in NAMES}
        super().restore(delta, OptimizerState(entry_steps, entry_step=saved.entry_step))
        if not saved.own:
            self._make_moments(-(-delta.numel() // BLOCK))
            for name, moment in self.moments.items():
                self._write_all(moment, saved.columns[name])
            return
        self._make_moments(saved.own["exp_avg.absmax"].numel())
        for name, moment in self.moments.items():
            moment.code.copy_(saved.own[f"{name}.code"])
            moment.absmax.copy_(saved.own[f"{name}.absmax"])
        if "entry_at" in saved.own:
            self.entry_at = saved.own["entry_at"].to(delta.device, copy=True)

    def _write_all(self, moment: Blockwise, values: Tensor) -> None:
        """Store [num_local] values."""
        for blocks in self._chunks():
            slot, entry = self._entries_in(blocks)
            whole = torch.zeros_like(moment.read(blocks))
            whole[slot] = values[entry.to(values.device)].to(whole.device)
            moment.write(blocks, whole)
