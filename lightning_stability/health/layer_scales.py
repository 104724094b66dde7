"""Mean, standard deviation and range of what enters and leaves each layer of a module."""

from __future__ import annotations

import contextlib
import functools
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
from lightning_stability.internals import compiles_its_call, has_own_parameters, within_compiled

Side = Literal["input", "output"]


@dataclass(frozen=True, slots=True)
class Scale:
    """Mean, standard deviation and range of a tensor's elements; NaN or infinite if some of them are."""

    mean: float
    std: float
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

    @property
    def ratio(self) -> float | None:
        """What the layer multiplies standard deviations with; None if it has no such number."""
        if self.input is None or self.output is None or not self.input.std > 0.0 or not self.output.std > 0.0:
            return None
        return self.output.std / self.input.std


class LayerScales:
    """Within a `with` block, measures what enters and leaves each layer of a module, by forward hooks.

    Layers are the modules that call no other one: those without children, and those that have some but compute with
    parameters of their own, such as `nn.MultiheadAttention`. A module given to `torch.compile` is one layer. Metrics
    are none, and neither is what a hook would change: scripted modules, modules that compile their own call, and
    torch's transformer layers outside of training, which would leave their fast path.

    Everything is computed on the device, in fp32 (fp64 for fp64) and without overflow; nothing waits for it until the
    results are asked for. What fails to be measured is left out and never fails the forward pass.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> with LayerScales(net) as scales:
        ...     _ = net(torch.tensor([[3.0, -7.0]]))
        >>> scales.first_beyond(5.0)
        ('0', 'input', -7.0, 3.0)
        >>> [(layer.name, layer.kind) for layer in scales.read()]
        [('0', 'Linear'), ('1', 'Linear')]
        >>> round(scales.read()[0].input.std, 3)
        5.0
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._handles: list[Any] = []
        self._kinds: dict[str, str] = {}
        self._calls: dict[str, int] = defaultdict(int)
        self._callers: set[str] = set()  # and whatever else stands above a layer that was called
        self._measured: list[_Measured] = []

    def __enter__(self) -> LayerScales:
        for name, layer in layers(self._module):
            self._kinds[name] = type(within_compiled(layer) or layer).__name__
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
        for one, numbers in self._read():
            if one.place == 0:
                sides[one.name, one.side].append((one.count, numbers))
        merged = {key: _merged(parts) for key, parts in sides.items()}
        return [
            LayerScale(name, self._kinds[name], calls, merged.get((name, "input")), merged.get((name, "output")))
            for name, calls in self._calls.items()
            if name not in self._callers
        ]

    def first_beyond(self, limit: float) -> tuple[str, Side, float, float] | None:
        """The first layer, in forward order, with a value beyond a limit; waits for the device.

        What is not finite does not count: masks are made of it. Returns its name, "input" or "output", the least and
        the largest value; None if there is none.
        """
        for one, (*_, least, largest) in self._read():
            if max(abs(least), abs(largest)) > limit:
                return one.name, one.side, least, largest
        return None

    def _read(self) -> Iterator[tuple[_Measured, list[float]]]:
        measured = [one for one in self._measured if one.name not in self._callers]
        return zip(measured, _read(one.figures for one in measured), strict=True)

    def _input_hook(self, name: str) -> Any:
        above = name.split(".")
        above = [".".join(above[:count]) for count in range(1, len(above))]

        def measure(layer: nn.Module, args: Any, kwargs: Any) -> None:
            self._calls[name] += 1
            self._callers.update(above)
            self._measure(name, "input", (args, kwargs))

        return _Hook(measure)

    def _output_hook(self, name: str) -> Any:
        return _Hook(lambda layer, args, output: self._measure(name, "output", output))

    def _measure(self, name: str, side: Side, values: Any) -> None:
        floating = (tensor for _, tensor in named_tensors(values) if tensor.is_floating_point() and tensor.numel())
        for place, tensor in enumerate(floating):
            try:
                self._measured.append(_Measured(name, side, place, tensor.numel(), _figures(tensor)))
            except (RuntimeError, NotImplementedError, TypeError):  # of a kind that has no such figures, sparse say
                continue


class _Hook(functools.partial[None]):
    """A hook on a module. A copy of it, pickled or deep, does nothing, and loads where this package is not."""

    def __reduce__(self) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")


def layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The descendants of a module that may be layers, by name."""
    if compiles_its_call(module):
        return
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if within_compiled(child) is not None:
            yield path, child
            continue
        if isinstance(child, (Metric, parametrize.ParametrizationList, torch.jit.ScriptModule)):
            continue
        if compiles_its_call(child) or (isinstance(child, nn.TransformerEncoderLayer) and not child.training):
            continue
        if not list(child.children()) or has_own_parameters(child) or parametrize.is_parametrized(child):
            yield path, child
        yield from layers(child, path)


def scale_of(tensor: Tensor) -> Scale:
    """Mean, standard deviation and range of a floating tensor that is not empty; waits for the device.

    Example:
        >>> scale_of(torch.tensor([60000.0, -60000.0], dtype=torch.float16))
        Scale(mean=0.0, std=60000.0, least=-60000.0, largest=60000.0)
    """
    return _scale(next(iter(_read([_figures(tensor)]))))


@dataclass(frozen=True, slots=True)
class _Measured:
    """One tensor that entered or left a layer."""

    name: str
    side: Side
    place: int  # among the call's floating tensors
    count: int
    figures: Tensor  # its `_figures`


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
    largest = max(max(scale.std, abs(scale.mean - mean)) for scale in scales) or 1.0
    square = sum(
        count / total * ((scale.std / largest) ** 2 + ((scale.mean - mean) / largest) ** 2)
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
