"""An error of an automatic callback must not end a run that nobody asked it to watch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lightning_stability.runtime.policies import DeliberateError, Policy

HOOKS = (
    *("on_fit_start", "on_fit_end", "on_sanity_check_start", "on_sanity_check_end"),
    *("on_train_start", "on_train_end", "on_train_epoch_start", "on_train_epoch_end"),
    *("on_train_batch_start", "on_train_batch_end", "on_before_backward", "on_after_backward"),
    *("on_before_optimizer_step", "on_before_zero_grad"),
    *("on_validation_start", "on_validation_end", "on_validation_epoch_start", "on_validation_epoch_end"),
    *("on_validation_batch_start", "on_validation_batch_end", "on_exception", "teardown"),
    *("state_dict", "load_state_dict", "on_save_checkpoint", "on_load_checkpoint"),
    *("on_place", "on_resumed"),
)
"""Hooks of a callback that Lightning calls, or the points at which a run can be saved."""

_EMPTY: dict[str, Callable[[], Any]] = {"state_dict": dict}


def contained(method: Callable[..., Any], on_error: Callable[[Exception], bool], empty: Callable[[], Any]) -> Any:
    """The method; an error in it goes to `on_error`, and is raised only if that returns False.

    Args:
        method: A bound method.
        on_error: Gets the exception; returns whether it has dealt with it.
        empty: Makes what the method returns then.
    """

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except Exception as error:
            if isinstance(error, (DeliberateError, StopIteration)) or not on_error(error):
                raise
            return empty()

    return call


def contain_hooks(policy: Policy, on_error: Callable[[Exception], bool]) -> None:
    """Contain every hook of an automatic callback that Lightning calls, for as long as it lives: one fit."""
    for name in HOOKS:
        method = getattr(policy, name, None)
        if method is not None and name not in vars(policy):
            setattr(policy, name, contained(method, on_error, _EMPTY.get(name, lambda: None)))


class Contained:
    """Stands for an object; errors in its methods are contained.

    Args:
        on_error: As in `contained`.
    """

    def __init__(self, target: Any, on_error: Callable[[Exception], bool]) -> None:
        self._target = target
        self._on_error = on_error

    def __getattr__(self, name: str) -> Any:
        call = contained(getattr(self._target, name), self._on_error, lambda: None)
        setattr(self, name, call)  # the next time it is found without us
        return call


class ContainedListener(Contained):
    """A `hooks.StepListener` whose errors are contained, but for what the user's code raises."""

    def __init__(self, target: Any, on_error: Callable[[Exception], bool]) -> None:
        super().__init__(target, on_error)
        self._after_step = contained(target.after_step, on_error, lambda: None)

    def after_step(self, optimizer: Any, model: Any, result: Any, kwargs: dict[str, Any]) -> Any:
        """A failure of ours leaves the step's result as it is."""
        answer = self._after_step(optimizer, model, result, kwargs)
        return result if answer is None else answer

    def training_step(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The user's own exceptions are not ours to contain."""
        return self._target.training_step(original, args, kwargs)

    def backward(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Nor those of what the module computes its gradients with."""
        return self._target.backward(original, args, kwargs)
