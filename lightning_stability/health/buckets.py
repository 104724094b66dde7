"""Parameters whose gradients one multi-tensor call can take, and that call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

# torch's CPU norm adds squares up in a few fp32 lanes: 7e-4 off on 16 million normal values, 1e-2 on equal
# ones. Rows of this size are below 4e-5, at next to no cost.
CPU_PIECE = 2**14


def buckets_of(parameters: list[Tensor], drives_clipping: bool) -> list[Bucket]:
    """Put parameters into buckets, in the order in which each kind comes first.

    Args:
        parameters: Of one optimizer.
        drives_clipping: Whether their norms are to be those that Lightning clips with.
    """
    buckets: dict[Any, Bucket] = {}
    for parameter in parameters:
        mesh = getattr(parameter, "device_mesh", None)
        on_cpu = parameter.device.type == "cpu"
        in_pieces = on_cpu and parameter.numel() > CPU_PIECE
        key = (parameter.device, parameter.dtype, mesh, in_pieces)
        if key not in buckets:
            norm_dtype = _norm_dtype(parameter.dtype, parameter.device.type == "cuda" and not drives_clipping)
            buckets[key] = Bucket(parameter.device, parameter.dtype, norm_dtype, mesh, in_pieces, drives_clipping)
        buckets[key].parameters.append(parameter)
    for bucket in buckets.values():
        if bucket.mesh is not None:
            bucket.replicas = _replicas(bucket)
    return list(buckets.values())


@dataclass(slots=True)
class Bucket:
    """Parameters whose gradients one call can take: one device, one dtype, one mesh."""

    device: torch.device
    dtype: torch.dtype
    norm_dtype: torch.dtype | None
    mesh: Any
    in_pieces: bool
    clipped: bool
    parameters: list[Tensor] = field(default_factory=list)
    replicas: Tensor | None = None
    regular: bool = True
    gradients: list[Tensor | None] = field(default_factory=list)

    def carries_scalars(self, device: torch.device) -> bool:
        """Whether an fp32 number that is not negative comes back as it was when its norm is taken.

        In float64 it does: the square of an fp32 number is exact there, and so is the root of that.
        """
        in_float64 = self.dtype == torch.float32 and self.norm_dtype == torch.float64
        return in_float64 and self.device == device and self.mesh is None

    def gradient_norms(self, riders: Sequence[Tensor] = ()) -> Sequence[Tensor]:
        """One norm per parameter, 0 where there is no gradient, and after them those of the riders."""
        if self.regular:
            # An absent or sparse gradient is told by the call that refuses it, so that nobody has to look at
            # each.
            try:
                gradients: list[Any] = [p.grad for p in self.parameters]
                gradients = self.local(gradients)
                norms = self.norms([*gradients, *riders] if riders else gradients)
            except (TypeError, AttributeError, NotImplementedError):
                self.regular = False
            else:
                self.gradients = gradients  # type: ignore[assignment]
                return norms
        return self._irregular_norms(riders)

    def _irregular_norms(self, riders: Sequence[Tensor]) -> Sequence[Tensor]:
        self.gradients = [None if p.grad is None else self._dense(p) for p in self.parameters]
        present = [gradient for gradient in self.gradients if gradient is not None]
        self.regular = len(present) == len(self.parameters) and not self._any_sparse()
        norms = iter(self.norms([*present, *riders]) if present or riders else ())
        zero = torch.zeros((), dtype=self.norm_dtype or torch.float32, device=self.device)
        return [zero if gradient is None else next(norms) for gradient in self.gradients] + list(norms)

    def _any_sparse(self) -> bool:
        return any(p.grad is not None and p.grad.is_sparse for p in self.parameters)

    def _dense(self, parameter: Tensor) -> Tensor:
        assert parameter.grad is not None
        if not parameter.grad.is_sparse:
            return self.local([parameter.grad])[0]
        if parameter.grad.is_coalesced():
            return parameter.grad._values()
        # Rows that occur twice have to be added before they are squared, and clipping has to reach the sum. The
        # gradient itself is left alone otherwise: an optimizer adds such rows up one by one, to other bits.
        gradient = parameter.grad.coalesce()
        if self.clipped:
            parameter.grad = gradient
        return gradient._values()

    def local(self, tensors: list[Tensor]) -> list[Tensor]:
        if self.mesh is None:
            return tensors
        return [_whole_or_shard(tensor).to_local() for tensor in tensors]  # type: ignore[attr-defined]

    def norms(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        with torch.inference_mode():  # less host time for each tensor than no_grad
            if not self.in_pieces:
                return torch._foreach_norm(tensors, 2, self.norm_dtype)
            return [self._norm_in_pieces(tensor) for tensor in tensors]

    def _norm_in_pieces(self, tensor: Tensor) -> Tensor:
        flat = tensor.reshape(-1)
        whole = flat.numel() // CPU_PIECE * CPU_PIECE
        norms = torch.linalg.vector_norm(flat[:whole].view(-1, CPU_PIECE), dim=1, dtype=self.norm_dtype)
        if whole < flat.numel():
            rest = torch.linalg.vector_norm(flat[whole:], dtype=self.norm_dtype)
            norms = torch.cat((norms, rest.view(1)))
        norm: Tensor = torch.linalg.vector_norm(norms)
        return norm


def _norm_dtype(dtype: torch.dtype, wide: bool) -> torch.dtype | None:
    """What a norm is accumulated in and returned as; None for the gradient's own (real) dtype."""
    if dtype.is_complex or dtype == torch.float64:
        return None
    if wide:
        return torch.float64
    return torch.float32 if dtype.itemsize < 4 else None


def _replicas(bucket: Bucket) -> Tensor | None:
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
