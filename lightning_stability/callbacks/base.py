"""What the callbacks share: joining the Trainer's session, refusing, and disabling themselves."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Iterable
from numbers import Real
from typing import Any

from lightning_stability._compat import Callback, MisconfigurationException, is_instance_by_name
from lightning_stability.callbacks.incident import Incident
from lightning_stability.health import StepRecord
from lightning_stability.notices import warn as warn
from lightning_stability.notices import warn_always as warn_always
from lightning_stability.runtime import Order, Outcome, Session, session_of
from lightning_stability.runtime.containment import HOOKS


def is_number(value: Any) -> bool:
    """Whether an option is a number, one of numpy included, and no flag.

    Args:
        value: What was given.
    """
    return isinstance(value, Real) and not isinstance(value, bool)


def warn_of_forgotten_precision(callback: Any, trainer: Any, checkpoint: dict[str, Any]) -> None:
    """Warn of a run that had left a precision and is resumed in another one, because PrecisionFallback is not there.

    The first of our callbacks in the Trainer says it. Lightning says only that a callback is missing.

    Args:
        checkpoint: What is being loaded.
    """
    state = (checkpoint.get("callbacks") or {}).get("PrecisionFallback")
    if not state or state["to"] == str(trainer.precision) or trainer.state.fn != "fit":
        return
    names = ("PrecisionFallback", "SessionMember")
    ours = [other for other in trainer.callbacks if is_instance_by_name(other, *names)]
    if callback is ours[0] and not any(is_instance_by_name(other, "PrecisionFallback") for other in ours):
        warn_always(
            f"This run had fallen back from {state['fallen_from']} to {state['to']} at global step {state['step']}"
            f" ({state['why']}). Without PrecisionFallback it continues in {trainer.precision}: add the callback, or"
            f" give precision={state['to']!r}."
        )


def _joining(setup: Any) -> Any:
    """A `setup` that joins the session first."""

    @functools.wraps(setup)
    def joined(self: SessionMember, trainer: Any, pl_module: Any, stage: str) -> None:
        self._join(trainer, stage)
        if stage != "fit" or self in trainer.callbacks:  # else it has disabled itself
            setup(self, trainer, pl_module, stage)

    return joined


class SessionMember:
    """What makes a callback a policy of its Trainer's session while `fit` runs.

    It joins the session before its `setup` runs, whether or not a subclass calls `super().setup()`; the session
    receives Lightning's hooks by itself.
    """

    order = Order.OBSERVE
    """When it is shown a record: retries first, then skips, rewinds, stops, and those that only observe."""

    read_every = 1
    """How many steps may pass before records are handed over. Several at a time cost less."""

    guards = False
    """Whether bad updates shall be skipped."""

    patience: float = math.inf
    """How many bad updates in a row to skip; the next one ends the run."""

    reads_steps = True
    """Whether it needs records; a run in which nobody does is not measured."""

    reads_batches = False
    """Whether it needs batches as they were before a 16-true precision cast them."""

    automatic = False
    """Whether it came with the environment: it then disables itself where it would refuse."""

    asked_for = True
    """Whether somebody named it, in code, on the command line or in the environment."""

    session: Session | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        setup = vars(cls).get("setup")
        if setup is not None:
            setattr(cls, "setup", _joining(setup))  # noqa: B010

    def is_needed(self, trainer: Any) -> bool:
        """Whether the callback has anything to do under this Trainer; if not it costs nothing."""
        return True

    def objection(self, trainer: Any) -> str | None:
        """Why this Trainer is refused; None if it is not."""
        return None

    # Options.

    def _require_number(self, least: float, whole: bool = True, **options: Any) -> None:
        """Refuse options that are no finite numbers of at least `least`."""
        for name, value in options.items():
            is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            if not (is_number and least <= value < math.inf):
                kind = "whole" if whole else "finite"
                raise MisconfigurationException(
                    f"{type(self).__name__}({name}={value!r}): expected a {kind} number of at least {least:g}."
                )

    def _require_flag(self, **options: Any) -> None:
        """Refuse options that are neither True nor False: the text "no" would count as True."""
        for name, value in options.items():
            if value not in (True, False):
                raise MisconfigurationException(f"{type(self).__name__}({name}={value!r}): expected True or False.")

    def _require_path(self, **options: Any) -> None:
        """Refuse options that are no path, and not None either."""
        for name, value in options.items():
            if value is not None and not isinstance(value, (str, os.PathLike)):
                raise MisconfigurationException(f"{type(self).__name__}({name}={value!r}): expected a path, or None.")

    def _names(self, **option: Any) -> list[str]:
        """The names that an option holds: one, or several, or None for none. Anything else is refused."""
        ((name, value),) = option.items()
        given = [value] if isinstance(value, str) else value
        names = list(given or ()) if given is None or isinstance(given, Iterable) else [given]
        if not all(isinstance(each, str) for each in names):
            raise MisconfigurationException(
                f"{type(self).__name__}({name}={value!r}): expected a name, or a list of names."
            )
        return names

    def _require_one_of(self, *choices: str, **options: Any) -> None:
        """Refuse options that are none of the choices."""
        for name, value in options.items():
            if value not in choices:
                expected = " or ".join(f'"{choice}"' for choice in choices)
                raise MisconfigurationException(f"{type(self).__name__}({name}={value!r}): expected {expected}.")

    # What the session asks (`runtime.Policy`).

    def on_record(self, record: StepRecord) -> None:
        """Called once for each optimizer step, in order, some time after it."""

    def wants_update(self, logger_step: int) -> bool:
        """Whether the sizes of this step's update and weights shall be measured too."""
        return False

    def describe_skip(self, record: StepRecord) -> dict[str, Any]:
        """The fields of the event `update_skipped` that explain it."""
        if record.outcome == Outcome.SPIKE:
            return {}  # SpikeRecovery says it, with its limits
        assert self.session is not None
        incident = Incident.of(record, self.session.recent_batch(record), self.session.trainer.world_size > 1)
        return {"what": incident.what, "why": incident.why}

    def on_nonfinite_contents(self, restored: list[str], lost: list[str], all_ranks: bool) -> None:
        """Parameters or buffers became non-finite outside of a bad step; seen before a save or at an epoch's end."""

    def on_many_skips(self, skipped: int, of: int) -> None:
        """More than 5 % of the last updates were skipped."""
        warn_always(
            f"{type(self).__name__}: {skipped} of the last {of} updates were skipped. The run learns nothing from these"
            " batches. The events `update_skipped` in events.jsonl say which they were and why."
        )

    def skips_exception(self, exception: Exception, batch: Any) -> bool:
        """`training_step` has raised; whether to skip the batch and to continue."""
        return False

    def on_session_end(self, exception: BaseException | None) -> None:
        """The fit ends; the session is gone next."""

    def on_failure(self, trainer: Any, error: Exception) -> bool:
        """Something that it needs has failed: disable it if it is automatic. Whether the run can continue."""
        if self.automatic:
            self.disable(trainer, repr(error))
        return self.automatic

    def disable(self, trainer: Any, reason: object) -> None:
        """Leave a run that an automatic callback cannot serve."""
        if self.session is not None:
            with contextlib.suppress(Exception):  # this may be what has failed
                self.on_session_end(None)
        self._leave_session()
        take_out(self, trainer, reason)

    # Parts of the above.

    def _join(self, trainer: Any, stage: str) -> None:
        if stage != "fit":
            return
        if self.session is not None and self.session is session_of(trainer) and not self.session.has_begun:
            return
        self._leave_session()
        if not self.is_needed(trainer):
            return
        objection = self.objection(trainer)
        if objection is not None:
            self._refuse_run(trainer, objection)
        else:
            self.session = Session.join(trainer, self)

    def _refuse_run(self, trainer: Any, message: str) -> None:
        """Refuse a run; an automatic callback only disables itself."""
        if not self.automatic:
            raise MisconfigurationException(message)
        self.disable(trainer, message)

    def _leave_session(self) -> None:
        session, self.session = self.session, None
        if session is not None:
            session.leave(self)

    def __getstate__(self) -> dict[str, Any]:
        # A copy, here or in another process, has no Trainer yet. `log` and `log_dict` belong to the module:
        # Lightning puts them on every callback while it runs. Contained hooks belong to the session.
        not_ours = ("session", "log", "log_dict", *HOOKS)
        return {name: value for name, value in vars(self).items() if name not in not_ours}


class StabilityCallback(SessionMember, Callback):
    """A Lightning callback that is shown each optimizer step as one record, while `fit` runs.

    Example:
        >>> class Norms(StabilityCallback):
        ...     def on_record(self, record):
        ...         print(record.step, record.total_norm, record.outcome)
        >>> Norms().order.name, Norms().guards
        ('OBSERVE', False)
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Join the Trainer's session."""

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Warn of a precision that the run has left, if nobody else does."""
        warn_of_forgotten_precision(self, trainer, checkpoint)


def take_out(callback: Any, trainer: Any, reason: object) -> None:
    """Take an automatic callback out of a Trainer, with one line that says why."""
    # Another list: Lightning may be on its way through this one.
    trainer.callbacks = [other for other in trainer.callbacks if other is not callback]
    warn_always(f"lightning-stability: {type(callback).__name__} disables itself in this run: {reason}")
