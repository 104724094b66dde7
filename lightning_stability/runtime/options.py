"""The options of an optimizer, looked at before each step: one that is not finite makes non-finite weights."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

_FINITE = (bool, type(None), int, str)


def nonfinite_option(optimizer: Optimizer) -> str | None:
    """An option of the optimizer that is not finite, as `name=value`; those on a device are not read."""
    for group in optimizer.param_groups:
        for name, value in group.items():
            if name == "params" or type(value) in _FINITE or (type(value) is float and math.isfinite(value)):
                continue  # the usual ones, at every step
            if not all(map(_is_finite, _numbers(value))):
                return f"{name}={float(value) if isinstance(value, Tensor) else value}"
    return None


def _numbers(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)


def _is_finite(value: Any) -> bool:
    if type(value) is float:
        return math.isfinite(value)
    if isinstance(value, Tensor):
        return value.device.type != "cpu" or value.numel() != 1 or math.isfinite(value)
    return not isinstance(value, numbers.Real) or math.isfinite(value)
