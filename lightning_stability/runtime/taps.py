"""Stands in for methods of Lightning and torch while a fit runs: each private name of theirs that a step needs."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_stability._compat import MisconfigurationException

if TYPE_CHECKING:
    from lightning_stability.runtime.retries import Retries
    from lightning_stability.runtime.runtime import Runtime
    from lightning_stability.runtime.stepping import Stepping


class PluginTap:
    """Stands in for methods of one precision plugin until it is removed."""

    _METHODS = (
        "convert_input",
        "pre_backward",
        "post_backward",
        "_clip_gradients",
        "clip_grad_by_norm",
        "optimizer_step",
    )

    def __init__(self, plugin: Any, runtime: Runtime) -> None:
        self.plugin = plugin
        self._runtime = runtime
        self._originals: dict[str, Callable[..., Any]] = {name: getattr(plugin, name) for name in self._METHODS}
        for name in self._METHODS:
            setattr(plugin, name, getattr(self, name))

    def remove(self) -> None:
        for name in self._METHODS:
            if vars(self.plugin).get(name) == getattr(self, name):
                delattr(self.plugin, name)

    def pre_backward(self, tensor: Tensor, module: Any) -> Any:
        self._runtime.note_loss(tensor)
        return self._originals["pre_backward"](tensor, module)

    def post_backward(self, tensor: Tensor, module: Any) -> Any:
        self._runtime.after_backward()
        return self._originals["post_backward"](tensor, module)

    def optimizer_step(self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:
        result = self.step(optimizer, model, closure, kwargs)
        retries = self._runtime.retries
        return result if retries is None else retries.after_step(optimizer, model, result, kwargs)

    def step(self, optimizer: Any, model: Any, closure: Callable[[], Any], kwargs: dict[str, Any]) -> Any:
        """One try of an optimizer step."""
        self._runtime.steps.begin_step(optimizer)
        result = self._originals["optimizer_step"](optimizer, model=model, closure=closure, **kwargs)
        self._runtime.steps.finish_step()
        self._runtime.settle_batch()
        return result

    def convert_input(self, data: Any) -> Any:
        self._runtime.note_input(data)
        return self._originals["convert_input"](data)

    def _clip_gradients(self, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        module = self._runtime.trainer.lightning_module
        self._runtime.steps.measure(optimizer, module)
        self._originals["_clip_gradients"](model, optimizer, *args, **kwargs)
        self._runtime.steps.after_clipping(optimizer, module)

    def clip_grad_by_norm(self, optimizer: Any, clip_val: float) -> None:
        if not self._runtime.steps.clip_by_norm(optimizer, clip_val):
            self._originals["clip_grad_by_norm"](optimizer, clip_val)


class ClosureTap:
    """Learns of each batch's closure, which runs its forward and backward pass, until it is removed."""

    def __init__(self, automatic_optimization: Any, retries: Retries) -> None:
        self._loop = automatic_optimization
        original = automatic_optimization._make_closure

        def make_closure(kwargs: Any, optimizer: Any, batch_idx: int) -> Any:
            closure = original(kwargs, optimizer, batch_idx)
            retries.note_closure(closure, kwargs)
            return closure

        automatic_optimization._make_closure = make_closure

    def remove(self) -> None:
        vars(self._loop).pop("_make_closure", None)


def zero_quietly(closure: Any, zero_grad: Callable[[], None]) -> None:
    """Have a closure's next run zero the gradients without Lightning's hooks and counters around it.

    Args:
        closure: One that has been run: `on_before_zero_grad`, where some update averages, has been called.
        zero_grad: Zeroes the gradients.
    """
    original = closure._zero_grad_fn
    if original is not None:  # it is the first batch of a window
        first = iter([zero_grad])
        closure._zero_grad_fn = lambda: next(first, original)()


class StepStandIn:
    """Stands in for one optimizer's `step`, as learning-rate schedulers do, until it is removed."""

    def __init__(self, optimizer: Optimizer, steps: Stepping) -> None:
        self._optimizer = optimizer
        self._own = vars(optimizer).get("step")  # a scheduler's, usually
        self._active = True
        original = optimizer.step

        @functools.wraps(original)
        def step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            return steps.update(optimizer, original, args, kwargs) if self._active else original(*args, **kwargs)

        # A bound method, since a scheduler that is made later (SWA's) wraps its `__func__`.
        self._step = types.MethodType(step, optimizer)
        optimizer.step = self._step  # type: ignore[method-assign]

    def remove(self) -> None:
        self._active = False
        if vars(self._optimizer).get("step") is not self._step:
            return  # somebody stood in for us
        if self._own is None:
            del self._optimizer.step  # type: ignore[method-assign]
        else:
            self._optimizer.step = self._own  # type: ignore[method-assign]


_ASKS_AGAIN: weakref.WeakSet[Optimizer] = weakref.WeakSet()


class Once:
    """A closure that has been run: gives its result, and runs again only if the optimizer asks again."""

    def __init__(self, result: Any, closure: Callable[[], Any], optimizer: Optimizer) -> None:
        self._result = result
        self._closure = closure
        self._optimizer = optimizer
        self._asked = False

    def __call__(self) -> Any:
        if not self._asked:
            self._asked = True
            return self._result
        _say_that_it_asks_again(self._optimizer)
        return self._closure()

    def check(self) -> None:
        """Refuse an optimizer that has not asked: Lightning does, and would not notice any more.

        Raises:
            MisconfigurationException: If it has not.
        """
        if not self._asked:
            raise MisconfigurationException(
                f"The closure hasn't been executed: {type(self._optimizer).__name__}.step was given one, which makes"
                " the gradients, and did not run it. Call it in `step`, or hand it on to `super().step(closure)`."
            )


class Gate:
    """A closure that is run where the `step` of a user's own optimizer asks for it; a bad update ends it there."""

    def __init__(
        self, closure: Callable[[], Any], optimizer: Optimizer, look: Callable[[], None], decide: Callable[[], bool]
    ) -> None:
        self.result: Any = None
        self._closure = closure
        self._optimizer = optimizer
        self._look = look
        self._decide = decide
        self._asked = False

    def __call__(self) -> Any:
        if self._asked:
            _say_that_it_asks_again(self._optimizer)
            return self._closure()
        self._asked = True
        self._look()
        with torch.enable_grad():
            self.result = self._closure()
        if not self._decide():
            raise UpdateNotWanted(self)
        return self.result


class UpdateNotWanted(BaseException):
    """Ends an optimizer's `step` from within its closure; no error, so nothing of the user's shall catch it."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate


def has_a_step_of_its_own(optimizer: Optimizer) -> bool:
    """Whether its `step` may do something before it calls its closure; torch's call it first.

    Args:
        optimizer: The bare torch optimizer.
    """
    return not type(optimizer).step.__module__.startswith("torch.optim")


def _say_that_it_asks_again(optimizer: Optimizer) -> None:
    if optimizer not in _ASKS_AGAIN:
        _ASKS_AGAIN.add(optimizer)
        rank_zero_warn(
            f"{type(optimizer).__name__} evaluates its closure more than once a step: only the first"
            " gradients of each step are checked, later ones can still be non-finite."
        )
