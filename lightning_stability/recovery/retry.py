"""Training the batches of an optimizer step once more, as if the first try had not been."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_stability.health.values import named_tensors
from lightning_stability.recovery.metric_undo import MetricSnapshot, MetricUndo
from lightning_stability.recovery.undo import BufferUndo


class UncastBatch:
    """A batch before a 16-true precision converts it, and the random state that the module's transfer hooks start from.

    Args:
        batch: As the loader gave it.
        device: Where the module is trained.
    """

    def __init__(self, batch: Any, device: torch.device) -> None:
        self._batch = batch
        self._random = RandomState.taken(device)

    def converted(self, convert: Callable[[Any], Any]) -> Any:
        """Made for another precision, with the same augmentation.

        Args:
            convert: Casts it and runs the transfer hooks.
        """
        self._random.put_back()
        return convert(self._batch)


@dataclass(slots=True)
class _Batch:
    """One batch of the open window, with what runs it."""

    closure: Callable[[], Any]
    kwargs: dict[str, Any]
    uncast: UncastBatch | None
    versions: list[int]
    random: RandomState

    def changed_in_place(self) -> bool:
        return self.versions != [tensor._version for _, tensor in named_tensors(self.kwargs)]


class OpenWindow:
    """The batches since the last optimizer step and the state before the first of them.

    Keeps references to the batches of one accumulation window (they stay in memory until the optimizer steps), the
    random state before each (augmentation draws from it in between), and copies of the buffers and metric states.

    Args:
        module: The LightningModule.
        results: Returns what `self.log` accumulates.
        device: Where the module is trained.
    """

    def __init__(self, module: nn.Module, results: Callable[[], Any], device: torch.device) -> None:
        self._buffers = BufferUndo(module)
        self._metrics = MetricUndo(module, results)
        # the same of the failed try, should the next one not help
        self._tried_buffers = BufferUndo(module)
        self._tried_metrics: list[MetricSnapshot] = []
        self._device = device
        self._batches: list[_Batch] = []

    def rescan(self) -> None:
        """An epoch begins: modules, buffers and metrics may be others."""
        self._buffers.rescan()
        self._metrics.rescan()

    def add(self, closure: Callable[[], Any], kwargs: dict[str, Any], uncast: UncastBatch | None) -> None:
        """A batch is about to be trained.

        Args:
            closure: Runs the forward and the backward pass.
            kwargs: What `training_step` will be called with; the closure reads it when it runs.
            uncast: Where a precision casts batches.
        """
        if not self._batches:
            self._buffers.remember()
            self._metrics.remember()
        versions = [tensor._version for _, tensor in named_tensors(kwargs)]
        self._batches.append(_Batch(closure, kwargs, uncast, versions, RandomState.taken(self._device)))

    def close(self) -> None:
        """The optimizer has stepped: let go of the batches."""
        self._batches.clear()

    @property
    def batches(self) -> int:
        """How many batches are kept."""
        return len(self._batches)

    def changed_in_place(self) -> bool:
        """Whether `training_step` wrote into a batch, so that training on it again would be something else."""
        return any(batch.changed_in_place() for batch in self._batches)

    def remember_try(self) -> None:
        """The batches are about to be trained again: keep what this try has left."""
        self._tried_buffers.rescan()
        self._tried_buffers.remember()
        self._tried_metrics = self._metrics.snapshot()

    def restore(self) -> None:
        """Put buffers and metric states back to before the first batch."""
        always = torch.tensor(True)
        self._buffers.nonfinite()
        self._buffers.give_back(always)
        self._metrics.give_back(always)

    def restore_try(self) -> None:
        """Put buffers and metric states back to what `remember_try` has kept."""
        self._tried_buffers.give_back(torch.tensor(True))
        self._metrics.put_back(self._tried_metrics)
        self._tried_metrics = []

    def again(self, convert: Callable[[Any], Any]) -> Iterator[Callable[[], Any]]:
        """What runs the batches again, in order; to be run as it is asked for, since random numbers are put back then.

        Args:
            convert: Makes a batch for another precision from one that was not cast.
        """
        for batch in self._batches:
            if batch.uncast is not None:
                batch.kwargs["batch"] = batch.uncast.converted(convert)
            batch.random.put_back()
            yield batch.closure


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
        """The state of now.

        Args:
            device: The device whose generator is meant besides the CPU's.
        """
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda, device)

    def put_back(self) -> None:
        """Set the generators to this state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
