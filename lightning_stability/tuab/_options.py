"""Refusing options that are out of range, by name, before anything is built."""

from __future__ import annotations

import math

from pytorch_lightning.utilities.exceptions import MisconfigurationException


def require(name: str, value: float, *, at_least: float = -math.inf, below: float = math.inf) -> None:
    """Refuse an option that is out of range.

    Args:
        name: As the user wrote it.
        at_least: The smallest value that is allowed.
        below: The value that it must not reach.

    Raises:
        MisconfigurationException: If ``value`` is not in that range.

    Example::

        >>> require("dropout", 1.5, at_least=0, below=1)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        lightning_fabric...MisconfigurationException: dropout must be at least 0 and below 1, got 1.5.
    """
    if at_least <= value < below:
        return
    limits = [f"at least {at_least:g}"] * (at_least > -math.inf) + [f"below {below:g}"] * (below < math.inf)
    raise MisconfigurationException(f"{name} must be {' and '.join(limits)}, got {value:g}.")
