"""Parameters whose gradients one multi-tensor call can take, and that call."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_stability.internals import foreach_norms, is_flattened

# torch's CPU norm adds squares up in a few fp32 lanes: 7e-4 off on 16 million normal values, 1e-2 on equal
# ones. Rows of this size are below 4e-5, at next to no cost.
CPU_PIECE = 2**14


def shard_groups(module: nn.Module) -> dict[Tensor, Any]:
    """The process group over which FSDP1 has sharded each parameter of a module, and so each gradient.

    `module` is the outermost one, `trainer.strategy.model`. Parameters that no FSDP module shards are left out.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return {}
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    groups: dict[Tensor, Any] = {}
    for unit in FullyShardedDataParallel.fsdp_modules(module):  # an inner one comes later, and is the one that counts
        group = None if unit.sharding_strategy == ShardingStrategy.NO_SHARD else unit.process_group
        groups.update({p: group for p in unit.parameters() if is_flattened(p)})
    return {parameter: group for parameter, group in groups.items() if group is not None}


def buckets_of(
    parameters: list[Tensor], drives_clipping: bool, groups: Mapping[Tensor, Any] | None = None
) -> list[Bucket]:
    """Put one optimizer's parameters into buckets, in the order in which each kind comes first.

    `drives_clipping`: whether their norms are to be those that Lightning clips with. `groups`: see `shard_groups`.
    """
    buckets: dict[Any, Bucket] = {}
    for parameter in parameters:
        mesh, group = getattr(parameter, "device_mesh", None), (groups or {}).get(parameter)
        # (how long FSDP1's shards are differs between ranks, and all ranks have to have the same buckets)
        long = group is not None or parameter.numel() > CPU_PIECE
        in_pieces = parameter.device.type == "cpu" and long
        key = (parameter.device, parameter.dtype, mesh, group, in_pieces)
        if key not in buckets:
            norm_dtype = _norm_dtype(parameter.dtype, parameter.device.type == "cuda" and not drives_clipping)
            buckets[key] = Bucket(
                parameter.device, parameter.dtype, norm_dtype, mesh, group, in_pieces, drives_clipping
            )
        buckets[key].parameters.append(parameter)
    for bucket in buckets.values():
        if bucket.mesh is not None:
            bucket.replicas = _replicas(bucket)
    return list(buckets.values())


@dataclass(slots=True)
class Bucket:
    """Parameters whose gradients one call can take: one device, one dtype, one mesh (FSDP2) or group (FSDP1)."""

    device: torch.device
    dtype: torch.dtype
    norm_dtype: torch.dtype | None
    mesh: Any
    group: Any
    in_pieces: bool
    clipped: bool
    parameters: list[Tensor] = field(default_factory=list)
    replicas: Tensor | None = None
    regular: bool = True
    gradients: list[Tensor | None] = field(default_factory=list)

    @property
    def sharded_over(self) -> list[Any]:
        """The process groups, one after the other, over which squares have to be added up."""
        if self.mesh is not None:
            return [self.mesh.get_group(dimension) for dimension in range(self.mesh.ndim)]
        return [] if self.group is None else [self.group]

    def gradient_norms(self) -> Sequence[Tensor]:
        """One norm per parameter, 0 where there is no gradient."""
        if self.regular:
            # An absent or sparse gradient is found by the call that refuses it, so that nobody has to look at each.
            try:
                gradients: list[Any] = self.local([p.grad for p in self.parameters])  # type: ignore[misc]
                norms = self.norms(gradients)
            except (TypeError, AttributeError, NotImplementedError):
                self.regular = False
            else:
                self.gradients = gradients
                return norms
        self.gradients = [None if p.grad is None else self._dense(p) for p in self.parameters]
        present = [gradient for gradient in self.gradients if gradient is not None]
        self.regular = len(present) == len(self.parameters) and not self.any_sparse()
        found = iter(self.norms(present) if present else ())
        zero = torch.zeros((), dtype=self.norm_dtype or torch.float32, device=self.device)
        return [zero if gradient is None else next(found) for gradient in self.gradients]

    def any_sparse(self) -> bool:
        """Whether a gradient is sparse; looks at each."""
        return any(p.grad is not None and p.grad.is_sparse for p in self.parameters)

    def _dense(self, parameter: Tensor) -> Tensor:
        assert parameter.grad is not None
        if not parameter.grad.is_sparse:
            return self.local([parameter.grad])[0]
        if parameter.grad.is_coalesced():
            return parameter.grad.values()
        # Rows that occur twice have to be added before they are squared, and clipping has to reach the sum. The
        # gradient itself is left alone otherwise: an optimizer adds such rows up one by one, to other bits.
        gradient = parameter.grad.coalesce()
        if self.clipped:
            parameter.grad = gradient
        return gradient.values()

    def local(self, tensors: list[Tensor]) -> list[Tensor]:
        if self.mesh is None:
            return tensors
        return [_whole_or_shard(tensor).to_local() for tensor in tensors]  # type: ignore[attr-defined]

    def norms(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        with torch.inference_mode():  # less host time for each tensor than no_grad
            if not self.in_pieces:
                return foreach_norms(tensors, self.norm_dtype)
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
