"""Which operations have a domain outside of which they, or their derivatives, are not finite."""

from __future__ import annotations

import math

from lightning_stability.diagnosis.origin import Origin, short_name
from lightning_stability.diagnosis.trace import Range

LOGARITHM, ROOT, ACOS, POWER, DIVISION = "logarithm", "root", "acos", "power", "division"
EXPONENTIAL, LINALG, SOFTMAX, REDUCTION = "exponential", "linalg", "softmax", "reduction"

_FAMILIES = {
    LOGARITHM: {"log", "log2", "log10", "log1p", "logit", "lgamma", "digamma", "xlogy", "binary_cross_entropy"},
    ROOT: {"sqrt", "rsqrt", "cdist", "norm", "std", "var"},
    ACOS: {"acos", "asin", "atanh", "erfinv", "acosh"},
    POWER: {"pow", "float_power"},
    DIVISION: {"div", "true_divide", "reciprocal", "remainder", "fmod", "atan2"},
    EXPONENTIAL: {"exp", "exp2", "expm1", "sinh", "cosh"},
    SOFTMAX: {"softmax", "log_softmax", "logsumexp", "logaddexp"},
    REDUCTION: {"mean", "nll_loss", "nll_loss2d", "nll_loss_nd", "cross_entropy", "median", "nanmean"},
}


def family_of(origin: Origin) -> str | None:
    """What kind of operation made the first non-finite value; None if it is one that is defined everywhere.

    Args:
        origin: The origin.
    """
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
    if family is None:
        return False
    if origin.phase == "backward":
        return family != EXPONENTIAL
    if family == EXPONENTIAL:
        return False
    if family == SOFTMAX:
        return any(r.neginf for r in ranges)
    if family == REDUCTION:
        return is_over_nothing(origin)
    if family == DIVISION:
        return _reaches_zero(ranges[-1]) if ranges else False
    if family == POWER:
        return not ranges or ranges[0].min <= 0 or origin.output.nan > 0
    if family == LINALG or origin.output.nan:
        return True
    return any(r.min <= 0 for r in ranges) or family in (LOGARITHM, ACOS)


def is_over_nothing(origin: Origin) -> bool:
    """Whether it is a mean, or a loss that is one, of no values.

    Args:
        origin: The origin.
    """
    if family_of(origin) == REDUCTION:
        small = all(abs(v) < 1e4 for r in origin.inputs for v in (r.min, r.max) if math.isfinite(v))
        return origin.output.nan > 0 and small and not any(r.nonfinite for r in origin.inputs)
    if family_of(origin) == DIVISION and origin.phase == "forward" and len(origin.inputs) == 2:
        return all(r.min == r.max == 0 for r in origin.inputs)
    return False


def _reaches_zero(values: Range) -> bool:
    """Whether a denominator is 0 somewhere, or as good as that."""
    return values.min <= 0 <= values.max or 0 < values.min < 1e-30 or (values.min <= 1e-30 and values.max < 0)
