"""A validation batch that overflows is run again, in another precision, before anything of it is left anywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from lightning_stability.health.values import named_tensors, nonfinite_names
from lightning_stability.internals import Overrides, active_results, transferred
from lightning_stability.recovery import MetricUndo
from lightning_stability.recovery.random_state import RandomState


class ValidationRetrier(Protocol):
    """Decides about a validation batch whose outputs, or what it logged, are not finite."""

    def wants_validation_retry(self) -> bool:
        """Whether it could do anything about it now. Each batch is then read at once."""

    def before_validation_retry(self) -> None:
        """Change what has to be changed; the batch is run again next."""

    def after_validation_retry(self, batch_idx: int, why: str, helped: bool) -> None:
        """Keep the change if it helped, or take it back."""


class ValidationRetries:
    """Watches `validation_step` of one strategy until `remove`. In one process: others would have to do the same.

    Args:
        retrier: Decides.
        uncast: Returns the batch as it was before a 16-true precision cast it; None if it was not cast.
    """

    def __init__(self, trainer: Any, retrier: ValidationRetrier, uncast: Callable[[], Any]) -> None:
        self._trainer = trainer
        self._retrier = retrier
        self._uncast = uncast
        self._overrides = Overrides()
        original = trainer.strategy.validation_step
        self._overrides.set(trainer.strategy, "validation_step", lambda *args, **kw: self._step(original, args, kw))

    def remove(self) -> None:
        """Restore the strategy's own."""
        self._overrides.restore()

    def _step(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        trainer, retrier = self._trainer, self._retrier
        if trainer.state.fn != "fit" or trainer.world_size > 1 or not retrier.wants_validation_retry():
            return original(*args, **kwargs)
        metrics = MetricUndo(trainer.lightning_module, lambda: active_results(trainer))
        metrics.remember()
        random = RandomState.capture(trainer.strategy.root_device)
        output, why, error = self._try(original, args, kwargs, metrics)
        if why is None:
            return output
        tried = metrics.snapshot()
        metrics.restore(_ALWAYS)
        random.restore()
        retrier.before_validation_retry()
        uncast = self._uncast()
        again = args if uncast is None else (transferred(trainer, uncast), *args[1:])
        second, still, second_error = self._try(original, again, kwargs, metrics)
        helped = still is None
        batch_idx = next((value for value in args[1:] if isinstance(value, int)), -1)
        retrier.after_validation_retry(batch_idx, why, helped)
        if helped:
            return second
        metrics.restore_snapshot(tried)
        if error is not None or second_error is not None:
            raise (error or second_error)  # type: ignore[misc]
        return output

    def _try(
        self, original: Callable[..., Any], args: Any, kwargs: Any, metrics: MetricUndo
    ) -> tuple[Any, str | None, Exception | None]:
        """The step's output, and what of it was not finite; an exception may have come of a non-finite number."""
        try:
            output = original(*args, **kwargs)
        except Exception as error:
            return None, f"`validation_step` raised {type(error).__name__}: {error}", error
        names = nonfinite_names(named_tensors(output, "output"))
        if names:
            return output, f"its `{names[0]}` was not finite", None
        logged = metrics.nonfinite()
        return output, "what it logged was not finite" if logged is not None and bool(logged) else None, None


_ALWAYS = torch.tensor(True)
