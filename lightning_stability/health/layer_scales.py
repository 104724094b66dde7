"""What the numbers are like that enter and leave each layer of a module."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchmetrics import Metric

from lightning_stability.health.values import named_tensors

Side = Literal["input", "output"]


@dataclass(frozen=True, slots=True)
class Scale:
    """Mean, deviation and range of a tensor's elements; NaN or infinite if some of them are."""

    mean: float
    deviation: float
    least: float
    largest: float

    @property
    def abs_max(self) -> float:
        """The largest magnitude; NaN if there is one among the elements."""
        return math.nan if math.isnan(self.least) else max(abs(self.least), abs(self.largest))

    @property
    def is_finite(self) -> bool:
        """Whether all elements are."""
        return math.isfinite(self.least) and math.isfinite(self.largest)


@dataclass(frozen=True, slots=True)
class LayerScale:
    """What went into and came out of one layer, all its calls together.

    Attributes:
        name: As in `named_modules()`.
        kind: The layer's class.
        calls: How many times it was called.
        input: Of the first floating tensor among its arguments; None if there is none.
        output: Of the first floating tensor that it returned.
    """

    name: str
    kind: str
    calls: int
    input: Scale | None
    output: Scale | None


class LayerScales:
    """Within a `with` block, looks at what enters and leaves each layer of a module.

    Layers are the modules that call no other one: those without children, and those that have some but compute with
    parameters of their own, such as `nn.MultiheadAttention`. Everything is computed on the device, in fp32 (fp64 for
    fp64) and without overflow; nothing waits for it until the results are asked for. What fails to be measured is left
    out and never fails the forward pass.

    Args:
        module: Whose layers to watch. Metrics are none.
        compiled: Whether to watch what is inside of compiled modules too: only if they run uncompiled now, since a
            hook would be compiled as well.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> with LayerScales(net) as scales:
        ...     _ = net(torch.tensor([[3.0, -7.0]]))
        >>> scales.first_beyond(5.0)
        ('0', 'input', -7.0, 3.0)
        >>> [(layer.name, layer.kind) for layer in scales.read()]
        [('0', 'Linear'), ('1', 'Linear')]
        >>> round(scales.read()[0].input.deviation, 3)
        5.0
    """

    def __init__(self, module: nn.Module, compiled: bool = False) -> None:
        self._module = module
        self._compiled = compiled
        self._handles: list[Any] = []
        self._kinds: dict[str, str] = {}
        self._calls: dict[str, int] = defaultdict(int)
        self._callers: set[str] = set()  # and whatever else stands above a layer that was called
        self._seen: list[_Look] = []

    def __enter__(self) -> LayerScales:
        for name, layer in layers(self._module, self._compiled):
            self._kinds[name] = type(layer).__name__
            self._handles.append(layer.register_forward_pre_hook(self._input_hook(name), with_kwargs=True))
            self._handles.append(layer.register_forward_hook(self._output_hook(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def read(self) -> list[LayerScale]:
        """What was seen, in the order in which the layers were first called; waits for the device."""
        sides: dict[tuple[str, Side], list[tuple[int, list[float]]]] = defaultdict(list)
        for look, numbers in self._looks():
            if look.place == 0:
                sides[look.name, look.side].append((look.count, numbers))
        merged = {key: _merged(parts) for key, parts in sides.items()}
        return [
            LayerScale(name, self._kinds[name], calls, merged.get((name, "input")), merged.get((name, "output")))
            for name, calls in self._calls.items()
            if name not in self._callers
        ]

    def first_beyond(self, limit: float) -> tuple[str, Side, float, float] | None:
        """The first layer, in forward order, with a value beyond a limit; waits for the device.

        What is not finite does not count: masks are made of it.

        Args:
            limit: The largest magnitude that is still fine.

        Returns:
            Its name, "input" or "output", the least and the largest value; None if there is none.
        """
        for look, (*_, least, largest) in self._looks():
            if max(abs(least), abs(largest)) > limit:
                return look.name, look.side, least, largest
        return None

    def _looks(self) -> Iterator[tuple[_Look, list[float]]]:
        looks = [look for look in self._seen if look.name not in self._callers]
        return zip(looks, _read(look.figures for look in looks), strict=True)

    def _input_hook(self, name: str) -> Any:
        above = name.split(".")
        above = [".".join(above[:count]) for count in range(1, len(above))]

        def look(layer: nn.Module, args: Any, kwargs: Any) -> None:
            self._calls[name] += 1
            self._callers.update(above)
            self._look(name, "input", (args, kwargs))

        return look

    def _output_hook(self, name: str) -> Any:
        return lambda layer, args, output: self._look(name, "output", output)

    def _look(self, name: str, side: Side, values: Any) -> None:
        floating = (tensor for _, tensor in named_tensors(values) if tensor.is_floating_point() and tensor.numel())
        for place, tensor in enumerate(floating):
            try:
                self._seen.append(_Look(name, side, place, tensor.numel(), _figures(tensor)))
            except (RuntimeError, NotImplementedError, TypeError):  # of a kind that has no such figures, sparse say
                continue


def layers(module: nn.Module, compiled: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """The descendants of a module that may be layers: those without children, and those with parameters of their own.

    Args:
        module: The module.
        compiled: Whether to go into compiled modules.
    """
    if not compiled and getattr(module, "_compiler_ctx", None) is not None:
        return  # Lightning's mark on a module whose steps are compiled as a whole
    yield from _below(module, "", compiled)


def scale_of(tensor: Tensor) -> Scale:
    """Mean, deviation and range of a tensor; waits for the device.

    Args:
        tensor: Of any floating type, not empty.

    Example:
        >>> scale_of(torch.tensor([60000.0, -60000.0], dtype=torch.float16))
        Scale(mean=0.0, deviation=60000.0, least=-60000.0, largest=60000.0)
    """
    return _scale(next(iter(_read([_figures(tensor)]))))


def _below(module: nn.Module, prefix: str, compiled: bool) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if isinstance(child, (Metric, parametrize.ParametrizationList, torch.jit.ScriptModule)):
            continue  # (scripted modules call no hooks)
        inside = isinstance(module, torch._dynamo.OptimizedModule)  # type: ignore[attr-defined]
        path = prefix if inside else f"{prefix}.{name}" if prefix else name
        if not compiled and child._compiled_call_impl is not None:
            continue
        is_compiled = isinstance(child, torch._dynamo.OptimizedModule)  # type: ignore[attr-defined]
        if is_compiled and not compiled:
            continue
        if not is_compiled and (
            not any(True for _ in child.children())
            or any(weight is not None for weight in child._parameters.values())
            or parametrize.is_parametrized(child)
        ):
            yield path, child
        yield from _below(child, path, compiled)


@dataclass(frozen=True, slots=True)
class _Look:
    """One tensor that entered or left a layer.

    Attributes:
        place: Which of the call's floating tensors it is.
        figures: Its `_figures`.
    """

    name: str
    side: Side
    place: int
    count: int
    figures: Tensor


@torch.no_grad()
def _figures(tensor: Tensor) -> Tensor:
    """Magnitude, mean and variance of what is divided by it, least and largest, and these among what is finite.

    Nothing of it can overflow.
    """
    values = getattr(tensor, "to_local", lambda: tensor)().detach()
    with torch.autocast(values.device.type, enabled=False):
        values = values if values.dtype == torch.float64 else values.float()
        least, largest = values.aminmax()
        magnitude = torch.maximum(least.abs(), largest.abs()).clamp_min(torch.finfo(values.dtype).tiny)
        variance, mean = torch.var_mean(values / magnitude, correction=0)
        finite = torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0).aminmax()
        return torch.stack([magnitude, mean, variance, least, largest, *finite])


def _read(figures: Iterable[Tensor]) -> list[list[float]]:
    """Read what devices have computed, once for each of them."""
    figures = list(figures)
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for index, tensor in enumerate(figures):
        kinds[tensor.device, tensor.dtype].append(index)
    numbers: list[list[float]] = [[]] * len(figures)
    for indices in kinds.values():
        together = torch.stack([figures[index] for index in indices]).cpu().double().tolist()
        for index, row in zip(indices, together, strict=True):
            numbers[index] = row
    return numbers


def _merged(parts: list[tuple[int, list[float]]]) -> Scale:
    """The scale of several tensors together."""
    scales = [_scale(numbers) for _, numbers in parts]
    total = sum(count for count, _ in parts)
    mean = sum(count / total * scale.mean for (count, _), scale in zip(parts, scales, strict=True))
    largest = max(max(scale.deviation, abs(scale.mean - mean)) for scale in scales) or 1.0
    square = sum(
        count / total * ((scale.deviation / largest) ** 2 + ((scale.mean - mean) / largest) ** 2)
        for (count, _), scale in zip(parts, scales, strict=True)
    )
    bad = any(math.isnan(scale.least) for scale in scales)
    return Scale(
        mean,
        math.sqrt(square) * largest if math.isfinite(square) else math.nan,
        math.nan if bad else min(scale.least for scale in scales),
        math.nan if bad else max(scale.largest for scale in scales),
    )


def _scale(figures: list[float]) -> Scale:
    magnitude, mean, variance, least, largest, *_ = figures
    return Scale(mean * magnitude, math.sqrt(variance) * magnitude, least, largest)
