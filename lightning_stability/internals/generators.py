"""The memory of numpy's global generator."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

_MT19937_BYTES = 624 * 4 + 4  # its words, and the position in them


def numpy_memory() -> bytes | None:
    """What numpy's global generator holds, but for half of a pair of normal numbers; None if it is of another kind.

    `np.random.get_state()` makes Python numbers of it, which takes a hundred times as long.
    """
    generator: Any = np.random.mtrand._rand._bit_generator  # type: ignore[attr-defined]
    if type(generator) is not np.random.MT19937:
        return None
    return ctypes.string_at(generator.ctypes.state_address, _MT19937_BYTES)
