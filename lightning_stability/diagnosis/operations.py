"""Which operations have a domain outside of which they, or their derivatives, are not finite."""

from __future__ import annotations

import math

from lightning_stability.diagnosis.origin import Origin, short_name
from lightning_stability.diagnosis.ranges import Range

LOGARITHM, ROOT, ACOS, POWER, DIVISION = "logarithm", "root", "acos", "power", "division"
EXPONENTIAL, LINALG, SOFTMAX, REDUCTION = "exponential", "linalg", "softmax", "reduction"

_FAMILIES = {
    LOGARITHM: {"log", "log2", "log10", "log1p", "lgamma", "digamma", "xlogy", "binary_cross_entropy"},
    ROOT: {"sqrt", "rsqrt", "cdist", "norm", "std", "var"},
    ACOS: {"acos", "asin", "atanh", "erfinv", "acosh", "logit"},
    POWER: {"pow", "float_power"},
    DIVISION: {"div", "true_divide", "reciprocal", "remainder", "fmod", "atan2"},
    EXPONENTIAL: {"exp", "exp2", "expm1", "sinh", "cosh"},
    SOFTMAX: {"softmax", "log_softmax", "logsumexp", "logaddexp"},
    REDUCTION: {"mean", "nll_loss", "nll_loss2d", "nll_loss_nd", "cross_entropy", "median", "nanmean"},
}


_LARGEST = {"float16": 65504.0, "bfloat16": 3.4e38, "float32": 3.4e38, "float64": 1.8e308}


_WRITES = {"full", "full_like", "fill", "new_full", "masked_fill", "scalar_tensor", "lift_fresh", "constant_pad_nd"}
"""Operations that place a given number: one that is not finite was asked for."""
_SMALL = 1e6
"""Sums and products of numbers below this fit float32."""
_PRODUCTS = {"cumprod", "prod"}
_SUMS = {
    *("count", "sum", "nansum", "dot", "mv", "mm", "bmm", "addmm", "baddbmm", "scatter_add", "scatter_add_"),
    *("index_add", "index_add_", "segment_reduce", "cumsum"),
}
"""Operations that add up; `count` stands for whole numbers. A mean by hand is one of them over another."""


def family_of(origin: Origin) -> str | None:
    """What kind of operation made the first non-finite value; None if it is one that is defined everywhere."""
    named = _family(origin.op or "")
    if named is None and origin.phase == "backward":  # a derivative of the user's own: what it does itself
        return _family(short_name(origin.aten or ""))
    return named


def _family(op: str) -> str | None:
    op = op.strip("_").removesuffix("_backward")
    if "linalg" in op or op in ("svd", "cholesky", "inverse", "pinverse", "eigh"):
        return ROOT if "norm" in op else LINALG
    if "attention" in op:
        return SOFTMAX
    return next((family for family, names in _FAMILIES.items() if op in names), None)


def is_outside(origin: Origin) -> bool:
    """Whether what went in is outside of the operation's domain, and not only too large for the number format.

    Args:
        origin: Of a forward or backward pass.
    """
    family, ranges = family_of(origin), origin.inputs
    if origin.discarded:
        return True
    if not ranges or origin.op in _WRITES:
        return False
    if family == EXPONENTIAL or (is_too_large(origin) and family not in (LOGARITHM, ACOS, DIVISION)):
        return False
    if family == SOFTMAX:
        return any(r.neginf for r in ranges)
    if family is None or family == REDUCTION:  # of what is finite and small, most operations make what is finite
        is_wide = origin.dtype != "float16" and origin.op not in _PRODUCTS
        is_small = all(size_of(r) < _SMALL for r in ranges)
        return (origin.output.nan > 0 or (is_wide and is_small)) and not any(r.nonfinite for r in ranges)
    if origin.phase == "backward":
        return True
    if family == DIVISION:
        return _reaches_zero(ranges[-1])
    return True


def is_too_large(origin: Origin) -> bool:
    """Whether squares or sums of what went in leave the number format."""
    largest = math.sqrt(_LARGEST.get(origin.dtype or "", _LARGEST["float32"]))
    return any(size_of(r) >= largest for r in origin.inputs)


def size_of(values: Range) -> float:
    """The largest finite value without its sign; 0 if there is none."""
    return max((abs(v) for v in (values.min, values.max) if math.isfinite(v)), default=0.0)


def is_over_nothing(origin: Origin) -> bool:
    """Whether it is a mean, or a loss that is one, of no values."""
    first = origin.inputs[0] if origin.inputs else None
    if first is not None and math.isnan(first.min) and not first.nonfinite:  # it has no values
        return origin.output.nan > 0
    if family_of(origin) == REDUCTION:
        finite = not any(r.nonfinite for r in origin.inputs)
        return origin.output.nan > 0 and finite and not is_too_large(origin)
    if family_of(origin) == DIVISION and origin.phase == "forward" and len(origin.inputs) == 2:
        are_zero = all(r.min == r.max == 0 for r in origin.inputs)
        return are_zero and all(short_name(maker or "") in _SUMS for maker in origin.makers)
    return False


def _reaches_zero(values: Range) -> bool:
    """Whether a denominator is 0 somewhere, or as good as that."""
    return values.min <= 0 <= values.max or 0 < values.min < 1e-30 or (values.min <= 1e-30 and values.max < 0)
