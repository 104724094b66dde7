"""The norm of every gradient of one optimizer in one pass, left on the device."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_stability.health.buckets import buckets_of
from lightning_stability.health.late_reads import Array, LateReads, Part
from lightning_stability.health.pointer_norms import RIDERS, PointerNorms
from lightning_stability.health.record import FP32_LARGEST_NORM, FP64_LARGEST_NORM, Floats


@dataclass(slots=True)
class Measurement:
    """One step's numbers on the host.

    Attributes:
        grad_norms: Float64, one per parameter; 0 where there was no gradient.
        scalars: The numbers that travelled with them, by name.
        weight_norms: As `grad_norms`, if the update was measured.
        update_norms: As `grad_norms`, if the update was measured.
    """

    grad_norms: Floats
    scalars: dict[str, float]
    weight_norms: Floats | None = None
    update_norms: Floats | None = None


class GradientMeter:
    """Measures all gradients of one optimizer in one pass; clips with the result.

    Lists and names are made here, once; the runtime makes a new meter when `is_current` says that the trained
    parameters are others. Nothing waits for the device.

    On an NVIDIA GPU with Triton, `PointerNorms` is the pass. Elsewhere, for gradients that it does not take and
    where the norms drive the clipping, it is one `torch._foreach_norm` per dtype. On CUDA those norms stay where
    the pass left them, one tensor each, until somebody asks for `norms`, or until those of several steps are
    gathered on their way to the host.

    Norms are L2: the square root of the sum of squared magnitudes, of a complex element's too. They are
    accumulated in float64 on CUDA, where that costs nothing more and no fp32 square can overflow, except when
    they also drive the clipping: then in fp32 and in Lightning's order, so that clipping gives the same bits
    with and without us.

    Args:
        optimizer: The bare torch optimizer.
        names: Each parameter's name, by identity; a parameter that is missing there gets a number.
        drives_clipping: Whether `clip_` will be called.
        groups: Over which processes FSDP1 has sharded each parameter: see `buckets.shard_groups`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        names: Mapping[Tensor, str],
        drives_clipping: bool,
        groups: Mapping[Tensor, Any] | None = None,
    ) -> None:
        self._optimizer = optimizer
        self.drives_clipping = drives_clipping
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        self._buckets = buckets_of([p for group in self._groups for p in group], drives_clipping, groups)
        in_order = [parameter for bucket in self._buckets for parameter in bucket.parameters]
        self.parameter_names = tuple(names.get(p, f"unnamed_{i}") for i, p in enumerate(in_order))
        all_double = bool(in_order) and all(p.dtype in (torch.float64, torch.complex128) for p in in_order)
        self.largest_norm = FP64_LARGEST_NORM if all_double else FP32_LARGEST_NORM
        self._device = in_order[0].device if in_order else torch.device("cpu")
        self._on_host = self._device.type != "cuda"
        self._several_devices = len({bucket.device for bucket in self._buckets}) > 1
        self._sharded = any(bucket.sharded_over for bucket in self._buckets)
        wide = self._sharded or any(bucket.norm_dtype is torch.float64 for bucket in self._buckets)
        self._dtype = torch.float64 if wide or any(p.dtype == torch.float64 for p in in_order) else torch.float32
        self._gathers_at_once = drives_clipping and not self._on_host and self._dtype == torch.float32
        self._carrier = next((bucket for bucket in self._buckets if bucket.carries_scalars(self._device)), None)
        self.pointers = (
            None if drives_clipping or self._sharded or not PointerNorms.suit(in_order) else PointerNorms(in_order)
        )
        # One step's state, from `measure` to `send`.
        self.is_measured = False
        self._row: Tensor | None = None  # all norms, and numbers that travel with them
        self._total: Tensor | None = None
        self._riders: list[str] = []
        self._first_rider = 0  # where in the row they start
        self._norms: Sequence[Tensor] = ()
        self._vector: Tensor | None = None
        self._array: Array | None = None
        self._absent = False
        self._scalars: dict[str, Tensor] = {}
        self._values: dict[str, float] = {}
        self._before: list[list[Tensor]] | None = None
        self._weight_norms: Tensor | None = None

    def is_current(self) -> bool:
        """Whether the optimizer still holds exactly the parameters that this meter was made for."""
        now = self._optimizer.param_groups
        if len(now) != len(self._groups):
            return False
        for group, before in zip(now, self._groups, strict=True):
            parameters = group["params"]
            if len(parameters) != len(before) or not all(map(operator.is_, parameters, before)):
                return False
        return True

    @property
    def norms(self) -> Tensor:
        """The norm of every gradient as one vector on the device, in the order of `parameter_names`.

        As measured: an optimizer that unscales itself has the scale in them. Float64, or float32 where they
        drive the clipping or are on the host. Gathered when it is first asked for: that takes about a quarter
        of the pass, once per step.
        """
        if self._vector is None:
            row = self._row
            self._vector = self._gathered(self._norms) if row is None else row[: len(self.parameter_names)]
        return self._vector

    @property
    def measures_by_address(self) -> bool:
        """Whether the last measurement was one of `PointerNorms`."""
        return self._total is not None

    def measure(
        self, scalars: Mapping[str, Tensor], kept: Mapping[str, Tensor] | None = None, force: bool = False
    ) -> None:
        """Take the norm of every gradient as it is now. Until `send` or `discard` a second call does nothing.

        So it can be called where a module clips in manual optimization, and again at its step: the norm is the one from
        before clipping. `clip_` ends that too: gradients that come after it in the same step are others.

        Args:
            scalars: Numbers on the device, none of them negative, that travel to the host as they are now, by
                name.
            kept: Numbers that nobody writes again: they travel too, and need no copy now.
            force: Measure anew: an optimizer that evaluates its closure again has new gradients.
        """
        if self.is_measured and not force:
            return
        self._start_over()
        self.is_measured = True
        if self.pointers is not None and self._measure_by_address(self.pointers, scalars, kept or {}):
            return
        riders = {name: scalar for name, scalar in scalars.items() if self._rides_along(scalar)}
        if len(self._buckets) == 1 and not riders:
            [bucket] = self._buckets
            self._norms, self._absent = bucket.gradient_norms(), not bucket.regular
        else:
            self._norms = self._norms_of_all_buckets(riders)
        if self._gathers_at_once:
            self._gather_with_riders(scalars, kept or {})
            return
        for name, scalar in scalars.items():
            if name not in riders:
                self.put(name, scalar)
        if kept is not None:
            for name, scalar in kept.items():
                self._keep(name, scalar)
        if self._on_host:
            self._array = self._read_on_host()
        if self._sharded:
            self._add_up_shards(self.norms)

    @torch.no_grad()
    def total_norm(self) -> Tensor:
        """Norm of all gradients as measured, 0-dimensional, on the device."""
        if self._total is not None:
            return self._total
        return _norm_of(self.norms if self._array is None else torch.from_numpy(self._array))

    @torch.no_grad()
    def total_norm_now(self) -> Tensor:
        """The same of the gradients as they are now: a second pass."""
        norms = [norm for bucket in self._buckets for norm in bucket.gradient_norms()]
        vector = self._gathered(self._on_one_device(norms))
        self._add_up_shards(vector)
        return _norm_of(vector)

    @torch.no_grad()
    def clip_(self, max_norm: float) -> None:
        """Multiply the gradients with `min(1, max_norm / (total + 1e-6))`, as `clip_grad_norm_` does.

        Args:
            max_norm: The norm that the gradients shall not exceed.
        """
        norms = self.norms
        self.is_measured = False
        if self._absent and not self._sharded:
            # Lightning's total leaves absent gradients out; a zero in between would change the sum's order.
            norms = self._gathered(self._without_absent())
        total = torch.linalg.vector_norm(norms)
        if self._row is None:
            coefficient = torch.clamp(max_norm / (total + 1e-6), max=1.0)
            self._keep("clip_coefficient", coefficient)
        else:
            coefficient = torch.clamp(max_norm / (total + 1e-6), max=1.0, out=self._row[-1])
            if self._riders[-1:] != ["clip_coefficient"]:
                self._riders.append("clip_coefficient")
        for bucket in self._buckets:
            gradients = [gradient for gradient in bucket.gradients if gradient is not None]
            if gradients:
                torch._foreach_mul_(gradients, coefficient.to(bucket.device, gradients[0].dtype.to_real()))

    @torch.no_grad()
    def remember_weights(self) -> None:
        """Keep a copy of the weights, for the size of the coming update."""
        weights = [bucket.local(bucket.parameters) for bucket in self._buckets]
        self._weight_norms = self._norms_of(weights)
        self._before = [list(torch._foreach_add(bucket, 0)) for bucket in weights]

    def put(self, name: str, scalar: Tensor) -> None:
        """Add a number as it is now."""
        self._keep(name, scalar if self._on_host else scalar.detach().clone())

    def send(self, reads: LateReads, on_host: Callable[[Measurement], None]) -> None:
        """Start the numbers' way to the host and let go of the gradients.

        Args:
            reads: Takes them there.
            on_host: Called when they have arrived.
        """
        weights_and_update = [] if self._before is None else self._weights_and_update()
        scalars, values, riders = self._scalars, self._values, self._riders
        count, first_rider = len(self.parameter_names), self._first_rider
        array = self._array
        norms: Part
        if self._row is not None:
            norms = self._row
        else:
            norms = self._norms if self._vector is None and self._norms else self.norms
        for bucket in self._buckets:
            bucket.gradients = []
        self._start_over()

        def arrived(arrays: list[Array]) -> None:
            row = arrays[0].astype(np.float64)
            norms = row[:count]
            for place, name in enumerate(riders, first_rider):
                values[name] = float(row[place])
            for name, array in zip(scalars, arrays[1:], strict=False):
                values[name] = float(array[0])
            vectors = [array.astype(np.float64) for array in arrays[1 + len(scalars) :]]
            on_host(Measurement(norms, values, *vectors))

        if array is None:
            reads.send([norms, *([scalar] for scalar in scalars.values()), *weights_and_update], arrived)
        else:
            reads.hold([array, *(vector.numpy(force=True) for vector in weights_and_update)], arrived)

    def discard(self) -> None:
        """Forget a measurement that is not going to be sent, because its step does not take place."""
        self._start_over()
        self._before = self._weight_norms = None

    def _start_over(self) -> None:
        self.is_measured = False
        self._row, self._total, self._riders = None, None, []
        self._norms, self._vector, self._array, self._absent = (), None, None, False
        self._scalars, self._values = {}, {}

    def _measure_by_address(
        self, pointers: PointerNorms, scalars: Mapping[str, Tensor], kept: Mapping[str, Tensor]
    ) -> bool:
        riders = self._choose_riders(scalars, kept, RIDERS)
        row = pointers.measure(riders)
        if row is None:
            self._riders = []
            return False
        count = len(self.parameter_names)
        self._row, self._total, self._first_rider = row, row[count], count + 1
        self._keep_others(scalars, kept)
        return True

    def _gather_with_riders(self, scalars: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
        """Clipping needs the vector of norms anyway: what travels with it goes into the same launch."""
        riders = self._choose_riders(scalars, kept, len(scalars) + len(kept))
        count = len(self._norms)
        self._row = torch.empty(count + len(riders) + 1, dtype=self._dtype, device=self._device)
        with torch.inference_mode():
            torch.stack((*self._norms, *riders), out=self._row[:-1])  # the last is for the clip coefficient
        self._vector, self._first_rider = self._row[:count], count
        self._keep_others(scalars, kept)

    def _choose_riders(self, scalars: Mapping[str, Tensor], kept: Mapping[str, Tensor], most: int) -> list[Tensor]:
        riders: list[Tensor] = []
        self._riders = []
        for numbers in (scalars, kept):
            for name, number in numbers.items():
                # what is not fp32 travels on its own, and so does what has a dimension
                fits = number.dtype == torch.float32 and number.device == self._device and not number.dim()
                if fits and len(riders) < most:
                    self._riders.append(name)
                    riders.append(number)
        return riders

    def _keep_others(self, scalars: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
        for name, scalar in scalars.items():
            if name not in self._riders:
                self.put(name, scalar)
        for name, scalar in kept.items():
            if name not in self._riders:
                self._keep(name, scalar)

    @torch.no_grad()
    def _weights_and_update(self) -> list[Tensor]:
        assert self._before is not None
        assert self._weight_norms is not None
        for bucket, before in zip(self._buckets, self._before, strict=True):
            torch._foreach_sub_(before, bucket.local(bucket.parameters))
        weights, update = self._weight_norms, self._norms_of(self._before)
        self._before = self._weight_norms = None
        return [weights, update]

    def _keep(self, name: str, scalar: Tensor) -> None:
        if self._on_host:
            self._values[name] = float(scalar)
            return
        if scalar.device != self._device:
            scalar = scalar.to(self._device, non_blocking=True)
        if scalar.dtype not in (torch.float32, torch.float64):  # numpy knows no bfloat16
            scalar = scalar.float()
        self._scalars[name] = scalar.reshape(()) if scalar.dim() else scalar

    def _rides_along(self, scalar: Tensor) -> bool:
        """Whether the pass over the gradients can copy this number, to save the launch that a copy is."""
        carrier = self._carrier
        return carrier is not None and scalar.dtype == torch.float32 and scalar.device == carrier.device

    def _gathered(self, norms: Sequence[Tensor]) -> Tensor:
        # A result made in inference mode could not be written outside of it, hence `out`.
        vector = torch.empty(len(norms), dtype=self._dtype, device=self._device)
        if norms:
            with torch.inference_mode():
                torch.stack(tuple(norms), out=vector)
        return vector

    def _without_absent(self) -> list[Tensor]:
        gradients = (gradient for bucket in self._buckets for gradient in bucket.gradients)
        return [norm for norm, gradient in zip(self._norms, gradients, strict=True) if gradient is not None]

    def _norms_of(self, tensors: list[list[Tensor]]) -> Tensor:
        norms = [n for bucket, group in zip(self._buckets, tensors, strict=True) for n in bucket.norms(group)]
        vector = self._gathered(self._on_one_device(norms))
        self._add_up_shards(vector)
        return vector

    def _add_up_shards(self, norms: Tensor) -> None:
        """Make norms of shards those of whole gradients, with one all-reduce per mesh dimension."""
        start = 0
        for bucket in self._buckets:
            if groups := bucket.sharded_over:
                part = norms[start : start + len(bucket.parameters)].square_()
                if bucket.replicas is not None:
                    part.div_(bucket.replicas)
                for group in groups:
                    dist.all_reduce(part, group=group)
                part.sqrt_()
            start += len(bucket.parameters)

    def _norms_of_all_buckets(self, riders: Mapping[str, Tensor]) -> Sequence[Tensor]:
        norms: list[Tensor] = []
        for bucket in self._buckets:
            if bucket is self._carrier and riders:
                found = bucket.gradient_norms(list(riders.values()))
                norms += found[: -len(riders)]
                self._scalars.update(zip(riders, found[-len(riders) :], strict=True))
            else:
                norms += bucket.gradient_norms()
            self._absent |= not bucket.regular
        return self._on_one_device(norms)

    def _on_one_device(self, norms: list[Tensor]) -> list[Tensor]:
        return [n.to(self._device, non_blocking=True) for n in norms] if self._several_devices else norms

    def _read_on_host(self) -> Array:
        """The norms; measured again in float64 if fp32 says that they are not finite: here a look is free."""
        array: Array = self.norms.cpu().numpy()
        if math.isfinite(np.dot(array, array)):
            return array
        exact = [
            torch.zeros((), dtype=torch.float64)
            if gradient is None
            else torch.linalg.vector_norm(gradient.to(torch.complex128 if gradient.is_complex() else torch.float64))
            for bucket in self._buckets
            for gradient in bucket.gradients
        ]
        vector = torch.stack(exact)
        if self._sharded:  # else Lightning's norm drives the clipping
            self._vector = vector
        array = vector.detach().cpu().numpy()
        return array


def _norm_of(norms: Tensor) -> Tensor:
    total: Tensor = torch.linalg.vector_norm(norms, dtype=torch.float64)
    return total
