"""How what an operation is applied to is kept within its domain: an epsilon, a clamp, as code that can be pasted.

The line of the user's code and the script of the failure are mended with the same changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lightning_stability.diagnosis.operations import (
    ACOS,
    DIVISION,
    EXPONENTIAL,
    LINALG,
    LOGARITHM,
    POWER,
    ROOT,
    SOFTMAX,
)

NAMES = {
    LOGARITHM: {"log", "log2", "log10", "log1p", "lgamma", "digamma", "xlogy"},
    ROOT: {"sqrt", "rsqrt", "sqrt_", "cdist", "norm", "vector_norm", "var", "std"},
    ACOS: {"acos", "arccos", "asin", "arcsin", "atanh", "arctanh", "erfinv", "logit", "acosh", "arccosh"},
    POWER: {"pow", "pow_", "float_power", "__pow__"},
    DIVISION: {"div", "true_divide", "divide", "div_", "reciprocal", "__truediv__"},
    EXPONENTIAL: {"exp", "exp2", "expm1", "sinh", "cosh"},
    LINALG: {"svd", "svdvals", "eigh", "eigvalsh", "eig", "qr", "pinv", "inv", "inverse", "cholesky", "solve"}
    | {"det", "logdet", "slogdet"},
    SOFTMAX: {"softmax", "log_softmax", "logsumexp"},
}
"""Functions of torch and Python, by family."""
_TINY = {"float16": "1e-3", "bfloat16": "1e-3"}


@dataclass(frozen=True)
class Operand:
    """What an operation is applied to.

    Attributes:
        op: The operation, such as `"log1p"`.
        dtype: Of the numbers, such as `"float16"`; None if that is not known.
        least: The smallest of them; None if that is not known.
        is_count: Whether they are whole numbers, of which none is below 0.
    """

    op: str
    dtype: str | None = None
    least: float | None = None
    is_count: bool = False


def family_named(name: str) -> str | None:
    """The family of a function; None if it is one that is defined everywhere.

    Args:
        name: Of the function, such as `"log"`.
    """
    return next((family for family, names in NAMES.items() if name in names), None)


def within_domain(family: str, x: str, operand: Operand) -> list[str]:
    """What may stand in an operand's place, the likeliest first; none where the family has no domain.

    Args:
        x: The operand's text, in brackets where it needs them.

    Example:
        >>> within_domain("logarithm", "p", Operand("log"))
        ['p.clamp(min=1e-6)']
    """
    make = _MAKE.get(family)
    return [] if make is None else make(x, operand)


def _tiny(operand: Operand, usual: str) -> str:
    return _TINY.get(operand.dtype or "", usual)


def _positive(x: str, operand: Operand) -> list[str]:
    return [f"{x}.clamp(min={'-1 + ' * (operand.op == 'log1p')}{_tiny(operand, '1e-6')})"]


def _root(x: str, operand: Operand) -> list[str]:
    return [f"{x}.clamp(min={_tiny(operand, '1e-12')})", f"({x} + {_tiny(operand, '1e-6')})"]


def _between(x: str, operand: Operand) -> list[str]:
    eps = _tiny(operand, "1e-6")
    if operand.op in ("acosh", "arccosh"):
        return [f"{x}.clamp(min=1 + {eps})"]
    return [f"{x}.clamp({'' if operand.op == 'logit' else '-1 + '}{eps}, 1 - {eps})"]


def _denominator(x: str, operand: Operand) -> list[str]:
    eps = _tiny(operand, "1e-6")
    made = [f"{x}.clamp(min={eps})", f"({x} + {eps})"]
    is_positive = operand.least is None or operand.least >= 0
    counted = [f"{x}.clamp(min=1)"] if operand.is_count else []
    return [*counted, *(made if is_positive else made[::-1]), f"{x}.clamp(min=1e-3)"]


def _small(x: str, operand: Operand) -> list[str]:
    return [f"{x}.clamp(max={'10' if operand.dtype == 'float16' else '80'})"]


def _apart(x: str, operand: Operand) -> list[str]:
    """Unequal small numbers on the diagonal: no two values are equal, and none of a matrix without them is 0."""
    return [f"({x} + 1e-3 * {x}.new_tensor(range(1, 1 + {x}.shape[-1])).diag_embed())"]


def _never_all(x: str, operand: Operand) -> list[str]:
    return [f"{x}.clamp(min=-1e4)"]


Make = Callable[[str, Operand], list[str]]
_MAKE: dict[str, Make] = {
    LOGARITHM: _positive,
    ROOT: _root,
    ACOS: _between,
    POWER: _positive,
    DIVISION: _denominator,
    EXPONENTIAL: _small,
    LINALG: _apart,
    SOFTMAX: _never_all,
}
