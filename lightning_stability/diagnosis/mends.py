"""Which changes of a line are worth trying: an epsilon, a clamp to the domain, a key that is never masked."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

from lightning_stability.diagnosis.mending import Mend, expressions_at, span
from lightning_stability.diagnosis.operations import (
    ACOS,
    DIVISION,
    EXPONENTIAL,
    LINALG,
    LOGARITHM,
    POWER,
    REDUCTION,
    ROOT,
    SOFTMAX,
    family_of,
)
from lightning_stability.diagnosis.origin import Origin

_MOST = 16
"""Changes of one line that are tried."""
_NAMES = {
    LOGARITHM: {"log", "log2", "log10", "log1p", "lgamma", "digamma", "xlogy"},
    ROOT: {"sqrt", "rsqrt", "sqrt_", "cdist", "norm", "vector_norm", "var", "std"},
    ACOS: {"acos", "arccos", "asin", "arcsin", "atanh", "arctanh", "erfinv", "logit", "acosh", "arccosh"},
    POWER: {"pow", "pow_", "float_power"},
    DIVISION: {"div", "true_divide", "div_", "reciprocal"},
    EXPONENTIAL: {"exp", "exp2", "expm1", "sinh", "cosh"},
    LINALG: {"svd", "svdvals", "eigh", "eigvalsh", "eig", "qr", "pinv", "inv", "inverse", "cholesky", "solve"},
    SOFTMAX: {"softmax", "log_softmax", "logsumexp"},
}
OTHER = "other"
_TINY = {"float16": "1e-3", "bfloat16": "1e-3"}


def mends_of(origin: Origin) -> list[Mend]:
    """Changes of the origin's line, the likeliest first; none where the line is not known or its operation has none.

    Args:
        origin: The origin.
    """
    family = family_of(origin) or OTHER
    if origin.file is None or origin.line is None:
        return []
    try:
        source = Path(origin.file).read_bytes()
        nodes, imported = expressions_at(source, origin.line)
    except (OSError, SyntaxError, ValueError):
        return []
    found: dict[Mend, None] = {}
    for node, make in _places(family, nodes, imported):
        own = span(source, node)
        start, end = _with_brackets(source, *own)
        text = source[start:end].decode()
        is_grouped = (start, end) != own or isinstance(node, (ast.Name, ast.Attribute, ast.Call, ast.Subscript))
        for new in make(text if is_grouped else f"({text})", origin):
            found[Mend(origin.file, origin.line, start, end, new)] = None
    return list(found)[:_MOST]


Make = Callable[[str, Origin], list[str]]


def _places(family: str, nodes: list[ast.expr], imported: set[str]) -> Iterator[tuple[ast.expr, Make]]:
    """What is changed on the line, and into what."""
    make = _MAKE[family]
    if family in (REDUCTION, OTHER):
        yield from ((node, make) for node in nodes if isinstance(node, ast.Call))
        return
    for node in nodes:
        if isinstance(node, ast.Call) and _name(node) in _NAMES[family]:
            yield _operand(node, imported), make
            if _name(node) in ("std", "var"):
                yield node, _of_all
        elif isinstance(node, ast.BinOp) and family == DIVISION and isinstance(node.op, ast.Div):
            yield node.right, make
        elif isinstance(node, ast.BinOp) and family == POWER and isinstance(node.op, ast.Pow):
            yield node.left, make
    if family in (SOFTMAX, LINALG):
        return
    # the operation is within a function that the line calls: one of what it is given
    for node in nodes:
        if isinstance(node, ast.Call):
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            yield from ((value, make) for value in given if not isinstance(value, (ast.Constant, ast.Starred)))


def _name(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _operand(call: ast.Call, imported: set[str]) -> ast.expr:
    """What a function is applied to: `x` of `x.log()` and of `torch.log(x)`."""
    function = call.func
    if isinstance(function, ast.Attribute):
        root: ast.expr = function.value
        while isinstance(root, ast.Attribute):
            root = root.value
        if not (isinstance(root, ast.Name) and root.id in imported):
            return function.value
    return call.args[0] if call.args else call


def _with_brackets(source: bytes, start: int, end: int) -> tuple[int, int]:
    """A piece with the brackets around it that are its own, and no call's."""
    if source[start - 1 : start] + source[end : end + 1] != b"()":
        return start, end
    before = source[: start - 1][-1:].decode(errors="ignore")
    is_call = before.isalnum() or before in ("_", ")", "]")
    return (start, end) if is_call else (start - 1, end + 1)


def _least(origin: Origin, usual: str) -> str:
    return _TINY.get(origin.dtype or "", usual)


def _positive(x: str, origin: Origin) -> list[str]:
    return [f"{x}.clamp(min={'-1 + ' * (origin.op == 'log1p')}{_least(origin, '1e-6')})"]


def _root(x: str, origin: Origin) -> list[str]:
    return [f"{x}.clamp(min={_least(origin, '1e-12')})", f"({x} + {_least(origin, '1e-6')})"]


def _between(x: str, origin: Origin) -> list[str]:
    eps = _least(origin, "1e-6")
    if origin.op == "acosh":
        return [f"{x}.clamp(min=1 + {eps})"]
    return [f"{x}.clamp({'' if origin.op == 'logit' else '-1 + '}{eps}, 1 - {eps})"]


def _denominator(x: str, origin: Origin) -> list[str]:
    eps = _least(origin, "1e-6")
    made = [f"{x}.clamp(min={eps})", f"({x} + {eps})"]
    low = [r.min for r in origin.inputs[1:] if r.min == r.min]
    return [*(made if not low or min(low) >= 0 else made[::-1]), f"{x}.clamp(min=1e-3)"]


def _small(x: str, origin: Origin) -> list[str]:
    return [f"{x}.clamp(max={'10' if origin.dtype == 'float16' else '80'})"]


def _apart(x: str, origin: Origin) -> list[str]:
    import_free = f"{x}.new_tensor(range({x}.shape[-1]))"
    return [f"({x} + 1e-3 * {import_free}.diag_embed())"]


def _never_all(x: str, origin: Origin) -> list[str]:
    return [f"{x}.clamp(min=-1e4)"]


def _of_all(x: str, origin: Origin) -> list[str]:
    """Over the number of values, instead of one less."""
    return [f"{x[:-1]}{'' if x.endswith('()') else ', '}correction=0)"]


def _of_nothing(x: str, origin: Origin) -> list[str]:
    return [f"{x}.nan_to_num()"]


def _of_nothing_at_all(x: str, origin: Origin) -> list[str]:
    return [f"{x}.nan_to_num(0.0, 0.0, 0.0)"]


_MAKE: dict[str, Make] = {
    LOGARITHM: _positive,
    ROOT: _root,
    ACOS: _between,
    POWER: _positive,
    DIVISION: _denominator,
    EXPONENTIAL: _small,
    LINALG: _apart,
    SOFTMAX: _never_all,
    REDUCTION: _of_nothing,
    OTHER: _of_nothing_at_all,
}
