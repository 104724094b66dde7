"""The batches that an update may come from, where `training_step` itself steps the optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_stability.health import StepRecord
from lightning_stability.recovery.undo import BufferUndo
from lightning_stability.runtime.windows import Window


class ManualWindow(Window):
    """The batches since the last update before them.

    When it is shown, `training_step` is under way: nothing of the module is restored for it, since a backward pass may
    follow that needs the buffers as they are. What they were before is `buffers_before`.

    Args:
        results: Returns what `self.log` accumulates.
        copies: Whether buffers are copied before its first batch.
    """

    def __init__(self, module: nn.Module, results: Callable[[], Any], device: torch.device, copies: bool) -> None:
        super().__init__(module, results, device, copies=False)
        self._buffers = BufferUndo(module) if copies else None
        self.numbers: list[int] = []
        """Of its batches, counted over the whole run."""
        self.steps_before = 0
        """Optimizer steps since its first batch whose verdict is known."""

    def rescan(self) -> None:
        """An epoch begins."""
        if self._buffers is not None:
            self._buffers.rescan()

    def begin(self) -> None:
        """Its first batch comes next."""
        self.clear()
        self.numbers, self.steps_before = [], 0
        if self._buffers is not None:
            self._buffers.remember()

    @property
    def buffers_before(self) -> dict[str, Tensor]:
        """What each buffer was before the first batch, as far as it is known."""
        if self._buffers is None:
            return {}
        copies = ((name, self._buffers.copy_of(name)) for name, _ in self.module.named_buffers())
        return {name: copy.clone() for name, copy in copies if copy is not None}


class ManualWindows:
    """The newest windows of a run with manual optimization.

    Args:
        results: Returns what `self.log` accumulates.
        lag: By how many steps a verdict may be late.
        copies: Whether buffers are copied before each window.
        most: Batches of a window above which none of them is kept.
    """

    def __init__(
        self,
        module: nn.Module,
        results: Callable[[], Any],
        device: torch.device,
        lag: int,
        copies: bool,
        most: float,
    ) -> None:
        self._windows = [ManualWindow(module, results, device, copies) for _ in range(lag + 2)]
        self._most = most

    def rescan(self) -> None:
        """An epoch begins."""
        for window in self._windows:
            window.rescan()

    def add(self, number: int, args: tuple[Any, ...], begins: bool) -> None:
        """A batch is about to enter `training_step`.

        Args:
            number: Of the batch, counted over the whole run.
            begins: Whether no gradients of earlier batches wait for an update.
        """
        if begins or not self._windows[-1].numbers:
            self._windows.append(self._windows.pop(0))
            self._windows[-1].begin()
        window = self._windows[-1]
        window.numbers.append(number)
        window.add_up_to(self._most, lambda: None, dict(zip(("batch", "batch_idx"), args, strict=False)), None)

    def of(self, record: StepRecord) -> ManualWindow | None:
        """The window of a step, while it is kept."""
        return next((w for w in reversed(self._windows) if record.batch_number in w.numbers), None)

    def note(self, record: StepRecord) -> None:
        """A step's verdict is final."""
        window = self.of(record)
        if window is not None:
            window.steps_before += 1
