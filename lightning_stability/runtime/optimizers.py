"""Optimizers that Lightning does not know: attributes of the module, or made in the middle of a fit."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightning_stability.runtime.update import Gate


class UnknownOptimizers:
    """Finds the optimizers that train a module though `configure_optimizers` did not return them.

    Those that are attributes of the module are found at once. Any other is found when it steps for the first time;
    that step is guarded by hiding the gradients from it, its later ones as those of all. (Not a first step with a
    closure, which has made no gradients yet.) A module may make a new one for each step: the newest few are known.

    Args:
        watch: Called with each that is found; returns whether it was not watched before.
        forget: Called with each that is let go of.
        gate: What a step asks.
    """

    MOST = 4

    def __init__(
        self,
        module: Any,
        watch: Callable[[Optimizer], bool],
        forget: Callable[[Optimizer], None],
        gate: Gate,
    ) -> None:
        self._module = module
        self._watch = watch
        self._forget = forget
        self._gate = gate
        self._known: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._newest: deque[Optimizer] = deque()
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._first: tuple[Optimizer, ExitStack] | None = None
        for optimizer in _attributes(module):
            self._found(optimizer)
        self._handles = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]

    def remove(self) -> None:
        """Look for no more."""
        for handle in self._handles:
            handle.remove()
        self._show()
        self._newest.clear()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer in self._known:
            return
        self._show()  # if the last one's step has raised
        if not self._found(optimizer):
            return
        self._newest.append(optimizer)
        if len(self._newest) > self.MOST:
            oldest = self._newest.popleft()
            self._known.discard(oldest)
            self._forget(oldest)
        # (a wrapped `step` may be a plain function here: the optimizer itself comes first then)
        given = [value for value in (*args, *kwargs.values()) if value is not None and value is not optimizer]
        if given or not self._gate.before_update(optimizer):
            return
        decision = self._gate.decide(optimizer)
        stack = ExitStack()
        self._first = optimizer, stack
        if decision is not None and not stack.enter_context(decision):
            parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self._hidden = [(parameter, parameter.grad) for parameter in parameters]
            for parameter in parameters:
                parameter.grad = None

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        first = self._first
        if first is not None and first[0] is optimizer:
            self._show()
            self._gate.after_update(optimizer)

    def _show(self) -> None:
        """The gradients are there again."""
        first, self._first = self._first, None
        if first is not None:
            first[1].close()
        hidden, self._hidden = self._hidden, []
        for parameter, gradient in hidden:
            parameter.grad = gradient

    def _found(self, optimizer: Optimizer) -> bool:
        """Whether it trains the module, and nobody has watched it so far."""
        self._known.add(optimizer)
        ours = {id(parameter) for parameter in self._module.parameters()}
        trains = any(id(parameter) in ours for group in optimizer.param_groups for parameter in group["params"])
        return trains and self._watch(optimizer)


def _attributes(module: Any) -> Iterator[Optimizer]:
    for part in module.modules():
        for value in list(vars(part).values()):
            values = (
                value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
            )
            yield from (v for v in values if isinstance(v, Optimizer))
