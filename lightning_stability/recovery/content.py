"""What a module holds, looked at by content: non-finite values that came by ways that no step's judgement sees."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lightning_stability.internals import buffers_of, parameters_of, version_of
from lightning_stability.recovery.tensors import dense, is_writable, sizes_of, values_of

SMALL = 65_536
"""What no optimizer trains is copied if it was seen to change, or if it holds no more numbers than this."""


class Contents:
    """Parameters (frozen or not) and buffers (persistent or not) of a module, and tensors of its extra state.

    They are found anew at each look, so that replaced modules and tensors are seen too. A look is one pass over all
    tensors of a device and dtype, and one read for each device: for moments that cost nothing, such as a bad step, a
    save, an epoch's end, a stop. No other process is asked.

    What holds non-finite values when it is first seen does so by design, and may go on: masks hold -inf, a smallest
    value so far starts from inf. A tensor of zeros and -inf alone is taken for a mask whenever it comes.

    Args:
        optimizers: Returns the optimizers: what they train is looked at but never copied.

    Example:
        >>> module = nn.BatchNorm1d(2)
        >>> contents = Contents(module)
        >>> contents.reference()
        >>> module.running_mean.fill_(float("nan"))
        tensor([nan, nan])
        >>> contents.became_nonfinite()
        ['running_mean']
        >>> contents.restore(["running_mean"])
        ['running_mean']
        >>> module.running_mean
        tensor([0., 0.])
    """

    def __init__(self, module: nn.Module, optimizers: Callable[[], Iterable[Optimizer]] = tuple) -> None:
        self._module = module
        self._optimizers = optimizers
        self._known: dict[str, _Known] = {}
        self._changing: set[str] = set()
        self._trained: set[int] = set()

    @property
    def written(self) -> list[Tensor]:
        """Parameters that were seen to change although no optimizer trains them, for `BufferUndo.keep`."""
        entries = [e for e in self._entries() if e.name in self._changing]
        return [e.value for e in entries if e.tensors is not None and isinstance(e.value, nn.Parameter)]

    @torch.no_grad()
    def reference(self) -> None:
        """Note what everything is now, as what it is when it is good; what became non-finite since stays as noted."""
        self._refer(self._sized())

    def _refer(self, sized: list[_Sized]) -> None:
        self._note_trained()
        known, self._known = self._known, {}
        for entry, values, size in sized:
            before = known.get(entry.name)
            now = _Known.of(entry.value, values, size)
            if before is not None and now.became_nonfinite(before):
                self._known[entry.name] = before
                continue
            self._known[entry.name] = now
            if id(entry.value) in self._trained:
                self._changing.discard(entry.name)
                continue
            if before is not None and now.differs(before):
                self._changing.add(entry.name)
            memory = dense(entry.value)
            if memory is not None and (entry.name in self._changing or memory.numel() <= SMALL):
                now.copy = memory.clone()

    @torch.no_grad()
    def became_nonfinite(self) -> list[str]:
        """The names of all that is non-finite now and was not when it was last good.

        A tensor that was never seen counts if it holds NaN or +inf.
        """
        return self._became_nonfinite(self._sized())

    def _became_nonfinite(self, sized: list[_Sized]) -> list[str]:
        return [
            entry.name
            for entry, values, size in sized
            if not math.isfinite(size)
            and _Known.of(entry.value, values, size).became_nonfinite(self._known.get(entry.name))
        ]

    @torch.no_grad()
    def restore(self, names: Iterable[str], newer: Callable[[str], Tensor | None] = lambda name: None) -> list[str]:
        """Restore tensors from the newest good copy.

        Args:
            names: What `became_nonfinite` returned.
            newer: Gives a newer copy than that of the last `reference`, if there is one: `BufferUndo.copy_of`.

        Returns:
            Those that were restored. Of the others there is no copy.
        """
        entries = {entry.name: entry for entry in self._entries()}
        restored = []
        for name in names:
            entry, known = entries.get(name), self._known.get(name)
            if entry is None or entry.tensors is None:
                continue
            copies = (newer(name), None if known is None else known.copy)
            good = next((copy for copy in copies if copy is not None and _is_good(copy, known)), None)
            if good is not None:
                entry.set(good)
                restored.append(name)
        return restored

    @torch.no_grad()
    def mend(self, newer: Callable[[str], Tensor | None], refer: bool = False) -> tuple[list[str], list[str]]:
        """Restore what became non-finite, as far as there are copies.

        Args:
            newer: As for `restore`.
            refer: Whether to `reference` afterwards; both together look at everything once.

        Returns:
            The names of what has been restored, and of what could not be.
        """
        sized = self._sized()
        bad = self._became_nonfinite(sized)
        restored = self.restore(bad, newer) if bad else []
        if refer:
            self._refer(self._sized() if restored else sized)
        return restored, [name for name in bad if name not in restored]

    def _sized(self) -> list[_Sized]:
        read = list(self._entries_with_values())
        sizes = sizes_of([values for _, values in read])
        return [(entry, values, size) for (entry, values), size in zip(read, sizes, strict=True)]

    def _entries_with_values(self) -> Iterator[tuple[_Entry, Tensor]]:
        for entry in self._entries():
            values = values_of(entry.value)
            if values is not None:
                yield entry, values

    def _entries(self) -> Iterator[_Entry]:
        """Each tensor once, under the first of its names."""
        seen: set[int] = set()
        for prefix, owner in self._module.named_modules():
            for tensors in (parameters_of(owner), buffers_of(owner)):
                for key, value in tensors.items():
                    if value is not None and id(value) not in seen:
                        seen.add(id(value))
                        yield _Entry(f"{prefix}.{key}" if prefix else key, value, tensors, key)
            if type(owner).get_extra_state is not nn.Module.get_extra_state:
                for place, value in enumerate(_tensors_of_extra_state(owner)):
                    name = f"_extra_state[{place}]"
                    yield _Entry(f"{prefix}.{name}" if prefix else name, value)

    def _note_trained(self) -> None:
        """Parameters that an optimizer was seen to train; without one, all that could be trained.

        (Many modules give all of their parameters to the optimizer; it passes over those without a gradient.)
        """
        groups = [group for optimizer in self._optimizers() for group in optimizer.param_groups]
        self._trained |= {id(p) for group in groups for p in group["params"] if p.requires_grad}
        for parameter in self._module.parameters():
            if parameter.grad is not None or (not groups and parameter.requires_grad):
                self._trained.add(id(parameter))


@dataclass(slots=True, eq=False)
class _Entry:
    """A tensor of the module, and where it is held; of extra state nothing is known of that."""

    name: str
    value: Any
    tensors: dict[str, Any] | None = None
    key: str = ""

    def set(self, content: Tensor) -> None:
        memory = dense(self.value)
        alike = memory is not None and (memory.shape, memory.dtype) == (content.shape, content.dtype)
        if memory is not None and alike and is_writable(memory):
            memory.copy_(content)
        else:
            self.value.data = content.to(self.value.device, copy=True)


_Sized = tuple[_Entry, Tensor, float]
"""A tensor, its numbers, and their norm."""


@dataclass(slots=True, eq=False)
class _Known:
    """What a tensor was when it was looked at."""

    value: weakref.ref[Tensor]
    version: int
    size: float
    nan: int = 0
    positive: int = 0
    negative: int = 0
    """How many values are NaN, inf and -inf."""
    is_mask: bool = False
    copy: Tensor | None = None

    @classmethod
    def of(cls, value: Tensor, values: Tensor, size: float) -> _Known:
        known = cls(weakref.ref(value), version_of(value), size)
        if not math.isfinite(size):
            counts = [values.isnan().sum(), values.isposinf().sum(), values.isneginf().sum(), (values == 0).sum()]
            known.nan, known.positive, known.negative, zeros = torch.stack(counts).tolist()
            known.is_mask = zeros > 0 and zeros + known.negative == values.numel()
        return known

    @property
    def holds_nonfinite(self) -> bool:
        return bool(self.nan or self.positive or self.negative)

    def became_nonfinite(self, before: _Known | None) -> bool:
        """Whether there is more than there was."""
        if before is None:
            return bool(self.nan or self.positive)
        to_minus_inf = self.negative > 0 and not before.negative and not self.is_mask
        return self.nan > before.nan or self.positive > before.positive or to_minus_inf

    def differs(self, before: _Known) -> bool:
        """Whether the tensor was written or replaced."""
        same_size = self.size == before.size or (math.isnan(self.size) and math.isnan(before.size))
        return self.value() is not before.value() or self.version != before.version or not same_size


def _tensors_of_extra_state(module: nn.Module) -> list[Tensor]:
    try:
        leaves = tree_leaves(module.get_extra_state())
    except Exception:  # whatever the user's own raises: nobody has asked for a state_dict
        return []
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _is_good(copy: Tensor, known: _Known | None) -> bool:
    values = values_of(copy)
    if values is None:
        return True
    return not _Known.of(copy, values, sizes_of([values])[0]).became_nonfinite(known)
