"""Optimizers that Lightning does not know: attributes of the module, or made in the middle of a fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook


class UnknownOptimizers:
    """Finds the optimizers that train a module though `configure_optimizers` did not return them.

    Those that are attributes of the module are found at once. Any other is found when it steps for the first time; its
    later steps are guarded.

    Args:
        module: The LightningModule.
        watch: Called with each that is found.
    """

    def __init__(self, module: Any, watch: Callable[[Optimizer], None]) -> None:
        self._module = module
        self._watch = watch
        self._known: set[int] = set()
        for optimizer in _attributes(module):
            self._found(optimizer)
        self._handle = register_optimizer_step_pre_hook(self._on_step)

    def remove(self) -> None:
        """Look for no more."""
        self._handle.remove()

    def _on_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if id(optimizer) not in self._known:
            self._found(optimizer)

    def _found(self, optimizer: Optimizer) -> None:
        self._known.add(id(optimizer))
        ours = {id(parameter) for parameter in self._module.parameters()}
        if any(id(parameter) in ours for group in optimizer.param_groups for parameter in group["params"]):
            self._watch(optimizer)


def _attributes(module: Any) -> Iterator[Optimizer]:
    for part in module.modules():
        for value in list(vars(part).values()):
            values = (
                value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
            )
            yield from (v for v in values if isinstance(v, Optimizer))
