"""The range of every layer's output in a replayed step, and of the gradient that came back to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_stability.diagnosis.calls import tensors_of
from lightning_stability.diagnosis.places import plain_path
from lightning_stability.diagnosis.replay import Replay
from lightning_stability.diagnosis.step import RecordedStep

_MOST_LAYERS = 2000


@dataclass
class _Sizes:
    """Of values: without the sign, and of the finite ones."""

    smallest: float | None = None
    """That is not 0."""
    largest: float | None = None
    mean: float | None = None
    nonfinite: int = 0

    @torch.no_grad()
    def add(self, tensor: Tensor) -> None:
        values = tensor.detach().abs().float()
        finite = torch.isfinite(values)
        self.nonfinite += values.numel() - int(finite.sum())
        values = values[finite]
        if not values.numel():
            return
        largest, mean = float(values.max()), float(values.double().mean())
        nonzero = values[values > 0]
        self.largest = max(largest, self.largest or 0.0)
        self.mean = max(mean, self.mean or 0.0)
        if nonzero.numel():
            smallest = float(nonzero.min())
            self.smallest = smallest if self.smallest is None else min(smallest, self.smallest)


@dataclass
class _Layer:
    module: str
    kind: str
    dtype: str = ""
    shape: list[int] = field(default_factory=list)
    calls: int = 0
    output: _Sizes = field(default_factory=_Sizes)
    gradient: _Sizes = field(default_factory=_Sizes)

    def as_json(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("module", "kind", "dtype", "shape", "calls")}
        has_gradient = self.gradient.largest is not None or self.gradient.nonfinite
        return {**own, "output": vars(self.output), "gradient": vars(self.gradient) if has_gradient else None}


def measure_layers(step: RecordedStep) -> list[dict[str, Any]]:
    """Run a step once more and measure what each module gives, in the order in which they first did.

    Returns:
        One row for each module that gives a tensor: `module`, `kind` (its class), `dtype`, `shape`, `calls`, `output`
        and `gradient`, each of these with `smallest` (that is not 0), `largest` and `mean` of the sizes of the finite
        values, and how many are `nonfinite`. The list is empty where the step cannot be run.
    """
    try:
        replay = Replay(step)
        layers = _Layers(replay.module)
        replay.run()
    except Exception:  # whatever a hook meets; the diagnosis goes before it
        return []
    return [layer.as_json() for layer in list(layers.found.values())[:_MOST_LAYERS]]


class _Layers:
    """Looks at what the modules of a replay give."""

    def __init__(self, root: nn.Module) -> None:
        self.found: dict[str, _Layer] = {}
        self._seen: Tensor | None = None
        for path, module in root.named_modules():
            if path:
                module.register_forward_hook(self._hook(plain_path(path)))

    def _hook(self, path: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = next((t for t in tensors_of(output) if _is_measured(t)), None)
            if tensor is None or tensor is self._seen:  # a container gives what its last part gave
                return
            self._seen = tensor
            layer = self.found.setdefault(path, _Layer(path, type(module).__name__))
            layer.calls += 1
            layer.dtype, layer.shape = str(tensor.dtype).removeprefix("torch."), list(tensor.shape)
            layer.output.add(tensor)
            if tensor.requires_grad and not (tensor.is_leaf or tensor.is_inference()):
                tensor.register_hook(lambda gradient: None if gradient is None else layer.gradient.add(gradient))  # type: ignore[no-untyped-call]

        return look


def _is_measured(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.layout == torch.strided and tensor.numel() > 0
