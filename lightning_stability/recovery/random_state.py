"""The random state of Python, numpy and torch in this process."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(slots=True)
class RandomState:
    """The random state of Python, numpy and torch in this process."""

    python: Any
    numpy: Any
    cpu: Tensor
    cuda: Tensor | None
    device: torch.device

    @classmethod
    def taken(cls, device: torch.device) -> RandomState:
        """The current state; of devices, that of this one besides the CPU's."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda, device)

    def restore(self) -> None:
        """Set the generators to this state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
