"""What range of values enters each layer of a module."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_stability.health.values import named_tensors


class LayerRanges:
    """Within a `with` block, the least and the largest value that enters and leaves each leaf module.

    What is not finite does not count: masks are made of it. Nothing waits for the device until `first_beyond` is
    asked. Scripted modules, which call no hooks, are not seen.

    Args:
        module: Whose leaf modules to watch.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> with LayerRanges(net) as ranges:
        ...     _ = net(torch.tensor([[3.0, -7.0]]))
        >>> ranges.first_beyond(5.0)
        ('0', 'input', -7.0, 3.0)
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._handles: list[Any] = []
        self._seen: list[tuple[str, str, Tensor]] = []

    def __enter__(self) -> LayerRanges:
        for name, layer in self._module.named_modules():
            if not any(True for _ in layer.children()) and not isinstance(layer, torch.jit.ScriptModule):
                self._handles.append(layer.register_forward_pre_hook(self._hook(name, "input")))
                self._handles.append(layer.register_forward_hook(self._output_hook(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def first_beyond(self, limit: float) -> tuple[str, str, float, float] | None:
        """The first layer, in forward order, with a value beyond a limit.

        Args:
            limit: The largest magnitude that is still fine.

        Returns:
            Its name, "input" or "output", the least and the largest value; None if there is none.
        """
        if not self._seen:
            return None
        ranges = torch.stack([extremes.to("cpu") for _, _, extremes in self._seen]).tolist()
        for (name, side, _), (least, largest) in zip(self._seen, ranges, strict=True):
            if not (abs(least) <= limit and abs(largest) <= limit):
                return name, side, least, largest
        return None

    def _hook(self, name: str, side: str) -> Any:
        return lambda layer, args: self._look(name, side, args)

    def _output_hook(self, name: str) -> Any:
        return lambda layer, args, output: self._look(name, "output", output)

    @torch.no_grad()
    def _look(self, name: str, side: str, values: Any) -> None:
        for _, tensor in named_tensors(values):
            if tensor.is_floating_point() and tensor.numel() and tensor.layout == torch.strided:
                finite = torch.nan_to_num(tensor.detach(), nan=0.0, posinf=0.0, neginf=0.0)
                self._seen.append((name, side, torch.stack(finite.aminmax()).double()))
