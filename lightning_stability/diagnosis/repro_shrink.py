"""Running a script's text in this process, and shrinking the values that it is given."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_stability.diagnosis.calls import Kind, kind_of
from lightning_stability.diagnosis.repro_plan import Plan
from lightning_stability.diagnosis.repro_text import Mend, Script, Writer

_DIMENSIONS = 4


def fails_alike(plan: Plan) -> bool:
    """Whether the script of a plan fails as the step did: each value of the kind that it was, finite or not."""
    script = Writer(plan).write()
    values = run(script)
    if values is None:
        return False
    for call in plan.calls:
        for number in call.writes:
            if kind_of(values[script.names[number]]).bad != plan.kinds[number].bad:
                return False
    if not plan.backward:
        return all(_same(kind_of(values[script.names[n]]), plan.kinds[n]) for n in plan.bad)
    return any(kind_of(_gradient(values[script.names[n]])).bad for n in plan.bad)


def is_mended(plan: Plan, mend: Mend) -> bool:
    """Whether all is finite with a change."""
    script = Writer(plan, mend).write()
    values = run(script)
    if values is None:
        return False
    if plan.backward:
        return not any(kind_of(_gradient(values[script.names[n]])).bad for n in plan.bad)
    return not any(kind_of(values[script.names[n]]).bad for n in plan.bad)


def run(script: Script) -> dict[str, Any] | None:
    """The values of a script's variables after it has run, but for its last check; None if it raises an error."""
    lines = [*script.imports, *script.body, *(line for line in script.check if not line.startswith("assert"))]
    values: dict[str, Any] = {"torch": torch, "saved": script.saved}
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exec(compile("import math\n" + "\n".join(lines), "repro.py", "exec"), values)
        except Exception:  # a shape that does not fit any more: not a script that fails alike
            return None
    return values


def shrink(plan: Plan, first: list[int], seconds: float = 10.0) -> Plan:
    """The same with as few rows and columns as fail in the same way.

    Args:
        first: Rows that are tried first, such as the bad samples.
        seconds: When to stop.
    """
    deadline = time.monotonic() + seconds
    for dimension in range(_DIMENSIONS):
        for length in sorted(_lengths(plan, dimension), reverse=True):
            plan = _shrink(plan, dimension, length, first if dimension == 0 else [], deadline)
    return _simple_seeds(plan)


def _lengths(plan: Plan, dimension: int) -> set[int]:
    tensors = [value.tensor for value in plan.inputs.values() if not value.is_parameter]
    return {t.shape[dimension] for t in tensors if t.dim() > dimension and t.shape[dimension] > 1}


def _shrink(plan: Plan, dimension: int, length: int, first: list[int], deadline: float) -> Plan:
    """Delta debugging over the places along one dimension."""
    kept = list(range(length))

    def interesting(places: list[int]) -> Plan | None:
        candidate = _select(plan, dimension, length, places)
        return candidate if time.monotonic() < deadline and fails_alike(candidate) else None

    best = plan
    for candidate in [[place] for place in first[:4]] + ([first] if first else []):
        found = interesting(candidate) if all(place < length for place in candidate) else None
        if found is not None:
            return found
    parts = 2
    while len(kept) > 1:
        for places in _parts(kept, parts):
            found = interesting(places)
            if found is not None:
                best, kept, parts = found, places, 2
                break
        else:
            if parts >= min(len(kept), 32):
                break
            parts = min(len(kept), parts * 2)
    return best


def _parts(kept: list[int], count: int) -> Iterator[list[int]]:
    """The parts, and then, of more than two, all but one of them."""
    size = -(-len(kept) // count)
    chunks = [kept[start : start + size] for start in range(0, len(kept), size)]
    yield from chunks
    if len(chunks) > 2:
        for left_out in range(len(chunks)):
            yield [place for number, chunk in enumerate(chunks) if number != left_out for place in chunk]


def _select(plan: Plan, dimension: int, length: int, places: list[int]) -> Plan:
    def select(tensor: Tensor) -> Tensor:
        if tensor.dim() <= dimension or tensor.shape[dimension] != length:
            return tensor
        return tensor.index_select(dimension, torch.tensor(places, device=tensor.device))

    inputs = {n: select(v.tensor) for n, v in plan.inputs.items() if not v.is_parameter}
    return plan.with_tensors(inputs, {n: select(seed) for n, seed in plan.seeds.items()})


def _simple_seeds(plan: Plan) -> Plan:
    """The gradients of a sum, if they fail in the same way."""
    if not plan.backward:
        return plan
    make: list[Callable[[Tensor], Tensor]] = [torch.ones_like, torch.zeros_like]
    for simple in make:
        candidate = plan.with_tensors({}, {n: simple(seed) for n, seed in plan.seeds.items()})
        if _kinds_of_gradients(candidate) == _kinds_of_gradients(plan):
            return candidate
    return plan


def _kinds_of_gradients(plan: Plan) -> list[Kind] | None:
    script = Writer(plan).write()
    values = run(script)
    return None if values is None else [kind_of(_gradient(values[script.names[n]])) for n in plan.bad]


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros(()) if tensor.grad is None else tensor.grad


def _same(a: Kind, b: Kind) -> bool:
    return (a.nan == b.nan and (a.posinf or a.neginf) == (b.posinf or b.neginf)) or (a.nan and b.nan)
