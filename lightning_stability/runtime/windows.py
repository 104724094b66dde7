"""The batches of the newest accumulation windows, and the state from before each: what training them again needs."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_stability.health import StepRecord
from lightning_stability.health.values import tensors_of
from lightning_stability.internals import scaler_state
from lightning_stability.recovery.metric_undo import MetricUndo
from lightning_stability.recovery.random_state import RandomState
from lightning_stability.recovery.undo import BufferUndo

Convert = Callable[[Any], Any]
Options = list[dict[str, Any]]


class UncastBatch:
    """A batch before a 16-true precision casts it, and the random state that the module's transfer hooks start from."""

    def __init__(self, batch: Any, device: torch.device) -> None:
        self._batch = batch
        self._random = RandomState.capture(device)

    def converted(self, convert: Convert) -> Any:
        """Cast and transferred for another precision, with the same augmentation."""
        self._random.restore()
        return convert(self._batch)


@dataclass(slots=True)
class WindowBatch:
    """One batch of a window, with what runs it."""

    closure: Callable[[], Any]
    kwargs: dict[str, Any]
    uncast: UncastBatch | None
    random: RandomState
    versions: list[int] = field(default_factory=list)

    @property
    def batch(self) -> Any:
        """What `training_step` was called with."""
        return next(iter(self.kwargs.values()), None)

    def changed_in_place(self) -> bool:
        """Whether `training_step` wrote into it, so that training on it again would be something else."""
        return self.versions != _versions(self.kwargs)


class Window:
    """The batches of one optimizer step; if it is to be trained again, buffers and metric states from before it too."""

    def __init__(self, module: nn.Module, results: Callable[[], Any], device: torch.device, copies: bool) -> None:
        self.module = module
        self._copies = (BufferUndo(module), MetricUndo(module, results)) if copies else ()
        self._results = results
        self._device = device
        self.batches: list[WindowBatch] = []
        self.scaler: list[torch.Tensor] = []
        """GradScaler's state before the step: a held step has counted as a good one."""
        self.options: Options = []
        """The optimizer's options when it stepped: a scheduler has moved them by the time a window is trained again."""
        self.is_too_long = False
        """Whether it has had more batches than are kept: then none is."""

    def rescan(self) -> None:
        """An epoch begins: modules, buffers and metrics may be others."""
        for copy in self._copies:
            copy.rescan()

    def add(self, closure: Callable[[], Any], kwargs: dict[str, Any], uncast: UncastBatch | None) -> None:
        """A batch is about to be trained."""
        if not self.batches:
            for copy in self._copies:
                copy.remember()
        random = RandomState.capture(self._device)
        self.batches.append(WindowBatch(closure, kwargs, uncast, random, _versions(kwargs)))

    def add_up_to(self, most: float, closure: Any, kwargs: dict[str, Any], uncast: UncastBatch | None) -> None:
        """The same, unless there are more batches than that: then all are let go of."""
        if len(self.batches) < most and not self.is_too_long:
            self.add(closure, kwargs, uncast)
        else:
            self.batches.clear()
            self.is_too_long = True

    def clear(self) -> None:
        """Let go of the batches."""
        self.batches.clear()
        self.is_too_long = False

    def changed_in_place(self) -> bool:
        """Whether `training_step` wrote into one of its batches."""
        return any(batch.changed_in_place() for batch in self.batches)

    def restore(self) -> None:
        """Restore buffers and metric states to before the first batch."""
        for copy in self._copies:
            copy.restore(torch.tensor(True))

    @contextlib.contextmanager
    def as_before(self) -> Iterator[None]:
        """Buffers and metric states are those from before the first batch; afterwards what they were."""
        if not self._copies:
            yield
            return
        buffers, metrics = BufferUndo(self.module), MetricUndo(self.module, self._results)
        buffers.remember()
        snapshot = metrics.snapshot()
        self.restore()
        try:
            yield
        finally:
            buffers.restore(torch.tensor(True))
            metrics.restore_snapshot(snapshot)

    def again(self, convert: Convert) -> Iterator[Callable[[], Any]]:
        """What runs the batches again, in order; to be run as it is asked for, since random states are restored then.

        Args:
            convert: Makes a batch for another precision from one that was not cast.
        """
        for batch in self.batches:
            if batch.uncast is not None:
                batch.kwargs["batch"] = batch.uncast.converted(convert)
            batch.random.restore()
            yield batch.closure


@dataclass(frozen=True)
class BadStep:
    """A step whose update was skipped, whole: for whoever wants to know why it was bad.

    The weights and the optimizer's state are as they were before it, unless `is_late`. Buffers and metric states are
    too, inside of `before()`, for a listener that asked for copies.

    Attributes:
        record: Its numbers.
        window: Its batches with the random state before each; in manual optimization a `ManualWindow`. They are let go
            of when the listener returns.
        optimizer: The bare torch optimizer.
        trainer: The Trainer.
        is_late: Whether another update was made before the verdict was known.
    """

    record: StepRecord
    window: Window | None
    optimizer: Optimizer | None
    trainer: Any
    is_late: bool = False

    @contextlib.contextmanager
    def before(self) -> Iterator[None]:
        """Around what needs buffers, metric states and the optimizer's options as they were for this step."""
        if self.window is None or self.optimizer is None or not self.window.options:
            yield
            return
        options = options_of(self.optimizer)
        with self.window.as_before():
            set_options(self.optimizer, self.window.options)
            try:
                yield
            finally:
                set_options(self.optimizer, options)


class Windows:
    """The open window and those before it whose verdict is still on its way.

    Keeps references to their batches (they stay in memory until then), the random state before each, and copies of
    the buffers and metric states from before each window.

    Args:
        results: Returns what `self.log` accumulates.
        lag: How many closed windows are kept until their verdict is known.
        copies: Whether they may be trained again: then buffers and metric states are copied before each.
        most: Batches of a window above which none of them is kept.
    """

    def __init__(
        self,
        module: nn.Module,
        results: Callable[[], Any],
        device: torch.device,
        lag: int,
        copies: bool = True,
        most: float = math.inf,
    ) -> None:
        self._free = [Window(module, results, device, copies) for _ in range(lag + 1)]
        self._most = most
        self.open = self._free.pop()
        self.closed: deque[Window] = deque()

    def rescan(self) -> None:
        """An epoch begins."""
        for window in (self.open, *self.closed, *self._free):
            window.rescan()

    def add(self, closure: Callable[[], Any], kwargs: dict[str, Any], uncast: UncastBatch | None) -> None:
        """A batch is about to be trained."""
        self.open.add_up_to(self._most, closure, kwargs, uncast)

    def note_scaler(self, plugin: Any) -> None:
        """The open window's step is about to be made."""
        self.open.scaler = scaler_state(plugin)

    def close(self, optimizer: Optimizer) -> None:
        """The optimizer has stepped: the next window begins. The oldest closed one is given up if there is no room."""
        self.open.options = options_of(optimizer)
        self.closed.append(self.open)
        if not self._free:
            self.release()
        self.open = self._free.pop()

    def release(self) -> None:
        """The oldest closed window's verdict is known: let go of its batches."""
        window = self.closed.popleft()
        window.clear()
        self._free.append(window)


def options_of(optimizer: Optimizer) -> Options:
    """Every option of its parameter groups; tensors are copied, since they are written in place."""
    return [
        {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in group.items() if n != "params"}
        for group in optimizer.param_groups
    ]


def set_options(optimizer: Optimizer, options: Options) -> None:
    """Set the options of its parameter groups."""
    for group, values in zip(optimizer.param_groups, options, strict=True):
        for name, value in values.items():
            if isinstance(group.get(name), torch.Tensor):
                group[name].copy_(value)
            else:
                group[name] = value


def _versions(kwargs: Any) -> list[int]:
    return [tensor._version for tensor in tensors_of(kwargs)]
