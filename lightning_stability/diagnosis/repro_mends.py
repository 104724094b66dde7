"""Small changes of known form that may mend a script: an epsilon, a clamp, single precision."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_stability.diagnosis.calls import Call, Value, kind_of
from lightning_stability.diagnosis.domains import Operand, family_named, within_domain
from lightning_stability.diagnosis.operations import DIVISION
from lightning_stability.diagnosis.repro_plan import Plan
from lightning_stability.diagnosis.repro_text import Mend

_HALF = (torch.float16, torch.bfloat16)
_FILLS = {"masked_fill", "masked_fill_"}


def mends(plan: Plan) -> Iterator[Mend]:
    """What may mend the script of a plan, the smallest change first."""
    yield from _valid_inputs(plan)
    for call in sorted(plan.calls, key=lambda c: (c.index != plan.birth, -c.index)):
        short = call.name.rpartition(".")[2]
        args = plan.kept[call.index].args
        if short == "__get__" or not args:
            continue
        yield from _within_domain(call, short, args)
        yield from _not_over_nothing(plan, call, short)
    formats = {v.tensor.dtype for v in plan.inputs.values()} | {call.autocast for call in plan.calls}
    if formats & set(_HALF):
        yield Mend("the operation in fp32: `torch.autocast(enabled=False)` around it", in_fp32=True)


def _valid_inputs(plan: Plan) -> Iterator[Mend]:
    for number, value in plan.inputs.items():
        kind = kind_of(value.tensor)
        if kind.nan or kind.posinf:
            text = "torch.nan_to_num({}, nan=0.0, posinf=0.0, neginf=0.0)"
            yield Mend(f"the values of `{value.name or 'x'}` that are not finite replaced", inputs={number: text})


def _within_domain(call: Call, short: str, args: Any) -> Iterator[Mend]:
    if short in _FILLS and len(args) > 2 and args[2] == -math.inf:
        text = "torch.finfo({0}.dtype).min"
        yield Mend(
            "the smallest finite number in the mask instead of -inf",
            calls={call.index: f"{{0}}.{short}({{1}}, {text})"},
        )
    family = family_named(short)
    place = 1 if family == DIVISION and len(args) > 1 else 0
    if family is None or not isinstance(args[place], Value):
        return
    given: Tensor = args[place].tensor
    dtype = call.autocast or given.dtype
    least = float(given.min()) if given.numel() and not given.is_complex() else None
    operand = Operand(short, str(dtype).removeprefix("torch."), least, _counts(given))
    for text in within_domain(family, "{0}", operand):
        shown = text.format("x")
        remedy = f"a divisor of `{shown}`" if family == DIVISION else f"`{short.strip('_')}` of `{shown}`"
        yield Mend(remedy, {(call.index, place): text})


def _counts(tensor: Tensor) -> bool:
    """Whether a divisor's values are whole numbers, as those of a count are."""
    if tensor.is_complex() or not tensor.numel():
        return False
    return bool((tensor == tensor.round()).all()) and bool((tensor > 0).any()) and bool((tensor >= 0).all())


def _not_over_nothing(plan: Plan, call: Call, short: str) -> Iterator[Mend]:
    kept = plan.kept[call.index]
    if short in ("cross_entropy", "nll_loss") and len(kept.args) > 1 and kept.kwargs.get("reduction") == "mean":
        ignored = kept.kwargs.get("ignore_index", -100)
        given = {name: kept.kwargs.get(name) for name in ("ignore_index", "label_smoothing")}
        options = "".join(
            f", {name}={value!r}" for name, value in given.items() if isinstance(value, (int, float)) and value
        )
        total = f'{call.name}({{0}}, {{1}}{options}, reduction="sum")'
        yield Mend(
            "a sum that is divided by the number of targets, at least 1",
            calls={call.index: f"{total} / ({{1}} != {ignored}).sum().clamp(min=1)"},
        )
    elif short == "mean" and len(kept.args) == 1 and not kept.kwargs:
        yield Mend("`sum() / max(numel(), 1)` for `mean()`", calls={call.index: "{0}.sum() / max({0}.numel(), 1)"})
