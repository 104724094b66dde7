"""Which callbacks every Trainer of the environment gets, and how they come and go with a fit.

`lightning_stability_plugin` holds the entry points themselves.
"""

from __future__ import annotations

import ast
import contextlib
import copyreg
import inspect
import os
from typing import Any

from pytorch_lightning.utilities.rank_zero import rank_zero_info

from lightning_stability._compat import MisconfigurationException, is_instance_by_name
from lightning_stability.callbacks import (
    FractionalCheckpoint,
    GradNormMonitor,
    IncidentReport,
    InputCheck,
    NaNEarlyStop,
    PrecisionFallback,
    SpikeRecovery,
)
from lightning_stability.callbacks.base import take_out

CALLBACKS: tuple[type[Any], ...] = (
    NaNEarlyStop,
    GradNormMonitor,
    FractionalCheckpoint,
    PrecisionFallback,
    InputCheck,
    IncidentReport,
    SpikeRecovery,
)
"""Every callback of the package: what `LIGHTNING_STABILITY_CALLBACKS` knows, and what `all` stands for."""

DEFAULT: tuple[type[Any], ...] = (NaNEarlyStop, GradNormMonitor)
"""Those that every Trainer gets if the variable is not set."""


class AutomaticCallbacks:
    """The automatic callbacks of one Trainer during one fit.

    A callback of the user's own, or of `configure_callbacks`, takes the place of the automatic one of its class.
    One that cannot serve this run disables itself with a warning.

    Args:
        variable: The environment variable that names them.

    Raises:
        MisconfigurationException: If it names what there is not.
    """

    def __init__(self, variable: str) -> None:
        self._variable = variable
        try:
            self.callbacks = chosen(os.environ.get(variable, ""))
        except MisconfigurationException as error:
            raise MisconfigurationException(f"{variable}: {error}") from error

    def join(self, trainer: Any, module: Any, host: Any) -> None:
        """Put them into the Trainer, before `host`, and set them up.

        Args:
            trainer: A Trainer of either namespace, in `setup`.
            host: The Trainer's callback that brings them.
        """
        # (automatic ones are here already if the list is that of another Trainer which is fitting)
        present = [callback for callback in trainer.callbacks if not getattr(callback, "automatic", False)]
        self.callbacks = [
            callback
            for callback in self.callbacks
            if not any(isinstance(other, type(callback)) for other in present) and _has_a_place(callback, trainer)
        ]
        first = [callback for callback in self.callbacks if not _is_checkpoint(callback)]
        last = [callback for callback in self.callbacks if _is_checkpoint(callback)]
        place = next(index for index, callback in enumerate(present) if callback is host)
        # Another list: Lightning is on its way through this one, and calls `setup` of no callback added to it.
        trainer.callbacks = [*present[:place], *first, *present[place:], *last]
        for callback in self.callbacks:
            callback.plain = host.plain
            try:
                callback.setup(trainer, module, "fit")
            except Exception as error:  # whatever it is: the run would go through without the package
                with contextlib.suppress(Exception):
                    callback.teardown(trainer, module, "fit")
                take_out(callback, trainer, error)

    def introduce(self, trainer: Any, module: Any) -> None:
        """One line that says what is active."""
        there = {id(callback) for callback in trainer.callbacks}
        names = [type(callback).__name__ for callback in self.callbacks if id(callback) in there]
        if names:
            rank_zero_info(
                f"lightning-stability: {_listed(names)} {'is' if len(names) == 1 else 'are'} active, as in every"
                f" Trainer here; {self._variable}=none switches this off."
            )

    def leave(self, trainer: Any, module: Any) -> None:
        """The Trainer's callbacks are the user's again.

        Args:
            module: The LightningModule if the callbacks are to be told that the fit is over; else Lightning does.
        """
        if module is not None:
            for callback in self.callbacks:
                with contextlib.suppress(Exception):
                    callback.teardown(trainer, module, "fit")
        ours = {id(callback) for callback in self.callbacks}
        trainer.callbacks = [callback for callback in trainer.callbacks if id(callback) not in ours]


def chosen(value: str) -> list[Any]:
    """New instances of the callbacks that the environment variable asks for.

    Args:
        value: `none`, `all`, or class names separated by commas, with options as in Python; empty for the default.

    Raises:
        MisconfigurationException: If a name or an option is unknown, or a value is not one for its option.

    Example:
        >>> [callback] = chosen("NaNEarlyStop(patience=2)")
        >>> callback.patience
        2
    """
    value = value.strip()
    if value == "none":
        return []
    if value in ("", "all"):
        callbacks = [cls() for cls in (CALLBACKS if value else DEFAULT)]
    else:
        callbacks = [_make(entry) for entry in _entries(value)]
    names = [type(callback).__name__ for callback in callbacks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise MisconfigurationException(f"{value!r} names {twice} twice; name each callback once.")
    for callback in callbacks:
        callback.automatic = True
        callback.asked_for = bool(value)
    return callbacks


def _entries(value: str) -> list[ast.expr]:
    try:
        body = ast.parse(value, mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise MisconfigurationException(_expected(f"{value!r} is not of the form Name(option=value)")) from error
    return body.elts if isinstance(body, ast.Tuple) else [body]


def _make(entry: ast.expr) -> Any:
    """Make `Name` or `Name(option=value, ...)`."""
    known = {cls.__name__: cls for cls in CALLBACKS}
    call = entry if isinstance(entry, ast.Call) else ast.Call(entry, [], [])
    if not isinstance(call.func, ast.Name):
        raise MisconfigurationException(_expected(f"{ast.unparse(entry)!r} is not of the form Name(option=value)"))
    if call.func.id not in known:
        raise MisconfigurationException(_expected(f"{call.func.id!r} is no callback of lightning-stability"))
    cls = known[call.func.id]
    return cls(**_options(cls, call)) if call.args or call.keywords else cls()


def _options(cls: type[Any], call: ast.Call) -> dict[str, Any]:
    from jsonargparse import ArgumentParser  # slow to import, and needed for options only

    known = [p.name for p in inspect.signature(cls).parameters.values() if p.kind is not p.VAR_KEYWORD]
    wrong = [f"{ast.unparse(value)!r} has no name in front" for value in call.args]
    given = [option.arg or f"**{ast.unparse(option.value)}" for option in call.keywords]
    wrong += [f"{name!r} is unknown" for name in given if name not in known]
    if wrong:
        raise MisconfigurationException(f"{cls.__name__}: option {wrong[0]}. Known options: {', '.join(known)}.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls)
    options = {str(option.arg): _literal(cls, option) for option in call.keywords}
    try:
        return dict(vars(parser.parse_object(options)))
    except Exception as error:
        raise MisconfigurationException(f"{ast.unparse(call)}: {' '.join(str(error).split())}") from error


def _literal(cls: type[Any], option: ast.keyword) -> Any:
    try:
        return ast.literal_eval(option.value)
    except (ValueError, TypeError) as error:
        raise MisconfigurationException(
            f"{cls.__name__}: {option.arg}={ast.unparse(option.value)} is no value. Expected a number, a text in"
            " quotes, True, False, None, or a list of these."
        ) from error


def _expected(what: str) -> str:
    names = ", ".join(cls.__name__ for cls in CALLBACKS)
    return (
        f"{what}. Expected none, all, or names of {names}, separated by commas, with options as in"
        " NaNEarlyStop(patience=2)."
    )


def _has_a_place(callback: Any, trainer: Any) -> bool:
    """Whether the callback would do anything; with `enable_checkpointing=False` none shall save."""
    if _is_checkpoint(callback):
        return bool(trainer.checkpoint_callbacks) and not trainer.fast_dev_run
    is_needed = getattr(callback, "is_needed", None)
    return is_needed is None or bool(is_needed(trainer))


def _is_checkpoint(callback: Any) -> bool:
    return is_instance_by_name(callback, "Checkpoint")


def _listed(names: list[str]) -> str:
    return " and ".join([*([", ".join(names[:-1])] if names[:-1] else []), names[-1]])


def _reduce(callback: Any) -> Any:
    """How pickle and copy see one of our callbacks: an automatic one loads where the package is not installed."""
    return (callback.plain, ()) if getattr(callback, "automatic", False) else callback.__reduce_ex__(4)


for _cls in CALLBACKS:
    copyreg.pickle(_cls, _reduce)
