"""One call of `Optimizer.step`, closures included: it runs, or is kept from running."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

import torch
from torch.optim import Optimizer

from lightning_stability._compat import MisconfigurationException
from lightning_stability.internals import Overrides
from lightning_stability.notices import warn

_UPDATES_TO_WATCH = 2
"""Updates of a custom optimizer before which to look whether it moves the weights ahead of its closure. The second may
move them by what the first has made, such as a momentum."""


class Gate(Protocol):
    """Decides about an update."""

    def before_update(self, optimizer: Optimizer) -> bool:
        """The optimizer has been called. Returns whether its updates are guarded now."""

    def decide(self, optimizer: Optimizer) -> AbstractContextManager[bool] | None:
        """Its gradients are there: whether the update goes ahead; None if nobody judges it."""

    def after_update(self, optimizer: Optimizer) -> None:
        """The call is over."""

    def refuse(self, refusal: MisconfigurationException) -> None:
        """The optimizer cannot be guarded."""


class GuardedStep:
    """Stands in for one optimizer's `step`, as learning-rate schedulers do, until `remove`.

    It is everybody's last gate, also of `optimizers(use_pl_optimizer=False)` and of optimizers that Lightning does not
    know.
    """

    def __init__(self, optimizer: Optimizer, gate: Gate, needs_closure_check: Callable[[], bool]) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._gate = gate
        self._needs_closure_check = needs_closure_check
        self._seen_through = 0
        self._active = True
        self._overrides = Overrides()
        original = optimizer.step

        @functools.wraps(original)
        def step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            if optimizer is not self._optimizer():  # a copy of it
                return type(optimizer).step(optimizer, *args, **kwargs)
            return self._step(optimizer, original, args, kwargs) if self._active else original(*args, **kwargs)

        # A bound method, since a scheduler that is made later (SWA's) wraps its `__func__`.
        self._overrides.set(optimizer, "step", types.MethodType(step, optimizer))

    def remove(self) -> None:
        """Restore the optimizer's own; where somebody has wrapped ours since, it passes every call on."""
        self._active = False
        self._overrides.restore()

    def _step(self, optimizer: Optimizer, original: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        if not self._gate.before_update(optimizer):
            result = original(*args, **kwargs)
        else:
            arguments = {**dict(zip(("closure",), args, strict=False)), **kwargs}
            if arguments.get("closure") is not None and _has_a_step_of_its_own(optimizer):
                result = self._within(optimizer, original, arguments)
            else:
                result = self._before(optimizer, original, arguments)
        self._gate.after_update(optimizer)
        return result

    def _before(self, optimizer: Optimizer, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """The closure runs first: it makes the gradients that decide."""
        closure, result = arguments.get("closure"), None
        once: _Once | None = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
            once = arguments["closure"] = _Once(result, closure, optimizer)
        decision = self._gate.decide(optimizer)
        if decision is None:
            return original(**arguments)
        with decision as goes_ahead:
            if goes_ahead:
                result = original(**arguments)
        if goes_ahead and once is not None and self._needs_closure_check():
            once.check()
        return result

    def _within(self, optimizer: Optimizer, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """A custom optimizer runs the closure itself: it may have begun something before."""
        versions = _versions(optimizer) if self._seen_through < _UPDATES_TO_WATCH else None

        def before() -> None:
            if versions is not None and versions != _versions(optimizer):
                self._gate.refuse(
                    MisconfigurationException(
                        f"{type(optimizer).__name__}.step moves the weights before it calls its closure, and an update"
                        " that is skipped there would leave them moved"
                    )
                )

        def decide() -> bool:
            decision = self._gate.decide(optimizer)
            if decision is None:
                return True
            goes_ahead = stack.enter_context(decision)
            self._seen_through += goes_ahead and versions is not None
            return goes_ahead

        with ExitStack() as stack:
            gated = arguments["closure"] = _GatedClosure(arguments["closure"], optimizer, before, decide)
            try:
                return original(**arguments)
            except _UpdateNotWanted as stopped:
                if stopped.closure is not gated:
                    raise
                return gated.result


class _Once:
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
        """Refuse an optimizer that has not asked: Lightning does, and would not notice any more."""
        if not self._asked:
            raise MisconfigurationException(
                f"The closure hasn't been executed: {type(self._optimizer).__name__}.step was given one, which makes"
                " the gradients, and did not run it. Call it in `step`, or hand it on to `super().step(closure)`."
            )


class _GatedClosure:
    """A closure that runs where a custom optimizer's `step` asks for it; an unwanted update ends there."""

    def __init__(
        self, closure: Callable[[], Any], optimizer: Optimizer, before: Callable[[], None], decide: Callable[[], bool]
    ) -> None:
        self.result: Any = None
        self._closure = closure
        self._optimizer = optimizer
        self._before = before
        self._decide = decide
        self._asked = False

    def __call__(self) -> Any:
        if self._asked:
            _say_that_it_asks_again(self._optimizer)
            return self._closure()
        self._asked = True
        self._before()
        with torch.enable_grad():
            self.result = self._closure()
        if not self._decide():
            raise _UpdateNotWanted(self)
        return self.result


class _UpdateNotWanted(BaseException):
    """Ends an optimizer's `step` from within its closure; no error, so the user's code shall not catch it."""

    def __init__(self, closure: _GatedClosure) -> None:
        super().__init__()
        self.closure = closure


def _has_a_step_of_its_own(optimizer: Optimizer) -> bool:
    """Whether its `step` may do something before it calls its closure; torch's call it first."""
    return not type(optimizer).step.__module__.startswith("torch.optim")


def _versions(optimizer: Optimizer) -> list[int]:
    return [parameter._version for group in optimizer.param_groups for parameter in group["params"]]


_ASKS_AGAIN: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def _say_that_it_asks_again(optimizer: Optimizer) -> None:
    if optimizer not in _ASKS_AGAIN:
        _ASKS_AGAIN.add(optimizer)
        warn(
            f"{type(optimizer).__name__} evaluates its closure more than once a step: only the first"
            " gradients of each step are checked, later ones can still be non-finite."
        )
