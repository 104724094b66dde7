"""A change of precision: where it is possible, and what is kept of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_stability._compat import is_instance_by_name
from lightning_stability.recovery.precision import Higher

_PLUGINS = ("MixedPrecision", "HalfPrecision", "Precision")
_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")
_SHARDED = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


@dataclass(frozen=True)
class PrecisionChange:
    """A change of precision, as checkpoints keep it."""

    fallen_from: str
    to: Higher
    step: int
    epoch: int
    batch_idx: int
    why: str

    @classmethod
    def of(cls, state: dict[str, Any]) -> PrecisionChange | None:
        return cls(**state) if state else None

    @property
    def place(self) -> str:
        return f"epoch {self.epoch}, batch {self.batch_idx}, global step {self.step}"

    def describe(self) -> str:
        return f"fell back from {self.fallen_from} to {self.to} at {self.place} ({self.why})"


def why_it_cannot_be_changed(trainer: Any) -> str | None:
    """Why this Trainer's precision cannot be changed; None if it can."""
    strategy, plugin = type(trainer.strategy).__name__, type(trainer.precision_plugin).__name__
    sharded = is_instance_by_name(trainer.strategy, *_SHARDED)
    if sharded or not is_instance_by_name(trainer.strategy, *_STRATEGIES):
        return (
            f"PrecisionFallback cannot change the precision under {strategy}, whose parameters carry it from"
            " set-up. Use DDP or a single device, or train in bf16-mixed or 32-true from the start."
        )
    if plugin not in _PLUGINS:
        return (
            f"PrecisionFallback does not know how to leave {plugin}; expected Lightning's MixedPrecision or"
            " HalfPrecision."
        )
    if plugin == "HalfPrecision" and trainer.world_size > 1:
        return (
            f"PrecisionFallback cannot leave {trainer.precision} under {strategy}: DDP's buckets are made for fp16"
            " gradients. Use 16-mixed, whose weights are fp32."
        )
    return None
