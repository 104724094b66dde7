"""What `checkpoints --replay --module tests.replayed:...` makes again."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from tests import checkpoint_fit as fits
from tests import runs

_calls = itertools.count()


def run() -> Any:
    """The module and the data of `checkpoint_fit.fit`."""
    pl = runs.load_namespace("pytorch_lightning")
    torch.manual_seed(0)
    return fits.make_module(pl), fits.loader("samples", 0, True)


def noisy() -> Any:
    """The same, computing something else each time."""
    module, data = run()
    training_step, noise = module.training_step, 1e-6 * next(_calls)

    def step(batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = training_step(batch, batch_idx) * (1 + noise)
        return loss

    module.training_step = step
    return module, data


def nothing() -> int:
    """No module."""
    return 3
