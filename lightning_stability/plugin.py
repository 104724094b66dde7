"""Which callbacks every Trainer of the environment gets, and how they come and go with a fit.

`lightning_stability_plugin` holds the entry points themselves.
"""

from __future__ import annotations

import inspect
import os
import re
from typing import Any

from pytorch_lightning.utilities.rank_zero import rank_zero_info

from lightning_stability._compat import MisconfigurationException, is_instance_by_name
from lightning_stability.callbacks import (
    FractionalCheckpoint,
    GradNormMonitor,
    InputCheck,
    NaNEarlyStop,
    PrecisionFallback,
)
from lightning_stability.callbacks.base import take_out
from lightning_stability_plugin import VARIABLE

CALLBACKS: tuple[type[Any], ...] = (
    NaNEarlyStop,
    GradNormMonitor,
    FractionalCheckpoint,
    PrecisionFallback,
    InputCheck,
)
"""Every callback of the package: what `LIGHTNING_STABILITY_CALLBACKS` knows, and what `all` stands for."""

DEFAULT: tuple[type[Any], ...] = (NaNEarlyStop, GradNormMonitor)
"""Those that only observe and stop."""


class Guests:
    """The automatic callbacks of one Trainer during one fit.

    A callback of the user's own, or of `configure_callbacks`, takes the place of the automatic one of its class.
    One that cannot serve this run stands aside with a warning.

    Args:
        trainer: A Trainer of either namespace, in `setup`.
        module: The LightningModule.
        host: The Trainer's callback before which they take their places.

    Raises:
        MisconfigurationException: If the environment variable names what there is not.
    """

    def __init__(self, trainer: Any, module: Any, host: Any) -> None:
        _dismiss(trainer, module, [c for c in trainer.callbacks if getattr(c, "automatic", False)])  # copied in a fit
        self.callbacks = [
            callback
            for callback in chosen(os.environ.get(VARIABLE, ""))
            if not any(isinstance(other, type(callback)) for other in trainer.callbacks)
            and _has_a_place(callback, trainer)
        ]
        first = [callback for callback in self.callbacks if not _is_checkpoint(callback)]
        last = [callback for callback in self.callbacks if _is_checkpoint(callback)]
        place = trainer.callbacks.index(host)
        # Another list: Lightning is on its way through this one, and calls `setup` of no callback added to it.
        trainer.callbacks = [*trainer.callbacks[:place], *first, *trainer.callbacks[place:], *last]
        for callback in self.callbacks:
            try:
                callback.setup(trainer, module, "fit")
            except Exception as error:  # whatever it is: the run would go through without the package
                take_out(callback, trainer, error)

    def introduce(self, trainer: Any) -> None:
        """One line that says what is active.

        Args:
            trainer: The Trainer.
        """
        names = [type(callback).__name__ for callback in self.callbacks if callback in trainer.callbacks]
        if names:
            rank_zero_info(
                f"lightning-stability: {' and '.join(names)} {'is' if len(names) == 1 else 'are'} active, as in every"
                f" Trainer here; {VARIABLE}=none switches this off."
            )

    def take_out(self, trainer: Any) -> None:
        """The fit is over: the Trainer's callbacks are the user's again. Lightning still tells each that it ends.

        Args:
            trainer: The Trainer.
        """
        trainer.callbacks = [callback for callback in trainer.callbacks if callback not in self.callbacks]


def chosen(value: str) -> list[Any]:
    """New instances of the callbacks that the environment variable asks for.

    Args:
        value: `none`, `all`, or class names separated by commas, with options as on the command line; empty for the
            ones that only observe and stop.

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
    if value == "all" or not value:
        callbacks = [cls() for cls in (CALLBACKS if value else DEFAULT)]
    else:
        callbacks = [_parse(entry) for entry in _split(value)]
    names = [type(callback).__name__ for callback in callbacks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise MisconfigurationException(f"{VARIABLE}={value!r} names {twice} twice; name each callback once.")
    for callback in callbacks:
        callback.automatic = True
        callback.asked_for = bool(value)
    return callbacks


def _dismiss(trainer: Any, module: Any, callbacks: list[Any]) -> None:
    for callback in callbacks:
        callback.teardown(trainer, module, "fit")
        trainer.callbacks = [other for other in trainer.callbacks if other is not callback]


def _has_a_place(callback: Any, trainer: Any) -> bool:
    """Whether the callback would do anything; with `enable_checkpointing=False` none shall save."""
    if _is_checkpoint(callback):
        return bool(trainer.checkpoint_callbacks) and not trainer.fast_dev_run
    is_needed = getattr(callback, "is_needed", None)
    return is_needed is None or bool(is_needed(trainer))


def _is_checkpoint(callback: Any) -> bool:
    return is_instance_by_name(callback, "Checkpoint")


def _parse(entry: str) -> Any:
    """Make `Name` or `Name(option=value,...)`."""
    known = {cls.__name__: cls for cls in CALLBACKS}
    match = re.fullmatch(r"(\w+)\s*(?:\((.*)\))?", entry, re.DOTALL)
    if match is None or match[1] not in known:
        what = "is not of the form Name(option=value)" if match is None else "is no callback of lightning-stability"
        raise MisconfigurationException(
            f"{VARIABLE}: {entry!r} {what}. Expected none, all, or a comma list of {', '.join(known)}, with options as"
            " in NaNEarlyStop(patience=2)."
        )
    cls = known[match[1]]
    return cls(**_options(cls, match[2])) if match[2] and match[2].strip() else cls()


def _options(cls: type[Any], text: str) -> dict[str, Any]:
    from jsonargparse import ArgumentParser  # slow to import, and needed for options only

    known = [name for name in inspect.signature(cls).parameters if name != "self"]
    words = []
    for option in _split(text):
        name, equals, value = (part.strip() for part in option.partition("="))
        if not equals or name not in known:
            what = "has no value" if not equals else "is unknown"
            raise MisconfigurationException(
                f"{VARIABLE}: {cls.__name__}: option {name!r} {what}. Known options: {', '.join(known)}."
            )
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
        words.append(f"--{name}={value[1:-1] if quoted else value}")  # as a shell does
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls)
    try:
        return dict(vars(parser.parse_args(words)))
    except Exception as error:
        raise MisconfigurationException(f"{VARIABLE}: {cls.__name__}({text}): {_plain(error)}") from error


def _plain(error: Exception) -> str:
    return " ".join(str(error).split())


def _split(text: str) -> list[str]:
    """Split at the commas that are in no bracket and no quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        if letter == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]
