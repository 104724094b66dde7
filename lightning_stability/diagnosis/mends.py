"""Which changes of a line are worth trying: an epsilon, a clamp to the domain, a key that is never masked."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

from lightning_stability.diagnosis.domains import NAMES, Operand, within_domain
from lightning_stability.diagnosis.mending import Mend, expressions_at, span
from lightning_stability.diagnosis.operations import DIVISION, LINALG, POWER, REDUCTION, SOFTMAX, family_of
from lightning_stability.diagnosis.origin import Origin

_MOST = 16
"""Changes of one line that are tried."""
_OTHER = "other"


def mends_of(origin: Origin) -> list[Mend]:
    """Changes of the origin's line, the likeliest first; none where the line is not known or its operation has none."""
    family = family_of(origin) or _OTHER
    if origin.file is None or origin.line is None:
        return []
    try:
        source = Path(origin.file).read_bytes()
        nodes, imported = expressions_at(source, origin.line)
    except (OSError, SyntaxError, ValueError):
        return []
    found: dict[Mend, None] = {}
    for node, make in _places(family, nodes, imported, origin):
        own = span(source, node)
        start, end = _with_brackets(source, *own)
        text = source[start:end].decode()
        is_grouped = (start, end) != own or isinstance(node, (ast.Name, ast.Attribute, ast.Call, ast.Subscript))
        for new in make(text if is_grouped else f"({text})"):
            found[Mend(origin.file, origin.line, start, end, new)] = None
    return list(found)[:_MOST]


Make = Callable[[str], list[str]]


def _places(family: str, nodes: list[ast.expr], imported: set[str], origin: Origin) -> Iterator[tuple[ast.expr, Make]]:
    """What is changed on the line, and into what."""
    if family in (REDUCTION, _OTHER):
        make = _of_nothing if family == REDUCTION else _of_nothing_at_all
        yield from ((node, make) for node in nodes if isinstance(node, ast.Call))
        return
    low = [r.min for r in origin.inputs[1:] if r.min == r.min]
    operand = Operand(origin.op or "", origin.dtype, min(low, default=None))

    def within(x: str) -> list[str]:
        return within_domain(family, x, operand)

    for node in nodes:
        if isinstance(node, ast.Call) and _name(node) in NAMES[family]:
            yield _operand(node, imported), within
            if _name(node) in ("std", "var"):
                yield node, _of_all
        elif isinstance(node, ast.BinOp) and family == DIVISION and isinstance(node.op, ast.Div):
            yield node.right, within
        elif isinstance(node, ast.BinOp) and family == POWER and isinstance(node.op, ast.Pow):
            yield node.left, within
    if family in (SOFTMAX, LINALG):
        return
    # the operation is within a function that the line calls: one of what it is given
    for node in nodes:
        if isinstance(node, ast.Call):
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            yield from ((value, within) for value in given if not isinstance(value, (ast.Constant, ast.Starred)))


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


def _of_all(x: str) -> list[str]:
    """Over the number of values, instead of one less."""
    return [f"{x[:-1]}{'' if x.endswith('()') else ', '}correction=0)"]


def _of_nothing(x: str) -> list[str]:
    return [f"{x}.nan_to_num()"]


def _of_nothing_at_all(x: str) -> list[str]:
    return [f"{x}.nan_to_num(0.0, 0.0, 0.0)"]
