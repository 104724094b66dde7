"""The norm of every gradient of one optimizer in one pass, left on the device."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_stability.health.late_reads import LateReads
from lightning_stability.health.record import Floats

# torch's CPU norm adds squares up in a few fp32 lanes: 7e-4 off on 16 million normal values, 1e-2 on equal
# ones. Rows of this size are below 4e-5, at next to no cost.
CPU_PIECE = 2**14


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
    """Measures all gradients of one optimizer in one `torch._foreach_norm` per dtype; clips with the result.

    Lists, names and buffers are made here, once; the runtime makes a new meter when `is_current` says that
    the trained parameters are others. Nothing waits for the device.

    Norms are L2: the square root of the sum of squared magnitudes, of a complex element's too. They are
    accumulated in float64 on CUDA, where that costs nothing more and no fp32 square can overflow, except when
    they also drive the clipping: then in fp32 and in Lightning's order, so that clipping gives the same bits
    with and without us.

    Args:
        optimizer: The bare torch optimizer.
        names: Each parameter's name, by identity; a parameter that is missing there gets a number.
        drives_clipping: Whether `clip_` will be called.
    """

    def __init__(self, optimizer: Optimizer, names: Mapping[Tensor, str], drives_clipping: bool) -> None:
        self._optimizer = optimizer
        self.drives_clipping = drives_clipping
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        self._buckets = _buckets([p for group in self._groups for p in group], drives_clipping)
        in_order = [parameter for bucket in self._buckets for parameter in bucket.parameters]
        self.parameter_names = tuple(names.get(p, f"unnamed_{i}") for i, p in enumerate(in_order))
        self._device = in_order[0].device if in_order else torch.device("cpu")
        self._several_devices = len({bucket.device for bucket in self._buckets}) > 1
        self._sharded = any(bucket.mesh is not None for bucket in self._buckets)
        wide = self._sharded or any(bucket.norm_dtype is torch.float64 for bucket in self._buckets)
        dtype = torch.float64 if wide or any(p.dtype == torch.float64 for p in in_order) else torch.float32
        row_class = _DeviceRow if self._device.type == "cuda" else _HostRow
        self._row: _HostRow | _DeviceRow = row_class(len(in_order), self._device, dtype)
        self._present: list[Tensor] | None = None
        self._before: list[list[Tensor]] | None = None
        self._weight_norms: Tensor | None = None

    def is_current(self) -> bool:
        """Whether the optimizer still holds exactly the parameters that this meter was made for."""
        now = [group["params"] for group in self._optimizer.param_groups]
        return len(now) == len(self._groups) and all(
            len(group) == len(before) and all(map(operator.is_, group, before))
            for group, before in zip(now, self._groups, strict=True)
        )

    @torch.no_grad()
    def measure(self, scalars: Mapping[str, Tensor]) -> None:
        """Take the norm of every gradient as it is now.

        Args:
            scalars: Numbers on the device that travel to the host with the norms, by name.
        """
        if len(self._buckets) == 1:
            norms = self._buckets[0].gradient_norms()
        else:
            norms = [norm for bucket in self._buckets for norm in bucket.gradient_norms()]
        if self._several_devices:
            norms = [norm.to(self._device, non_blocking=True) for norm in norms]
        self._present = None if all(bucket.regular for bucket in self._buckets) else self._without_absent(norms)
        self._row.write(norms, scalars)
        self._tell_overflow_from_inf()
        self._add_up_shards(self._row.norms)

    @torch.no_grad()
    def total_norm(self) -> Tensor:
        """Norm of all gradients as measured, 0-dimensional, on the device."""
        return _norm_of(self._row.vector()[: len(self.parameter_names)])

    @torch.no_grad()
    def total_norm_now(self) -> Tensor:
        """The same of the gradients as they are now: a second pass."""
        norms = [norm for bucket in self._buckets for norm in bucket.gradient_norms()]
        vector = self._row.stack([norm.to(self._device) for norm in norms])
        self._add_up_shards(vector)
        return _norm_of(vector)

    @torch.no_grad()
    def clip_(self, max_norm: float) -> None:
        """Multiply the gradients with `min(1, max_norm / (total + 1e-6))`, as `clip_grad_norm_` does.

        Args:
            max_norm: The norm that the gradients shall not exceed.
        """
        norms = self._row.norms
        if self._present is not None and not self._sharded:
            # Lightning's total leaves absent gradients out; a zero in between would change the sum's order.
            norms = _stack(self._present, norms.dtype, norms.device)
        total = torch.linalg.vector_norm(norms)
        coefficient = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        for bucket in self._buckets:
            gradients = [gradient for gradient in bucket.gradients if gradient is not None]
            if gradients:
                torch._foreach_mul_(gradients, coefficient.to(bucket.device, gradients[0].dtype.to_real()))
        self._row.put("clip_coefficient", coefficient)

    @torch.no_grad()
    def remember_weights(self) -> None:
        """Keep a copy of the weights, for the size of the coming update."""
        weights = [bucket.local(bucket.parameters) for bucket in self._buckets]
        self._weight_norms = self._norms_of(weights)
        self._before = [list(torch._foreach_add(bucket, 0)) for bucket in weights]

    def put(self, name: str, scalar: Tensor) -> None:
        """Add a number that came to be after `measure`."""
        self._row.put(name, scalar)

    @torch.no_grad()
    def send(self, reads: LateReads, on_host: Callable[[Measurement], None]) -> None:
        """Start the numbers' way to the host and let go of the gradients.

        Args:
            reads: Takes them there.
            on_host: Called when they have arrived.
        """
        vectors = [self._row.vector()]
        if self._before is not None and self._weight_norms is not None:
            for bucket, before in zip(self._buckets, self._before, strict=True):
                torch._foreach_sub_(before, bucket.local(bucket.parameters))
            vectors += [self._weight_norms, self._norms_of(self._before)]
            self._before = self._weight_norms = None
        for bucket in self._buckets:
            bucket.gradients = []
        self._present = None
        unpack = self._row.unpacker()
        count = len(self.parameter_names)

        def arrived(values: np.ndarray[Any, Any]) -> None:
            numbers = values.astype(np.float64)
            row, rest = (numbers, None) if len(vectors) == 1 else (numbers[: -2 * count], numbers[-2 * count :])
            measurement = Measurement(row[:count], unpack(row[count:]))
            if rest is not None:
                measurement.weight_norms, measurement.update_norms = rest[:count], rest[count:]
            on_host(measurement)

        reads.send(vectors[0] if len(vectors) == 1 else torch.cat(vectors), arrived)

    def _without_absent(self, norms: Sequence[Tensor]) -> list[Tensor]:
        gradients = (gradient for bucket in self._buckets for gradient in bucket.gradients)
        return [norm for norm, gradient in zip(norms, gradients, strict=True) if gradient is not None]

    def _norms_of(self, tensors: list[list[Tensor]]) -> Tensor:
        norms = [n for bucket, group in zip(self._buckets, tensors, strict=True) for n in bucket.norms(group)]
        vector = self._row.stack(norms)
        self._add_up_shards(vector)
        return vector

    def _add_up_shards(self, norms: Tensor) -> None:
        """Make norms of shards those of whole gradients, with one all-reduce per mesh dimension."""
        start = 0
        for bucket in self._buckets:
            if bucket.mesh is not None:
                part = norms[start : start + len(bucket.parameters)].square_()
                if bucket.replicas is not None:
                    part.div_(bucket.replicas)
                for dimension in range(bucket.mesh.ndim):
                    dist.all_reduce(part, group=bucket.mesh.get_group(dimension))
                part.sqrt_()
            start += len(bucket.parameters)

    def _tell_overflow_from_inf(self) -> None:
        """On the host, where a look is free, measure again in float64 if fp32 says not finite."""
        if not isinstance(self._row, _HostRow) or math.isfinite(float(self._row.norms.sum())):
            return
        exact = [
            torch.zeros((), dtype=torch.float64)
            if gradient is None
            else torch.linalg.vector_norm(gradient.to(torch.complex128 if gradient.is_complex() else torch.float64))
            for bucket in self._buckets
            for gradient in bucket.gradients
        ]
        self._row.correct(torch.stack(exact), for_clipping=self._sharded)


@dataclass(slots=True)
class _Bucket:
    """Parameters whose gradients one call can take: one device, one dtype, one mesh."""

    device: torch.device
    norm_dtype: torch.dtype | None
    mesh: Any
    in_pieces: bool
    parameters: list[Tensor] = field(default_factory=list)
    replicas: Tensor | None = None
    regular: bool = True
    gradients: list[Tensor | None] = field(default_factory=list)

    def gradient_norms(self) -> Sequence[Tensor]:
        if self.regular:
            # An absent or sparse gradient is told by the call that refuses it, so that nobody has to look at
            # each.
            try:
                gradients: list[Any] = [p.grad for p in self.parameters]
                gradients = self.local(gradients)
                norms = self.norms(gradients)
            except (TypeError, AttributeError, NotImplementedError):
                self.regular = False
            else:
                self.gradients = gradients  # type: ignore[assignment]
                return norms
        return self._irregular_norms()

    def _irregular_norms(self) -> Sequence[Tensor]:
        self.gradients = [None if p.grad is None else self._dense(p) for p in self.parameters]
        present = [gradient for gradient in self.gradients if gradient is not None]
        self.regular = len(present) == len(self.parameters) and not self._any_sparse()
        norms = iter(self.norms(present) if present else ())
        zero = torch.zeros((), dtype=self.norm_dtype or torch.float32, device=self.device)
        return [zero if gradient is None else next(norms) for gradient in self.gradients]

    def _any_sparse(self) -> bool:
        return any(p.grad is not None and p.grad.is_sparse for p in self.parameters)

    def _dense(self, parameter: Tensor) -> Tensor:
        assert parameter.grad is not None
        if not parameter.grad.is_sparse:
            return self.local([parameter.grad])[0]
        if not parameter.grad.is_coalesced():
            # Rows that occur twice have to be added before they are squared, and clipping has to reach the
            # sum.
            parameter.grad = parameter.grad.coalesce()
        return parameter.grad._values()

    def local(self, tensors: list[Tensor]) -> list[Tensor]:
        if self.mesh is None:
            return tensors
        return [_whole_or_shard(tensor).to_local() for tensor in tensors]  # type: ignore[attr-defined]

    def norms(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        if not self.in_pieces:
            return torch._foreach_norm(tensors, 2, self.norm_dtype)
        return [self._norm_in_pieces(tensor) for tensor in tensors]

    def _norm_in_pieces(self, tensor: Tensor) -> Tensor:
        flat = tensor.reshape(-1)
        whole = flat.numel() // CPU_PIECE * CPU_PIECE
        rows = torch.linalg.vector_norm(flat[:whole].view(-1, CPU_PIECE), dim=1, dtype=self.norm_dtype)
        rest = torch.linalg.vector_norm(flat[whole:], dtype=self.norm_dtype)
        norm: Tensor = torch.linalg.vector_norm(torch.cat((rows, rest.view(1))))
        return norm


class _HostRow:
    """The numbers of one step where they are on the host already."""

    def __init__(self, count: int, device: torch.device, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._device = device
        self.norms = torch.zeros(count, dtype=dtype, device=device)
        self._exact: Tensor | None = None
        self._scalars: dict[str, float] = {}

    def write(self, norms: Sequence[Tensor], scalars: Mapping[str, Tensor]) -> None:
        self.norms, self._exact = self.stack(norms), None
        self._scalars = {name: float(scalar) for name, scalar in scalars.items()}

    def put(self, name: str, scalar: Tensor) -> None:
        self._scalars[name] = float(scalar)

    def correct(self, exact: Tensor, for_clipping: bool) -> None:
        self._exact = exact
        if for_clipping:
            self.norms = exact

    def stack(self, norms: Sequence[Tensor]) -> Tensor:
        return _stack(norms, self._dtype, self._device)

    def vector(self) -> Tensor:
        return self.norms if self._exact is None else self._exact

    def unpacker(self) -> Callable[[Floats], dict[str, float]]:
        scalars = self._scalars
        return lambda _: scalars


class _DeviceRow:
    """The numbers of one step in one buffer on the device, filled by a single multi-tensor copy."""

    _SLOTS = 16  # for the scalars: loss, scale, coefficient, found_inf, learning rates kept as tensors

    def __init__(self, count: int, device: torch.device, dtype: torch.dtype) -> None:
        self._buffer = torch.zeros(count + self._SLOTS, dtype=dtype, device=device)
        slots = list(self._buffer.unbind())
        self.norms = self._buffer[:count]
        self._norm_slots, self._scalar_slots = slots[:count], slots[count:]
        self._names: list[str] = []

    def write(self, norms: Sequence[Tensor], scalars: Mapping[str, Tensor]) -> None:
        torch._foreach_copy_(self._norm_slots, norms)  # type: ignore[arg-type]
        self._names = list(scalars)[: self._SLOTS - 6]
        if self._names:
            torch._foreach_copy_(self._scalar_slots[: len(self._names)], [scalars[name] for name in self._names])

    def put(self, name: str, scalar: Tensor) -> None:
        self._scalar_slots[len(self._names)].copy_(scalar, non_blocking=True)
        self._names.append(name)

    def stack(self, norms: Sequence[Tensor]) -> Tensor:
        return _stack(norms, self._buffer.dtype, self._buffer.device)

    def vector(self) -> Tensor:
        return self._buffer

    def unpacker(self) -> Callable[[Floats], dict[str, float]]:
        names = self._names
        return lambda values: dict(zip(names, values.tolist(), strict=False))


def _norm_of(norms: Tensor) -> Tensor:
    total: Tensor = torch.linalg.vector_norm(norms, dtype=torch.float64)
    return total


def _buckets(parameters: list[Tensor], drives_clipping: bool) -> list[_Bucket]:
    buckets: dict[Any, _Bucket] = {}
    for parameter in parameters:
        mesh = getattr(parameter, "device_mesh", None)
        on_cpu = parameter.device.type == "cpu"
        in_pieces = on_cpu and parameter.numel() > CPU_PIECE
        key = (parameter.device, parameter.dtype, mesh, in_pieces)
        if key not in buckets:
            norm_dtype = _norm_dtype(parameter.dtype, parameter.device.type == "cuda" and not drives_clipping)
            buckets[key] = _Bucket(parameter.device, norm_dtype, mesh, in_pieces)
        buckets[key].parameters.append(parameter)
    for bucket in buckets.values():
        if bucket.mesh is not None:
            bucket.replicas = _replicas(bucket)
    return list(buckets.values())


def _norm_dtype(dtype: torch.dtype, wide: bool) -> torch.dtype | None:
    """What a norm is accumulated in and returned as; None for the gradient's own (real) dtype."""
    if dtype.is_complex or dtype == torch.float64:
        return None
    if wide:
        return torch.float64
    return torch.float32 if dtype.itemsize < 4 else None


def _replicas(bucket: _Bucket) -> Tensor | None:
    """How many ranks hold the same piece of each parameter, so that a sum over ranks counts it once."""
    mesh = bucket.mesh
    counts = []
    for parameter in bucket.parameters:
        placements: Any = parameter.placements  # type: ignore[attr-defined]
        copies = [mesh.size(dimension) for dimension, p in enumerate(placements) if p.is_replicate()]
        counts.append(float(np.prod(copies)))
    if all(count == 1.0 for count in counts):
        return None
    return torch.tensor(counts, dtype=torch.float64, device=bucket.device)


def _whole_or_shard(tensor: Tensor) -> Tensor:
    """A DTensor without pending sums: squares of partial sums do not add up."""
    if not any(placement.is_partial() for placement in tensor.placements):  # type: ignore[attr-defined]
        return tensor
    from torch.distributed.tensor import Replicate

    placements = [Replicate() if p.is_partial() else p for p in tensor.placements]  # type: ignore[attr-defined]
    reduced: Tensor = tensor.redistribute(placements=placements)  # type: ignore[attr-defined]
    return reduced


def _stack(norms: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    if not norms:
        return torch.zeros(0, dtype=dtype, device=device)
    return torch.stack(list(norms)).to(device, dtype)
