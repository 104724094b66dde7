"""A line of the user's code, mended as long as a replay lasts: the text that is tried is the one that is proposed."""

from __future__ import annotations

import ast
import contextlib
import gc
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mend:
    """One change of a piece of source text.

    Attributes:
        file: The user's file.
        line: The line at fault.
        start: Where the piece begins in the file, in bytes.
        end: Where it ends.
        text: What stands there instead.
    """

    file: str
    line: int
    start: int
    end: int
    text: str

    @property
    def source(self) -> bytes:
        """The whole file, mended."""
        source = Path(self.file).read_bytes()
        return source[: self.start] + self.text.encode() + source[self.end :]

    @property
    def code(self) -> str:
        """The mended line, with those that belong to the same piece."""
        source = self.source
        first = source.rfind(b"\n", 0, self.start) + 1
        last = source.find(b"\n", self.start + len(self.text.encode()))
        return source[first : len(source) if last < 0 else last].decode().strip()


@contextlib.contextmanager
def mended(mend: Mend, functions: list[types.FunctionType]) -> Iterator[None]:
    """Let functions that hold the line run the mended source.

    Args:
        functions: What `functions_with` found.

    Raises:
        LookupError: If no function of this process holds the line, or the file is not what it was loaded from.
    """
    new = list(_codes(compile(mend.source, mend.file, "exec", dont_inherit=True)))
    swapped: list[tuple[types.FunctionType, types.CodeType]] = []
    for function in functions:
        old = function.__code__
        code = next((c for c in new if _is_same_function(c, old)), None)
        if code is not None:
            swapped.append((function, old))
            function.__code__ = code
    try:
        if not swapped:
            raise LookupError(f"no function of this process has the line {mend.file}:{mend.line}")
        yield
    finally:
        for function, old in swapped:
            function.__code__ = old


def expressions_at(source: bytes, line: int) -> tuple[list[ast.expr], set[str]]:
    """The expressions of the statement at a line, those that stand on the line first; and the names of its imports.

    Raises:
        SyntaxError: If it is no Python.
    """
    tree = ast.parse(source)
    statements = [
        node for node in ast.walk(tree) if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or 0)
    ]
    if not statements:
        return [], set()
    innermost = max(statements, key=lambda node: (node.lineno, -(node.end_lineno or 0), node.col_offset))
    found = list(_own_expressions(innermost))
    found.sort(key=lambda node: not node.lineno <= line <= (node.end_lineno or 0))  # stable
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {(alias.asname or alias.name).partition(".")[0] for node in imports for alias in node.names}
    return found, names


def span(source: bytes, node: ast.expr) -> tuple[int, int]:
    """Where a node's text begins and ends in the file, in bytes."""
    starts = [0]
    for text in source.split(b"\n"):
        starts.append(starts[-1] + len(text) + 1)
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset


def _own_expressions(statement: ast.stmt) -> Iterator[ast.expr]:
    """Those of the statement, without those of the statements within it."""
    for child in ast.iter_child_nodes(statement):
        if isinstance(child, (ast.expr, ast.withitem)):
            yield from (node for node in ast.walk(child) if isinstance(node, ast.expr))


def functions_with(file: str, line: int) -> list[types.FunctionType]:
    """All functions of this process whose code, or that of functions within them, has a line.

    Args:
        file: As their code names it.
    """
    return [
        thing
        for thing in gc.get_objects()
        if type(thing) is types.FunctionType and thing.__code__.co_filename == file and _holds(thing.__code__, line)
    ]


def _holds(code: types.CodeType, line: int) -> bool:
    if code.co_firstlineno > line:
        return False
    return any(line == number for _, _, number in code.co_lines()) or any(
        _holds(inner, line) for inner in code.co_consts if isinstance(inner, types.CodeType)
    )


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _codes(inner)


def _is_same_function(new: types.CodeType, old: types.CodeType) -> bool:
    names = ("co_name", "co_firstlineno", "co_freevars", "co_argcount", "co_posonlyargcount", "co_kwonlyargcount")
    return all(getattr(new, name) == getattr(old, name) for name in names)
