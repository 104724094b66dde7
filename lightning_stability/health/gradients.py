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
from lightning_stability.health.record import FP32_LARGEST_NORM, FP64_LARGEST_NORM, Floats
from lightning_stability.internals import foreach_copies, foreach_scale_, foreach_subtract_


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

    Lists and names are made here, once; whoever measures makes a new meter when `is_current` says that the trained
    parameters are others. Nothing waits for the device.

    The pass is one `torch._foreach_norm` per kind of parameter. On CUDA the norms stay where it left them, one tensor
    each, until somebody asks for `norms`, or until those of several steps are gathered on their way to the host.

    Norms are L2: the square root of the sum of squared magnitudes, of a complex element's too. They are
    accumulated in float64 on CUDA, where that costs nothing more and no fp32 square can overflow, except when
    they also drive the clipping: then in fp32 and in Lightning's order, so that clipping gives the same bits
    with and without us.

    `names` gives each parameter's name, by identity; one that is missing there gets a number. `drives_clipping` says
    whether `clip_` will be called. `groups` are the processes over which FSDP1 has sharded each parameter, as
    `buckets.shard_groups` returns them.
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
        # One step's state, from `measure` to `send`.
        self.is_measured = False
        self._norms: Sequence[Tensor] = ()
        self._vector: Tensor | None = None
        self._array: Array | None = None
        self._absent = False
        self._scalars: dict[str, Tensor] = {}  # numbers that travel with the norms
        self._values: dict[str, float] = {}  # the same where everything is on the host
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
            self._vector = self._gathered(self._norms)
        return self._vector

    def measure(
        self, scalars: Mapping[str, Tensor], kept: Mapping[str, Tensor] | None = None, force: bool = False
    ) -> None:
        """Take the norm of every gradient as it is now. Until `send` or `discard` a second call does nothing.

        So it can be called where a module clips in manual optimization, and again at its step: the norm is the one from
        before clipping. `clip_` ends that too: gradients that come after it in the same step are others.

        `scalars` are numbers on the device that travel to the host as they are now, by name; `kept` are such that
        nobody writes again, and that need no copy. `force` measures anew: an optimizer that evaluates its closure again
        has new gradients.
        """
        if self.is_measured and not force:
            return
        self._start_over()
        self.is_measured = True
        self._norms = self._on_one_device([norm for bucket in self._buckets for norm in bucket.gradient_norms()])
        self._absent = not all(bucket.regular for bucket in self._buckets)
        for name, scalar in scalars.items():
            self.put(name, scalar)
        for name, scalar in (kept or {}).items():
            self._keep(name, scalar)
        if self._on_host:
            self._array = self._read_on_host()
        if self._sharded:
            self._add_up_shards(self.norms)

    @property
    def has_sparse(self) -> bool:
        """Whether any of the gradients that were measured is sparse."""
        return self._absent and any(bucket.any_sparse() for bucket in self._buckets)

    def total_norm(self) -> Tensor:
        """Norm of all gradients as measured, 0-dimensional, on the device."""
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
        """Multiply the gradients with `min(1, max_norm / (total + 1e-6))`, as `clip_grad_norm_` does."""
        norms = self.norms
        self.is_measured = False
        if self._absent and not self._sharded:
            # Lightning's total leaves absent gradients out; a zero in between would change the sum's order.
            norms = self._gathered(self._without_absent())
        total = torch.linalg.vector_norm(norms)
        coefficient = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        self._keep("clip_coefficient", coefficient)
        for bucket in self._buckets:
            gradients = [gradient for gradient in bucket.gradients if gradient is not None]
            if gradients:
                foreach_scale_(gradients, coefficient.to(bucket.device, gradients[0].dtype.to_real()))

    @torch.no_grad()
    def remember_weights(self) -> None:
        """Keep a copy of the weights, for the size of the coming update."""
        weights = [bucket.local(bucket.parameters) for bucket in self._buckets]
        self._weight_norms = self._norms_of(weights)
        self._before = [foreach_copies(bucket) for bucket in weights]

    def put(self, name: str, scalar: Tensor) -> None:
        """Add a number as it is now."""
        self._keep(name, scalar if self._on_host else scalar.detach().clone())

    def send(self, reads: LateReads, on_host: Callable[[Measurement], None]) -> None:
        """Start the numbers' way to the host, to be handed to `on_host`, and let go of the gradients."""
        weights_and_update = [] if self._before is None else self._weights_and_update()
        scalars, values, array = self._scalars, self._values, self._array
        norms: Part = self._norms if self._vector is None and self._norms else self.norms
        for bucket in self._buckets:
            bucket.gradients = []
        self._start_over()

        def arrived(arrays: list[Array]) -> None:
            norms, *vectors = (array.astype(np.float64) for array in (arrays[0], *arrays[1 + len(scalars) :]))
            for name, array in zip(scalars, arrays[1:], strict=False):
                values[name] = float(array[0])
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
        self._norms, self._vector, self._array, self._absent = (), None, None, False
        self._scalars, self._values = {}, {}

    @torch.no_grad()
    def _weights_and_update(self) -> list[Tensor]:
        assert self._before is not None
        assert self._weight_norms is not None
        for bucket, before in zip(self._buckets, self._before, strict=True):
            foreach_subtract_(before, bucket.local(bucket.parameters))
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
