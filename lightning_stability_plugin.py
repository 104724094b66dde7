"""The entry points that Lightning calls for every Trainer of the environment.

They stand outside of the package so that a Trainer that never fits does not pay for its import (0.1 to 0.4 s): what
they add to the Trainer is one callback that does nothing until `fit` begins. `lightning_stability.plugin` then says
which callbacks join.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

VARIABLE = "LIGHTNING_STABILITY_CALLBACKS"


def for_pytorch_lightning() -> list[Any]:
    """What every Trainer of `pytorch_lightning` gets."""
    return _callbacks("pytorch_lightning")


def for_lightning() -> list[Any]:
    """What every Trainer of `lightning.pytorch` gets."""
    return _callbacks("lightning.pytorch")


def _callbacks(namespace: str) -> list[Any]:
    return [] if os.environ.get(VARIABLE, "").strip() == "none" else [_make(namespace)]


def _make(namespace: str) -> Any:
    return _class_for(namespace)()


@functools.cache
def _class_for(namespace: str) -> type:
    base = importlib.import_module(namespace).Callback  # loaded long since: its Trainer is asking
    return type("AutomaticCallbacks", (_Host, base), {"namespace": namespace, "__module__": __name__})


class _Host:
    """Brings the automatic callbacks into a Trainer when `fit` begins and takes them out when it ends.

    Lightning appends it to the user's own list of callbacks, which may be used for another Trainer: it keeps nothing
    between two fits, and of several in one Trainer the last one acts.
    """

    namespace: str
    _guests: Any = None

    @property
    def state_key(self) -> str:
        """One of its own for each: Lightning refuses two callbacks of one key. There is never a state to save."""
        return f"AutomaticCallbacks{id(self)}"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Fit begins: the callbacks join."""
        if stage == "fit" and not trainer.barebones and self._acts_in(trainer):
            from lightning_stability.plugin import Guests

            self._guests = Guests(trainer, pl_module, self)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Say what is active."""
        if self._guests is not None:
            self._guests.introduce(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Fit has failed, and no teardown will come."""
        self._take_out(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Fit is over."""
        self._take_out(trainer)

    def _acts_in(self, trainer: Any) -> bool:
        return [callback for callback in trainer.callbacks if isinstance(callback, _Host)][-1] is self

    def _take_out(self, trainer: Any) -> None:
        guests, self._guests = self._guests, None
        if guests is not None:
            guests.take_out(trainer)

    def __reduce__(self) -> tuple[Any, ...]:
        return _make, (self.namespace,)
