"""The calls of a replayed step as its code wrote them, `torch.log(x)`: from these a script is made.

A trace sees what the dispatcher sees, after autocast and inside of fused functions. This sees what was written.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from lightning_stability.diagnosis.places import Place, PlaceFinder
from lightning_stability.health.values import named_tensors


@dataclass(slots=True)
class Kind:
    """Which values that are not finite a tensor has."""

    nan: bool = False
    posinf: bool = False
    neginf: bool = False

    @property
    def bad(self) -> bool:
        """Whether it has any."""
        return self.nan or self.posinf or self.neginf


@dataclass(slots=True)
class Call:
    """One call of a function of torch.

    Attributes:
        index: Which of the replay's calls it is.
        function: What was called.
        name: Its public name, such as `"torch.log"`; of a `torch.autograd.Function`, its class's.
        place: Where in the user's code.
        reads: The values that went in, by number.
        writes: Those that came out.
        changed: Those that were changed in place: what they are after the call, and what they were.
        autocast: The format of autocast; None where it was off.
        with_grad: Whether gradients were recorded.
    """

    index: int
    function: Any
    name: str
    place: Place
    reads: list[int]
    writes: list[int]
    changed: list[tuple[int, int]]
    autocast: torch.dtype | None
    with_grad: bool


@dataclass(slots=True)
class Kept:
    """The arguments of a call, tensors copied.

    Attributes:
        args: With a `Value` for each tensor.
        kwargs: As well.
    """

    args: Any
    kwargs: Any


@dataclass(slots=True)
class Value:
    """A tensor among a call's arguments.

    Attributes:
        number: Which value it is.
        tensor: A copy, from before the call.
        requires_grad: Whether the original did.
        name: What the user's code calls it; empty if that is unknown.
        is_parameter: Whether it is a parameter or a buffer.
    """

    number: int
    tensor: Tensor
    requires_grad: bool
    name: str
    is_parameter: bool


@dataclass(slots=True)
class Leaf:
    """What is known of a value that no call made."""

    name: str = ""
    is_parameter: bool = False


class CallRecorder(TorchFunctionMode):
    """Records the calls of a replay; a second one of the same step also keeps the arguments of some.

    Args:
        keep: The calls whose arguments, and whose results' gradients, are kept.
    """

    def __init__(self, module: nn.Module, keep: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.kinds: list[Kind] = []
        """Of each value."""
        self.gradients: dict[int, Kind] = {}
        """Of those values that got one."""
        self.leaves: dict[int, Leaf] = {}
        self.kept: dict[int, Kept] = {}
        self.kept_gradients: dict[int, Tensor] = {}
        self.batch_size = 0
        self.in_optimizer = False
        self._keep = keep
        self._numbers: dict[int, tuple[Any, int]] = {}
        """By the id of a tensor: a weak reference to it, and its value's number."""
        self._names: dict[int, str] = {}
        self._parameters: dict[int, str] = {
            id(t): name.rpartition(".")[2] for name, t in [*module.named_parameters(), *module.named_buffers()]
        }
        self._places = PlaceFinder(module)
        self._is_paused = False
        self._apply: Any = None

    def name_batch(self, batch: Any) -> None:
        """The batch that is replayed next."""
        entries = list(named_tensors(batch))
        self._names.update({id(tensor): name for name, tensor in entries})
        self.batch_size = next((len(tensor) for _, tensor in entries if tensor.dim()), 0)

    def __enter__(self) -> CallRecorder:
        """Record from now on what the calling function asks for."""
        self._places.outermost = sys._getframe(1)
        self._apply = vars(torch.autograd.Function)["apply"]
        recorder, original = self, self._apply

        def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            return recorder.record(lambda *a, **k: original.__func__(cls, *a, **k), args, kwargs, cls)

        torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Record no more."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.autograd.Function.apply = self._apply  # type: ignore[method-assign]
        self._places.outermost = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one call and record it."""
        kwargs = kwargs or {}
        return func(*args, **kwargs) if self._is_paused else self.record(func, args, kwargs)

    def record(self, func: Any, args: Any, kwargs: Any, cls: Any = None) -> Any:
        """Run a call and record it.

        Args:
            cls: The `torch.autograd.Function` that is applied, if it is one.
        """
        if self._is_paused:
            return func(*args, **kwargs)
        self._is_paused = True  # what is called within is no call of its own
        try:
            given = list(tensors_of((args, kwargs)))
            versions = [_version(tensor) for tensor in given]
            place = self._places.here()
            reads = [self._number(tensor) for tensor in given]
            kept = self._copy(args, kwargs, place) if len(self.calls) in self._keep else None
            out = func(*args, **kwargs)
            old = zip(given, versions, reads, strict=True)
            changed = {id(t): (t, number) for t, version, number in old if _version(t) != version}.values()
            results = [t for t in tensors_of(out) if all(t is not other for other in given)]
            if results or changed:
                self._add(Call(
                    len(self.calls), cls or func, cls.__name__ if cls else resolve_name(func) or "", place, reads,
                    [self._new_number(t) for t in results], [(self._new_number(t), number) for t, number in changed],
                    _autocast(), torch.is_grad_enabled(),
                ), kept, results)  # fmt: skip
            return out
        finally:
            self._is_paused = False

    def _add(self, call: Call, kept: Kept | None, results: list[Tensor]) -> None:
        self.calls.append(call)
        if kept is not None:
            self.kept[call.index] = kept
        for number, tensor in zip(call.writes, results, strict=True):
            self._watch(tensor, number, kept is not None)

    def _watch(self, tensor: Tensor, number: int, keep: bool = False) -> None:
        """Look at the gradient that a value gets."""
        if not tensor.requires_grad:
            return

        def look(gradient: Tensor | None) -> None:
            if gradient is None:
                return
            self.gradients[number] = kind_of(gradient)
            if keep:
                self.kept_gradients[number] = gradient.detach().clone()

        tensor.register_hook(look)  # type: ignore[no-untyped-call]

    def _number(self, tensor: Tensor) -> int:
        known = self._numbers.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        number = self._new_number(tensor)
        name = self._parameters.get(id(tensor))
        self.leaves[number] = Leaf(name or self._names.get(id(tensor), ""), name is not None)
        self._watch(tensor, number)
        return number

    def _new_number(self, tensor: Tensor) -> int:
        number = len(self.kinds)
        self.kinds.append(kind_of(tensor))
        self._numbers[id(tensor)] = (weakref.ref(tensor), number)
        return number

    def _copy(self, args: Any, kwargs: Any, place: Place) -> Kept:
        names = _names_at(place)

        def copied(value: Any) -> Any:
            if isinstance(value, Tensor):
                number = self._numbers[id(value)][1]
                leaf = self.leaves.get(number, Leaf())
                name = names.get(id(value)) or leaf.name
                return Value(number, value.detach().clone(), value.requires_grad, name, leaf.is_parameter)
            if isinstance(value, dict):
                return {key: copied(item) for key, item in value.items()}
            if isinstance(value, torch.Size):
                return value
            if isinstance(value, (list, tuple)):
                return tuple(map(copied, value)) if isinstance(value, tuple) else list(map(copied, value))
            if isinstance(value, slice):
                return slice(copied(value.start), copied(value.stop), copied(value.step))
            return value

        return Kept(copied(args), copied(kwargs))


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)
    elif isinstance(value, dict):
        yield from tensors_of(list(value.values()))


@torch.no_grad()
def kind_of(tensor: Tensor) -> Kind:
    """Which values that are not finite a tensor has.

    Args:
        tensor: Any; one of whole numbers has none.
    """
    if tensor.layout != torch.strided or not (tensor.is_floating_point() or tensor.is_complex()):
        return Kind()
    values = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor.detach()
    if tensor.dtype.itemsize == 1:
        values = values.float()
    if bool(torch.isfinite(values).all()):
        return Kind()
    return Kind(*(bool(is_such(values).any()) for is_such in (torch.isnan, torch.isposinf, torch.isneginf)))


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _autocast() -> torch.dtype | None:
    for device in ("cuda", "cpu"):
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
    return None


def _names_at(place: Place) -> dict[int, str]:
    """What the variables of the user's function are called, by the id of their tensor."""
    frame: Any = sys._getframe(1)
    while frame is not None and (frame.f_code.co_filename, frame.f_lineno) != (place.file, place.line):
        frame = frame.f_back
    if frame is None:
        return {}
    return {id(value): name for name, value in frame.f_locals.items() if isinstance(value, Tensor)}
