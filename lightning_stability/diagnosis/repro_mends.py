"""Small changes of known form that may mend a script: an epsilon, a clamp, single precision."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_stability.diagnosis.calls import Call, Value, kind_of
from lightning_stability.diagnosis.repro_plan import Plan
from lightning_stability.diagnosis.repro_text import Mend

_HALF = (torch.float16, torch.bfloat16)
_POSITIVE = {"log": "1e-6", "log2": "1e-6", "log10": "1e-6", "sqrt": "1e-12", "rsqrt": "1e-12"}
_POWERS = {"pow", "__pow__", "float_power"}
_DIVISIONS = {"div", "true_divide", "divide", "__truediv__"}
_ARCS = {"acos", "asin", "arccos", "arcsin", "atanh", "arctanh"}
_EXPONENTIALS = {"exp", "expm1", "exp2", "cosh", "sinh"}
_DECOMPOSITIONS = {"svd", "eigh", "svdvals", "eigvalsh"}
_FILLS = {"masked_fill", "masked_fill_"}


def mends(plan: Plan) -> Iterator[Mend]:
    """What may mend the script of a plan, the smallest change first.

    Args:
        plan: What it calls.
    """
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
    at = call.index
    if short in _POSITIVE:
        yield Mend(
            f"`clamp(min={_POSITIVE[short]})` before `{short}`", {(at, 0): f"{{}}.clamp(min={_POSITIVE[short]})"}
        )
    elif short in _POWERS:
        yield Mend("`clamp(min=1e-6)` before the power", {(at, 0): "{}.clamp(min=1e-6)"})
    elif short in _ARCS:
        yield Mend(f"`clamp(-1 + 1e-6, 1 - 1e-6)` before `{short}`", {(at, 0): "{}.clamp(-1 + 1e-6, 1 - 1e-6)"})
    elif short in _EXPONENTIALS:
        given = args[0].tensor.dtype if isinstance(args[0], Value) else torch.float32
        dtype = call.autocast or (given if given.is_floating_point else torch.float32)
        most = int(math.log(torch.finfo(dtype).max)) - 2
        yield Mend(f"`clamp(max={most})` before `{short}`", {(at, 0): f"{{}}.clamp(max={most})"})
    elif short in _DIVISIONS and len(args) > 1 and isinstance(args[1], Value):
        at_least = "1" if _counts(args[1].tensor) else "1e-6"
        if bool((args[1].tensor >= 0).all()):
            text = f"{{}}.clamp(min={at_least})"
            yield Mend(f"`clamp(min={at_least})` of the divisor", {(at, 1): text})
        yield Mend("1e-6 added to the divisor", {(at, 1): "({} + 1e-6)"})
    elif short in _FILLS and len(args) > 2 and args[2] == -math.inf:
        text = "torch.finfo({0}.dtype).min"
        yield Mend(
            "the smallest finite number in the mask instead of -inf", calls={at: f"{{0}}.{short}({{1}}, {text})"}
        )
    elif short in _DECOMPOSITIONS:
        text = "({0} + 1e-3 * torch.diag(torch.arange({0}.shape[-1])))"
        yield Mend("unequal small numbers added to the diagonal", {(at, 0): text})


def _counts(tensor: Tensor) -> bool:
    """Whether a divisor's values are whole numbers, as those of a count are."""
    return bool((tensor == tensor.round()).all()) and tensor.numel() > 0 and bool((tensor > 0).any())


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
