"""What the guard decided of one step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class Verdict:
    """What the guard decided of one step.

    Attributes:
        bad: 1.0 if this step's loss, gradients or buffers are not finite; float32, 0-dimensional, on the device.
        forward_good: Whether the loss and the buffers are finite, on the device; None if that is not known here.
        skipped: The same on the host, where it was read there; None where the device decided alone.
        found_inf: 1.0 if GradScaler found the gradients non-finite; None without its word.
        held: 1.0 if the update was held back because an earlier step has ended the run.
        buffer: Index of a buffer that the forward pass made non-finite, and 1.0 if there is one.
        rejected: 1.0 if a batch of this step was rejected for its input; None if nobody rejects batches.
        spike: 1.0 if its loss or gradient norm is above a limit; None if nobody has set one.
    """

    bad: Tensor
    forward_good: Tensor | None = None
    skipped: bool | None = None
    found_inf: Tensor | None = None
    held: Tensor | None = None
    buffer: tuple[Tensor, Tensor] | None = None
    rejected: Tensor | None = None
    spike: Tensor | None = None

    @property
    def ordinary(self) -> Tensor:
        """1.0 if the loss and the buffers are finite, so that GradScaler may have an answer."""
        return torch.ones_like(self.bad) if self.forward_good is None else self.forward_good.float()

    @property
    def unwanted(self) -> Tensor:
        """1.0 if the update must not be made, for what the step itself is."""
        passed_over = self.passed_over
        return self.bad if passed_over is None else torch.maximum(self.bad, passed_over)

    @property
    def passed_over(self) -> Tensor | None:
        """1.0 if the step is to be left out without being bad; None if nobody says so."""
        if self.rejected is None or self.spike is None:
            return self.spike if self.rejected is None else self.rejected
        return torch.maximum(self.rejected, self.spike)
