"""The optimizers of the flat delta: AdamW (also with 8-bit moments), SGD and Lion."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speft_ds.sparse.optim.blockwise import BLOCK, Blockwise, slots_of

# That step at a time, by device: whole weights are many, and a step takes temporaries. On a CPU these stay in
# its cache, and in memory that malloc has at hand: a third of the time of 2**22.
STEP_ELEMENTS = {"cpu": 2**18, "cuda": 2**22}
CHUNK = 1024  # blocks of 8-bit moments that are fp32 at a time
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class OptimizerState:
    """The state of an optimizer between two steps, as a checkpoint has it."""

    # Name -> [num_local] a value of each entry, which any number of ranks reads back.
    columns: dict[str, Tensor]
    # Name -> this rank's storage as it is, which as many ranks read back in place of rounded columns.
    own: dict[str, Tensor] = field(default_factory=dict)
    entry_step: int | None = None  # steps taken, where all entries share one number


class FlatOptimizer(torch.optim.Optimizer):
    """An optimizer of one flat delta [num_local] fp32, whose entries may come, go and pause.

    `state[delta]` has a flat tensor [num_local] per kind of state, and maybe `entry_step`: the number of
    steps taken, of each entry ([num_local]) or of all (a scalar). A subclass names the recipe keys that it
    takes (`SETTINGS`) and its state, and says how it advances. Weight decay is decoupled: it pulls delta to
    zero, that is, to the pretrained value.

    Args:
        delta: [num_local] fp32.
        entry_steps: count the steps of every entry (4 bytes each), for a mask that changes or entries that
            pause; otherwise all entries share one count. Only of use to an optimizer that counts steps.
        settings: the values of `SETTINGS`.
    """

    SETTINGS: ClassVar[tuple[str, ...]]
    STATE: ClassVar[tuple[str, ...]]  # names of its fp32 buffers
    COUNTS_STEPS: ClassVar[bool] = False

    def __init__(self, delta: nn.Parameter, entry_steps: bool = False, **settings):
        super().__init__([delta], settings)
        state = {name: torch.zeros_like(delta, requires_grad=False) for name in self.STATE}
        if self.COUNTS_STEPS:
            # One count of all is on the CPU, where a GPU is not waited for to read it.
            where = {"size": delta.shape, "device": delta.device} if entry_steps else {"size": ()}
            state["entry_step"] = torch.zeros(dtype=torch.int32, **where)
            self.param_groups[0]["most_steps"] = 0
        self.state[delta] = state

    @staticmethod
    def _advance(delta: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict) -> None:
        """One step of these entries, in place on `delta` and `state`; `group` has the settings."""
        raise NotImplementedError

    @property
    def delta(self) -> nn.Parameter:
        return self.param_groups[0]["params"][0]

    @torch.no_grad()
    def step(self, closure=None, active: Tensor | None = None) -> None:
        """One step of all entries, or of those where the [num_local] bool `active` is True.

        The others keep delta and state. `active` needs steps that are counted per entry, if they are counted.
        """
        group, delta = self.param_groups[0], self.delta
        state, gradient = self.state[delta], delta.grad
        self._count_step()
        if active is None:
            size = STEP_ELEMENTS[delta.device.type]
            for start in range(0, delta.numel(), size):
                part = slice(start, start + size)
                own = {name: value[part] if value.dim() else value.clone() for name, value in state.items()}
                self._advance(delta[part], gradient[part], own, group)
            for value in state.values():
                if not value.dim():
                    value.add_(1)  # the one count of all
            return
        self._check_entry_steps("entries that pause need entry_steps")
        chosen = active.nonzero()[:, 0]
        own = {name: value[chosen] for name, value in state.items()}
        values = delta[chosen]
        self._advance(values, gradient[chosen], own, group)
        delta[chosen] = values
        for name, value in own.items():
            state[name][chosen] = value

    def _count_step(self) -> None:
        """`most_steps` of the group: no entry has taken more. Counted here, so that no device is asked."""
        if self.COUNTS_STEPS:
            self.param_groups[0]["most_steps"] += 1

    def _check_entry_steps(self, problem: str) -> None:
        if any(value.dim() == 0 for value in self.state[self.delta].values()):
            raise ValueError(problem)

    @torch.no_grad()
    def remap_state(self, delta: nn.Parameter, position: Tensor, found: Tensor) -> None:
        """Go on with another delta, of a new mask.

        Args:
            position: [len(delta)] int64: where each of its entries stood in the old delta, where `found`
                ([len(delta)] bool); the others start with zero state.
        """
        self._check_entry_steps("a mask that changes needs entry_steps")
        moved = {}
        for name, value in self.state[self.delta].items():
            moved[name] = value.new_zeros(delta.shape)
            moved[name][found] = value[position[found]]
        self._replace(delta, moved)

    def snapshot(self) -> OptimizerState:
        """What `restore` goes on from. Nothing is copied."""
        state = self.state[self.delta]
        columns = {name: value for name, value in state.items() if value.dim()}
        has_shared_step = "entry_step" in state and state["entry_step"].dim() == 0
        return OptimizerState(columns, entry_step=int(state["entry_step"]) if has_shared_step else None)

    def restore(self, delta: nn.Parameter, saved: OptimizerState) -> None:
        """Go on with a delta and its saved state: that of its own entries, in their order."""
        state = {name: value.to(delta.device, copy=True) for name, value in saved.columns.items()}
        if saved.entry_step is not None:
            state["entry_step"] = torch.tensor(saved.entry_step, dtype=torch.int32)
        if self.COUNTS_STEPS:
            steps = state["entry_step"]
            self.param_groups[0]["most_steps"] = int(steps.max()) if steps.numel() else 0
        self._replace(delta, state)

    def _replace(self, delta: nn.Parameter, state: dict[str, Tensor]) -> None:
        self.state.clear()
        self.param_groups[0]["params"] = [delta]
        self.state[delta] = state


class SGD(FlatOptimizer):
    """Gradient descent with heavy-ball momentum (Polyak, 1964), as `torch.optim.SGD` without dampening.

    Weight decay is decoupled (SGDW; Loshchilov & Hutter, 2019); torch's goes through the momentum. Without
    momentum there is no state.
    """

    SETTINGS = ("lr", "momentum", "weight_decay")

    def __init__(self, delta: nn.Parameter, entry_steps: bool = False, **settings):
        self.STATE = ("momentum",) if settings["momentum"] else ()
        super().__init__(delta, entry_steps, **settings)

    @staticmethod
    def _advance(delta: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict) -> None:
        delta.mul_(1 - group["lr"] * group["weight_decay"])
        if group["momentum"]:
            gradient = state["momentum"].mul_(group["momentum"]).add_(gradient)
        delta.sub_(gradient, alpha=group["lr"])


class Lion(FlatOptimizer):
    """Lion (Chen et al., Symbolic Discovery of Optimization Algorithms, 2023), its algorithm 2.

    A step is the sign of the gradient mixed with its average, so all entries that move go equally far.
    `betas` are those of the mix whose sign is taken, and of the average that is kept.
    """

    SETTINGS = ("lr", "betas", "weight_decay")
    STATE = ("exp_avg",)

    @staticmethod
    def _advance(delta: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict) -> None:
        beta1, beta2 = group["betas"]
        delta.mul_(1 - group["lr"] * group["weight_decay"])
        delta.sub_(state["exp_avg"].lerp(gradient, 1 - beta1).sign_(), alpha=group["lr"])
        state["exp_avg"].lerp_(gradient, 1 - beta2)


class AdamW(FlatOptimizer):
    """AdamW (Loshchilov & Hutter, 2019).

    Bias correction goes by the number of steps that an entry itself has taken (`entry_step`); so a young
    entry among old ones takes the steps that it would take alone.
    """

    SETTINGS = ("lr", "betas", "eps", "weight_decay")
    STATE = MOMENTS
    COUNTS_STEPS = True

    @staticmethod
    def _advance(delta: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict) -> None:
        beta1, beta2 = group["betas"]
        entry_step, most = state["entry_step"].add_(1), group["most_steps"]
        delta.mul_(1 - group["lr"] * group["weight_decay"])
        exp_avg = state["exp_avg"].lerp_(gradient, 1 - beta1)
        exp_avg_sq = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (exp_avg_sq / _correction(beta2, entry_step, most)).sqrt_().add_(group["eps"])
        delta.sub_(exp_avg / _correction(beta1, entry_step, most) / denominator * group["lr"])


def _correction(beta: float, entry_step: Tensor, most: int) -> Tensor | float:
    """1 - beta^entry_step, computed in fp64 once for every count up to `most`; fp32, shaped like it.

    Of one count of all, which is `most`, a number.
    """
    if entry_step.dim() == 0:
        return 1 - beta**most
    powers = beta ** torch.arange(most + 1, dtype=torch.float64, device=entry_step.device)
    return (1 - powers).to(torch.float32)[entry_step.to(torch.int64)]


class AdamW8bit(AdamW):
    """AdamW with the moments in bitsandbytes' blockwise 8 bits; see `blockwise.Blockwise`.

    A step turns some blocks at a time to fp32, is that of `AdamW`, and rounds them again. The moments of an
    entry lie in a slot. Slots are numbered like the entries until the mask changes; then an entry that
    stays keeps its slot, so that nothing is rounded anew, and a new one takes a free slot or one at the end.
    An entry that rests keeps its codes unless another one exceeds the largest moment of the block.

    Which entries share a block depends on the number of ranks, and with it the rounding: runs at different
    world sizes agree to 8 bits, not to the order of sums.
    """

    STATE = ()

    def __init__(self, delta: nn.Parameter, entry_steps: bool = False, **settings):
        super().__init__(delta, entry_steps, **settings)
        self._make_moments(-(-delta.numel() // BLOCK))

    def _make_moments(self, num_blocks: int) -> None:
        self.moments = {name: Blockwise(name == "exp_avg", num_blocks, self.delta.device) for name in MOMENTS}
        # [num_slots] int32, -1 where a slot is free; None: the entries in their order.
        self.entry_at: Tensor | None = None

    def _entries_of(self, slots: slice) -> Tensor:
        """The entry in each of these slots; -1 where it is free."""
        if self.entry_at is not None:
            return self.entry_at[slots]
        entry = torch.arange(slots.start, slots.stop, device=self.delta.device)
        return entry.masked_fill_(entry >= self.delta.numel(), -1)

    def _chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Some blocks at a time: their taken slots, counted from the first, and the entries there (int64)."""
        num_blocks = self.moments["exp_avg"].absmax.numel()
        for start in range(0, num_blocks, CHUNK):
            blocks = slice(start, min(start + CHUNK, num_blocks))
            slots = slots_of(blocks)
            if self.entry_at is None:  # the first slots are taken: no device is asked which
                entry = torch.arange(
                    slots.start, min(slots.stop, self.delta.numel()), device=self.delta.device
                )
                yield blocks, entry - slots.start, entry
                continue
            entry = self.entry_at[slots]
            slot = (entry >= 0).nonzero()[:, 0]
            yield blocks, slot, entry[slot].to(torch.int64)

    @torch.no_grad()
    def step(self, closure=None, active: Tensor | None = None) -> None:
        """As `FlatOptimizer.step`; resting entries keep their moments as the class says."""
        delta, entry_step = self.delta, self.state[self.delta]["entry_step"]
        self._count_step()
        if active is not None:
            self._check_entry_steps("entries that pause need entry_steps")
        for blocks, slot, entry in self._chunks():
            values = {name: moment.read(blocks) for name, moment in self.moments.items()}
            resting = None
            if active is not None:
                steps = active[entry]
                resting = torch.zeros_like(values["exp_avg"], dtype=torch.bool)
                resting[slot[~steps]] = True
                slot, entry = slot[steps], entry[steps]
            own_delta, own = delta[entry], {name: value[slot] for name, value in values.items()}
            own["entry_step"] = entry_step[entry] if entry_step.dim() else entry_step.clone()
            self._advance(own_delta, delta.grad[entry], own, self.param_groups[0])
            delta[entry] = own_delta
            for name, moment in self.moments.items():
                values[name][slot] = own[name]
                moment.write(blocks, values[name], resting)
        entry_step.add_(1 if active is None else active)

    @torch.no_grad()
    def remap_state(self, delta: nn.Parameter, position: Tensor, found: Tensor) -> None:
        """As `FlatOptimizer.remap_state`; entries that stay keep their slots."""
        num_slots = self.moments["exp_avg"].code.numel()
        entry_at = self._entries_of(slice(0, num_slots)).to(torch.int32)
        now = torch.full_like(self.delta, -1, dtype=torch.int32, requires_grad=False)
        now[position[found]] = found.nonzero()[:, 0].to(torch.int32)
        super().remap_state(delta, position, found)
        taken = (entry_at >= 0).nonzero()[:, 0]
        entry_at[taken] = now[entry_at[taken].to(torch.int64)]
        new = (~found).nonzero()[:, 0].to(torch.int32)
        free = (entry_at < 0).nonzero()[:, 0]
        for moment in self.moments.values():
            moment.code[free] = moment.zero
        if (missing := new.numel() - free.numel()) > 0:
            num_blocks = -(-missing // BLOCK)
            for moment in self.moments.values():
                moment.grow(num_blocks)
            entry_at = F.pad(entry_at, (0, num_blocks * BLOCK), value=-1)
            free = (entry_at < 0).nonzero()[:, 0]
        entry_at[free[: new.numel()]] = new
        self.entry_at = entry_at

    @torch.no_grad()
    def snapshot(self) -> OptimizerState:
        """As `FlatOptimizer.snapshot`, with the moments' fp32 values as columns, on the CPU."""
        saved = super().snapshot()
        for name, moment in self.moments.items():
            saved.columns[name] = torch.empty(self.delta.numel())
            saved.own |= {f"{name}.code": moment.code, f"{name}.absmax": moment.absmax}
            for blocks, slot, entry in self._chunks():
                saved.columns[name][entry.cpu()] = moment.read(blocks)[slot].cpu()
        if self.entry_at is not None:
            saved.own["entry_at"] = self.entry_at
        return saved

    @torch.no_grad()
    def restore(self, delta: nn.Parameter, saved: OptimizerState) -> None:
        """As `FlatOptimizer.restore`: bit for bit from `own`, rounded to 8 bits from the columns alone."""
        steps = {name: value for name, value in saved.columns.items() if name not in MOMENTS}
        super().restore(delta, OptimizerState(steps, entry_step=saved.entry_step))
        own = saved.own
        self._make_moments(own["exp_avg.absmax"].numel() if own else -(-delta.numel() // BLOCK))
        for name, moment in self.moments.items():
            if own:
                moment.code.copy_(own[f"{name}.code"])
                moment.absmax.copy_(own[f"{name}.absmax"])
                continue
            column = saved.columns[name]
            for blocks, slot, entry in self._chunks():
                values = moment.read(blocks).zero_()
                values[slot] = column[entry.to(column.device)].to(values.device)
                moment.write(blocks, values)
        if "entry_at" in own:
            self.entry_at = own["entry_at"].to(delta.device, copy=True)


# `optimizer.name` -> its class
OPTIMIZERS: dict[str, type[FlatOptimizer]] = {
    "adamw": AdamW,
    "adamw_8bit": AdamW8bit,
    "sgd": SGD,
    "lion": Lion,
}


def make_optimizer(delta: nn.Parameter, recipe, entry_steps: bool) -> FlatOptimizer:
    """The optimizer of a recipe's `optimizer` section on this rank's flat delta.

    Args:
        entry_steps: whether entries may come, go or pause.
    """
    optimizer = OPTIMIZERS[recipe.name]
    return optimizer(delta, entry_steps, **{key: getattr(recipe, key) for key in optimizer.SETTINGS})
