"""The entry points that Lightning calls for every Trainer of the environment.

They stand outside of the package so that a Trainer that never fits does not pay for its import (0.1 to 0.4 s): what
they add to the Trainer is one callback that does nothing until `fit` begins. `lightning_stability.plugin` then says
which callbacks join.
"""

from __future__ import annotations

import functools
import importlib
import os
from multiprocessing.context import get_spawning_popen
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
    base = importlib.import_module(namespace).Callback  # imported already: its Trainer is asking
    return type("AutomaticCallbacks", (_Host, base), {"plain": base, "__module__": __name__, "namespace": namespace})


class _Host:
    """Brings the automatic callbacks into a Trainer when `fit` begins and takes them out when it ends.

    Lightning appends it to the user's own list of callbacks, which may be used for another Trainer: it keeps nothing
    between two fits, and of several in one Trainer the last one acts. Nothing that fails in it reaches the user's run,
    except an error in the environment variable.
    """

    namespace: str
    plain: type[Any]
    """The namespace's own `Callback`, which does nothing."""

    _automatic: Any = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Fit begins: the callbacks join."""
        if stage != "fit":
            return
        self._end(trainer, pl_module)  # left by a fit in which another callback's `on_exception` failed
        if trainer.barebones or not self._acts_in(trainer):
            return
        try:
            from lightning_stability.plugin import AutomaticCallbacks
        except Exception as error:  # a broken environment: the run would go through without the package
            self._warn(error)
            return
        self._automatic = AutomaticCallbacks(VARIABLE)  # an error in the variable is the user's to mend
        self._try(self._automatic.join, trainer, pl_module, self)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Say what is active."""
        if self._automatic is not None:
            self._try(self._automatic.introduce, trainer, pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Fit has failed, and no teardown will come. Lightning still tells each callback."""
        self._end(trainer, None)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Fit is over. Lightning still tells each callback."""
        self._end(trainer, None)

    def _acts_in(self, trainer: Any) -> bool:
        return [callback for callback in trainer.callbacks if isinstance(callback, _Host)][-1] is self

    def _try(self, hook: Any, trainer: Any, module: Any, *args: Any) -> None:
        try:
            hook(trainer, module, *args)
        except Exception as error:
            self._end(trainer, module)
            self._warn(error)

    def _end(self, trainer: Any, module: Any) -> None:
        """The Trainer's callbacks are the user's again.

        Args:
            trainer: The Trainer.
            module: The LightningModule if nobody else tells the callbacks that the fit is over.
        """
        automatic, self._automatic = self._automatic, None
        if automatic is not None:
            try:
                automatic.leave(trainer, module)
            except Exception as error:
                self._warn(error)

    def _warn(self, error: Exception) -> None:
        from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

        message = f"lightning-stability disables itself in this run: {type(error).__name__}: {error}"
        try:
            rank_zero_warn(message)
        except Warning:  # the user's filters make errors of warnings
            rank_zero_info(message)

    def __copy__(self) -> Any:
        return _make(self.namespace)

    def __deepcopy__(self, memo: Any) -> Any:
        return _make(self.namespace)

    def __reduce__(self) -> tuple[Any, ...]:
        # What is pickled may be loaded where the package is not installed; a process that is being spawned has it.
        return (self.plain, ()) if get_spawning_popen() is None else (_make, (self.namespace,))
