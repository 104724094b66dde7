"""The random state of one process: Python's, numpy's and torch's, as plain numbers and tensors."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

RandomState = dict[str, Any]


def capture_random_state() -> RandomState:
    """Return the state of every global generator, in a form that loads with `weights_only=True`.

    Example:
        >>> state = capture_random_state()
        >>> first = random.random(), np.random.rand(), torch.rand(()).item()
        >>> restore_random_state(state)
        >>> first == (random.random(), np.random.rand(), torch.rand(()).item())
        True
    """
    version, words, gauss = random.getstate()
    state: RandomState = {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "torch": torch.get_rng_state(),
    }
    numpy_state: Any = np.random.get_state(legacy=False)
    if numpy_state["bit_generator"] == "MT19937":
        state["numpy"] = {
            "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def restore_random_state(state: RandomState) -> None:
    """Set every global generator that the state has.

    Args:
        state: What `capture_random_state` returned.
    """
    python = state["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    torch.set_rng_state(state["torch"].cpu())
    if "numpy" in state:
        numpy_state = state["numpy"]
        key = numpy_state["key"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", key, numpy_state["pos"], numpy_state["has_gauss"], numpy_state["gauss"]))
    if "cuda" in state and torch.cuda.is_available():
        for device, device_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(device_state.cpu(), device)
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"].cpu())
