"""What the optimizers of the flat delta have in common: entries that come, go and pause."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class OptimizerState:
    """The state of an optimizer between two steps, as a checkpoint has it.

    Attributes:
        columns: name -> [num_local] a value of each entry, which any number of ranks reads back.
        own: name -> this rank's storage as it is, which as many ranks read back in place of the columns that
            are rounded; empty where none are.
        entry_step: steps taken, where all entries share one number.
    """

    columns: dict[str, Tensor]
    own: dict[str, Tensor] = field(default_factory=dict)
    entry_step: int | None = None


class FlatOptimizer(torch.optim.Optimizer):
    """An optimizer of one flat delta [num_local] fp32.

    `state[delta]` has a flat tensor [num_local] a kind of state, and maybe an `entry_step`: the number of steps
    taken, one of each entry ([num_local]) or one of all (a scalar). A subclass says what its state is and how
    it advances. Weight decay is decoupled: it pulls delta to zero, that is, to the pretrained value.
    """

    def __init__(self, delta: nn.Parameter, settings: dict, state: dict[str, Tensor]):
        super().__init__([delta], settings)
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

        The others keep delta, state and entry_step. `active` needs an entry_step of each entry, where there are entry_steps.
        """
        group, delta = self.param_groups[0], self.delta
        state, gradient = self.state[delta], delta.grad
        if active is None:
            self._advance(delta, gradient, state, group)
            return
        self._check_entry_steps("entries that pause need entry_steps")
        chosen = active.nonzero()[:, 0]
        own = {name: value[chosen] for name, value in state.items()}
        values = delta[chosen]
        self._advance(values, gradient[chosen], own, group)
        delta[chosen] = values
        for name, value in own.items():
            state[name][chosen] = value

    def _check_entry_steps(self, problem: str) -> None:
        if any(value.dim() == 0 for value in self.state[self.delta].values()):
            raise ValueError(problem)

    @torch.no_grad()
    def carry(self, delta: nn.Parameter, position: Tensor, found: Tensor) -> None:
        """Go on with another delta, of a new mask.

        Args:
            position: [len(delta)] int64: where each of its entries stood in the old delta, where `found`
                ([len(delta)] bool); the others start with zero state.
        """
        self._check_entry_steps("a mask that changes needs entry_steps")
        state, moved = self.state.pop(self.delta), {}
        for name, value in state.items():
            moved[name] = value.new_zeros(delta.shape)
            moved[name][found] = value[position[found]]
        self._take(delta, moved)

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
            state["entry_step"] = torch.tensor(saved.entry_step, dtype=torch.int32, device=delta.device)
        self._take(delta, state)

    def _take(self, delta: nn.Parameter, state: dict[str, Tensor]) -> None:
        self.state.clear()
        self.param_groups[0]["params"] = [delta]
        self.state[delta] = state
