"""Which of a step's calls a script needs to fail as the step did: from finite values to the first that is not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from lightning_stability.diagnosis.calls import Call, CallRecorder, Kept, Kind, Value
from lightning_stability.diagnosis.errors import DiagnosisError
from lightning_stability.diagnosis.origin import Origin

_MOST_CALLS = 12


class CannotReproduceError(DiagnosisError):
    """No script can be made; the message says why."""


@dataclass(slots=True)
class Slice:
    """Some calls of a replay.

    Attributes:
        birth: The call that made the first bad value, or whose derivative did.
        indices: All that are needed, in order.
        backward: Whether the bad value is a gradient.
    """

    birth: int
    indices: list[int]
    backward: bool


@dataclass(slots=True)
class Plan:
    """What a script calls, and with which values.

    Attributes:
        calls: In order.
        kept: Their arguments, by the call's number.
        kinds: Of each value of the replay.
        birth: The call that made the first bad value, or whose derivative did.
        inputs: The values that are given, by number.
        seeds: The gradients of results with which the backward pass begins, by number; empty for a forward failure.
        bad: The values that are bad in the end, or whose gradients are, by number.
        shapes: Those of the inputs in the step, by number.
    """

    calls: list[Call]
    kept: dict[int, Kept]
    kinds: list[Kind]
    birth: int
    inputs: dict[int, Value]
    seeds: dict[int, Tensor]
    bad: list[int]
    shapes: dict[int, list[int]] = field(default_factory=dict)

    @property
    def backward(self) -> bool:
        """Whether the bad value is a gradient."""
        return bool(self.seeds)

    def with_tensors(self, inputs: dict[int, Tensor], seeds: dict[int, Tensor]) -> Plan:
        """The same with other values.

        Args:
            inputs: By number; the others stay.
            seeds: By number; the others stay.
        """
        values = {n: replace(v, tensor=inputs.get(n, v.tensor)) for n, v in self.inputs.items()}
        return replace(self, inputs=values, seeds={n: seeds.get(n, s) for n, s in self.seeds.items()})


def choose(recorder: CallRecorder, origin: Origin) -> Iterator[Slice]:
    """Slices of the replay that may fail in the same way, the most telling first.

    Raises:
        CannotReproduceError: If no call of the replay explains it.
    """
    backward = origin.phase == "backward"
    calls = [c for c in recorder.calls if _is_birth_backward(recorder, c) or not backward]
    calls = calls if backward else [c for c in calls if any(recorder.kinds[n].bad for n in _written(c))]
    here = [c for c in calls if origin.file and (c.place.file, c.place.line) == (origin.file, origin.line)]
    found = here or calls
    if not found:
        raise CannotReproduceError("no call of torch's public functions explains the failure")
    birth = found[-1] if backward else found[0]
    makers = {number: c for c in recorder.calls for number in _written(c)}
    needed = {birth.index} | _behind(recorder, birth, makers)
    if backward:
        needed |= _until_finite(recorder, birth)
        for index in sorted(needed):
            needed |= _behind(recorder, recorder.calls[index], makers)
    whole_line = set(needed)
    for index in sorted(needed, reverse=True):
        whole_line |= _on_the_line(recorder.calls[index], birth, makers)
    for indices in (whole_line, needed, {birth.index}):
        if len(indices) <= _MOST_CALLS:
            yield Slice(birth.index, sorted(indices), backward)


def make_plan(recorder: CallRecorder, chosen: Slice) -> Plan:
    """What the script of a slice calls.

    Args:
        recorder: Of a replay that kept the slice's arguments.
    """
    calls = [recorder.calls[index] for index in chosen.indices]
    made = {number for call in calls for number in _written(call)}
    inputs: dict[int, Value] = {}
    for call in calls:
        for value in values_of(recorder.kept[call.index]):
            if value.number not in made:
                inputs.setdefault(value.number, value)
    read = {number for call in calls for number in call.reads}
    if chosen.backward:
        seeds = {n: recorder.kept_gradients[n] for n in made - read if n in recorder.kept_gradients}
        bad = [n for n, v in inputs.items() if v.requires_grad and recorder.gradients.get(n, Kind()).bad]
        if not seeds or not bad:
            raise CannotReproduceError("the gradients that reach the operation are not known")
    else:
        seeds, bad = {}, [n for n in _written(recorder.calls[chosen.birth]) if recorder.kinds[n].bad]
    shapes = {number: list(value.tensor.shape) for number, value in inputs.items()}
    return Plan(calls, recorder.kept, recorder.kinds, chosen.birth, inputs, seeds, bad, shapes)


def values_of(kept: Any) -> Iterator[Value]:
    """The tensors among kept arguments.

    Args:
        kept: `Kept`, or any part of it.
    """
    if isinstance(kept, Kept):
        yield from values_of([kept.args, kept.kwargs])
    elif isinstance(kept, Value):
        yield kept
    elif isinstance(kept, dict):
        yield from values_of(list(kept.values()))
    elif isinstance(kept, (list, tuple)):
        for item in kept:
            yield from values_of(item)
    elif isinstance(kept, slice):
        yield from values_of([kept.start, kept.stop, kept.step])


def _written(call: Call) -> list[int]:
    return [*call.writes, *(new for new, _ in call.changed)]


def _is_birth_backward(recorder: CallRecorder, call: Call) -> bool:
    """Whether finite gradients came to the call, and one that is not finite went on from it."""
    came = [recorder.gradients[n] for n in _written(call) if n in recorder.gradients]
    went = [recorder.gradients[n] for n in call.reads if n in recorder.gradients]
    return bool(came) and not any(kind.bad for kind in came) and any(kind.bad for kind in went)


def _behind(recorder: CallRecorder, call: Call, makers: dict[int, Call]) -> set[int]:
    """The calls that made what is not finite among what a call reads."""
    found: set[int] = set()
    to_do = [call]
    while to_do:
        for number in to_do.pop().reads:
            maker = makers.get(number)
            if maker is not None and recorder.kinds[number].bad and maker.index not in found:
                found.add(maker.index)
                to_do.append(maker)
    return found


def _until_finite(recorder: CallRecorder, birth: Call) -> set[int]:
    """The calls that read what is not finite, up to those that discard it."""
    found: set[int] = set()
    to_do = [n for n in _written(birth) if recorder.kinds[n].bad]
    while to_do:
        number = to_do.pop()
        for call in recorder.calls[birth.index + 1 :]:
            if number in call.reads and call.index not in found:
                found.add(call.index)
                to_do += [n for n in _written(call) if recorder.kinds[n].bad]
    return found


def _on_the_line(call: Call, birth: Call, makers: dict[int, Call]) -> set[int]:
    """The calls of the same line of code that made what a call reads."""
    found: set[int] = set()
    to_do = [call]
    while to_do:
        for number in to_do.pop().reads:
            maker = makers.get(number)
            if maker is not None and maker.place == birth.place and maker.index not in found:
                found.add(maker.index)
                to_do.append(maker)
    return found
