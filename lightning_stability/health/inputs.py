"""What the tensors of a batch say: their range and scale, and where they are not like those of earlier batches.

Everything is decided on the device where a tensor lies; nothing is read by the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_stability.health import input_scan
from lightning_stability.health.input_rules import REMEMBERED, WIDTH, Limits, TensorState
from lightning_stability.health.values import named_tensors
from lightning_stability.internals import has_own_dispatch


@dataclass(slots=True, eq=False)
class TensorStats:
    """One tensor of one batch, measured; still on its device.

    Attributes:
        name: Where it is in the batch, as `named_tensors` says.
        shape: Its shape.
        row: Float64, one number for each of `FIELDS`.
        samples: Float64, (samples, 3): for each position in dimension 0 the largest magnitude, the number of values
            that are not finite, and the root mean square of the distance to the usual mean. (The batch's own would let
            one outlier make all the others look like some; it serves where there is no earlier batch.)
        is_first: Whether this tensor was not measured before.
        constant: Which channels are constant, int8, if it is the first time and there are channels; else None.
    """

    name: str
    shape: tuple[int, ...]
    row: Tensor
    samples: Tensor
    is_first: bool
    constant: Tensor | None = None

    @property
    def has_scale(self) -> bool:
        """Whether it has a deviation worth a name; of a tensor with one dimension or none only magnitudes count."""
        return len(self.shape) > 1

    @property
    def flag(self) -> Tensor:
        """1.0 if it is not to be trained on; 0-dimensional, float64, on the device."""
        return self.row[WIDTH - 1]


class InputMeter:
    """Measures the floating tensors of batches and compares each with its own past.

    Of each tensor: the largest magnitude, the deviation, the number of values that are not finite, and the same for
    each sample (position in dimension 0); and which channels (dimension 1) are constant over all samples and positions.
    Integers, bool, complex, sparse and empty tensors are passed over.

    Deviations neither overflow, at 1e30, nor cancel beside a large mean: sums are of differences from a
    value of the tensor or its mean, and run in float64 where float32 would not be exact enough.

    On an NVIDIA GPU with Triton each tensor is read once, and again where float32 did not do, by two kernels
    (`input_scan`); elsewhere by torch, in a handful of passes.

    A tensor is not to be trained on if a value is not finite and half of the batches before or more held none such; if
    a magnitude exceeds `max_abs`; if its deviation differs from the geometric mean of those of earlier batches by more
    than `max_scale_ratio`. Such batches do not enter that mean; but once `input_rules.ADOPTED` in a row have differed
    from it, or half as many if it is the first batch's own, the last of them is the usual from then on: an outlier in
    the first batch must not condemn all others. A channel that is constant and varied in every batch before is
    warned of, and no more: data that is fine has such too (an empty class of a mask, a silent clip).

    What is so by design must pass. -inf beside nothing but 0 is an additive attention mask, in whatever batch. Other
    values that are not finite may code what is missing: the majority of the batches decides, since a batch in which by
    chance nothing is missing must not condemn those that follow, nor a bad first one let all of them pass. Only
    tensors with three dimensions or more have channels: a feature of (samples, features) that is rarely anything but
    0 is constant in a small batch by chance. And a tensor that never had a deviation, as a mask without padding, has
    no channel that could have lost it.

    Example:
        >>> from lightning_stability.health.input_rules import FIELDS
        >>> meter = InputMeter(max_abs=None, max_scale_ratio=100.0)
        >>> [stats] = meter.measure({"eeg": torch.randn(4, 3, 100), "label": torch.tensor([0, 1, 1, 0])})
        >>> stats.name, bool(stats.flag)
        ("batch['eeg']", False)
        >>> [stats] = meter.measure({"eeg": torch.full((4, 3, 100), torch.nan), "label": torch.tensor([0, 1, 1, 0])})
        >>> bool(stats.flag), int(stats.row[FIELDS.index("nonfinite")])
        (True, 1200)
    """

    def __init__(self, max_abs: float | None, max_scale_ratio: float) -> None:
        self._max_abs = math.inf if max_abs is None else float(max_abs)
        self._max_abs_of_float32 = float(np.float32(self._max_abs))  # a limit of 0.1 is meant to let that 0.1 pass
        self._log_ratio = math.log(max_scale_ratio)
        self._states: dict[str, TensorState] = {}

    @torch.no_grad()
    def measure(self, batch: Any) -> list[TensorStats]:
        """Measure every floating tensor of a batch, in any nesting."""
        tensors = [(name, tensor.detach()) for name, tensor in named_tensors(batch) if _is_measured(tensor)]
        return [self._measure(name, tensor) for name, tensor in tensors]

    def _measure(self, name: str, tensor: Tensor) -> TensorStats:
        samples = tensor.shape[0] if tensor.dim() else 1
        channels = tensor.shape[1] if tensor.dim() > 1 else 1
        values = tensor.reshape(samples, channels, -1)
        state = self._state_of(name, values)
        has_scale = tensor.dim() > 1
        limits = Limits(
            self._max_abs if tensor.dtype == torch.float64 else self._max_abs_of_float32,
            self._log_ratio if has_scale else math.inf,
            watch_channels=tensor.dim() > 2 and state.channels is not None and samples * values.shape[2] > 1,
            has_past=state.batches > 0,
        )
        row, of_samples = input_scan.scan(values, state, limits)
        is_first, constant = state.batches == 0, None
        if is_first and limits.watch_channels and state.channels is not None:
            constant = state.channels.clone()
        state.batches += 1
        return TensorStats(name, tuple(tensor.shape), row, of_samples, is_first, constant)

    def _state_of(self, name: str, values: Tensor) -> TensorState:
        channels, device = values.shape[1], values.device
        state = self._states.get(name)
        if state is None:
            no_channels = torch.zeros(channels, dtype=torch.int8, device=device)
            state = TensorState(torch.zeros(REMEMBERED, dtype=input_scan.wide(device), device=device), no_channels)
            self._states[name] = state
        if state.scale.device != device:
            state.scale = state.scale.to(device, input_scan.wide(device))
            state.channels = None if state.channels is None else state.channels.to(device)
            state.stamps = state.partials = None
        if state.channels is not None and state.channels.numel() != channels:
            state.channels = None  # they are no channels: time steps of sequences of unequal length, say
        return state

    def state_dict(self) -> dict[str, Any]:
        """What is remembered, on the host; waits for the device."""
        return {
            name: {
                "scale": state.scale.cpu(),
                "channels": None if state.channels is None else state.channels.cpu(),
                "batches": state.batches,
            }
            for name, state in self._states.items()
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what was remembered."""
        self._states = {
            name: TensorState(_scale_of(state["scale"]), _copied(state["channels"]), state["batches"])
            for name, state in state_dict.items()
        }


def _scale_of(saved: Tensor) -> Tensor:
    """Older checkpoints do not count the batches that are not finite: the next one is judged as a first one is."""
    return torch.cat([saved, saved.new_ones(REMEMBERED - saved.numel())])


def _copied(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def _is_measured(tensor: Tensor) -> bool:
    return (
        (hasattr(tensor, "to_local") or not has_own_dispatch(tensor))
        and tensor.is_floating_point()
        and tensor.layout == torch.strided
        and not tensor.is_nested
        and not tensor.is_quantized
        and tensor.device.type != "meta"
        and tensor.numel() > 0
    )
