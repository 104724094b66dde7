"""Whatever differs between `pytorch_lightning` and `lightning.pytorch`, two copies of one code base.

A Trainer of one runs callbacks of the other, but its `isinstance` checks know only its own classes, and an
`except MisconfigurationException` catches only its own. So every class here derives from both copies when
both are installed. The second import costs about 0.2 s; `lightning` may be absent.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lightning_utilities.core import rank_zero


@contextlib.contextmanager
def _as_if_alone(other: str) -> Iterator[None]:
    """Import one of the two so that the process of a user of the other is as if it had not been.

    Each copy, when it is imported, makes its own logger that of all `rank_zero_info`, its own category that of all
    deprecations, and itself the one that formats warnings: a user who has silenced `pytorch_lightning` would hear it
    again as `lightning.pytorch`.
    """
    if other not in sys.modules:
        yield
        return
    log, category, format_warning = rank_zero.log, rank_zero.rank_zero_deprecation_category, warnings.formatwarning
    try:
        yield
    finally:
        rank_zero.log, rank_zero.rank_zero_deprecation_category = log, category
        warnings.formatwarning = format_warning


with _as_if_alone("lightning.pytorch"):
    import pytorch_lightning as pl
    from lightning_fabric.utilities.exceptions import MisconfigurationException as _PlMisconfiguration
    from pytorch_lightning.callbacks import ModelCheckpoint as _PlModelCheckpoint

if TYPE_CHECKING:
    _CALLBACKS: tuple[type[pl.Callback], ...]

    class _CallbackBase(pl.Callback):
        pass

    class _ModelCheckpointBase(_PlModelCheckpoint):
        pass

    class _MisconfigurationBase(_PlMisconfiguration):
        pass

else:
    try:
        with _as_if_alone("pytorch_lightning"):
            from lightning.pytorch import Callback as _LightningCallback
            from lightning.pytorch.callbacks import ModelCheckpoint as _LightningModelCheckpoint
            from lightning.pytorch.utilities.exceptions import (
                MisconfigurationException as _LightningMisconfiguration,
            )
    except ImportError:
        _CallbackBase, _MisconfigurationBase = pl.Callback, _PlMisconfiguration
        _ModelCheckpointBase = _PlModelCheckpoint
    else:

        class _CallbackBase(pl.Callback, _LightningCallback):
            pass

        class _MisconfigurationBase(_PlMisconfiguration, _LightningMisconfiguration):
            pass

        class _ModelCheckpointBase(_PlModelCheckpoint, _LightningModelCheckpoint):
            pass


class Callback(_CallbackBase):
    """A callback for the Trainers of both namespaces."""


class ModelCheckpoint(_ModelCheckpointBase):
    """Lightning's ModelCheckpoint; the Trainers of both namespaces take it for their own."""


class MisconfigurationException(_MisconfigurationBase):
    """Raised when a Trainer cannot do what a callback was asked for; both namespaces' handlers catch it."""


_LIGHTNING_PACKAGES = ("pytorch_lightning.", "lightning.pytorch.")


def is_overridden(method: str, module: Any) -> bool:
    """Whether a LightningModule of either namespace brings its own version of one of Lightning's methods.

    Lightning's own `is_overridden` refuses a module of the other namespace.
    """
    if method in vars(module):
        return True
    function = getattr(type(module), method, None)
    return not getattr(function, "__module__", "").startswith(_LIGHTNING_PACKAGES)


def is_instance_by_name(instance: object, *names: str) -> bool:
    """Whether any class that the instance derives from has one of these names, in either namespace.

    For classes whose import is slow or needs an extra (DeepSpeed, XLA).
    """
    return any(cls.__name__ in names for cls in type(instance).__mro__)
