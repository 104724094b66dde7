"""The text of a script: plain calls of torch, with the values that go in."""

from __future__ import annotations

import inspect
import keyword
import math
import re
import textwrap
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_stability.diagnosis.calls import Call, Value
from lightning_stability.diagnosis.places import Place
from lightning_stability.diagnosis.repro_plan import CannotReproduceError, Plan, values_of

_INLINE = 16
"""The largest number of values that are written into the script."""
_INLINE_CHARACTERS = 80
_INFIX = {
    **{"add": "+", "sub": "-", "subtract": "-", "mul": "*", "multiply": "*", "div": "/", "true_divide": "/"},
    **{"matmul": "@", "__matmul__": "@", "pow": "**", "__pow__": "**", "__truediv__": "/", "__mul__": "*"},
    **{"__add__": "+", "__sub__": "-", "gt": ">", "lt": "<", "ge": ">=", "le": "<=", "eq": "==", "ne": "!="},
    **{"__and__": "&", "__or__": "|", "__floordiv__": "//", "__mod__": "%"},
}
_REFLECTED = {"__rsub__": "-", "__rtruediv__": "/", "__rpow__": "**", "__rdiv__": "/", "__radd__": "+", "__rmul__": "*"}
_INPLACE = {"__iadd__": "+=", "__isub__": "-=", "__imul__": "*=", "__itruediv__": "/=", "__idiv__": "/="}
_RESERVED = {"torch", "math", "saved", "Path", "F", "gradient"}


@dataclass
class Mend:
    """A small change of a script.

    Attributes:
        remedy: What it is, in a few words.
        arguments: What an argument becomes, by the call's number and its position; `{}` stands for it.
        calls: What a call becomes; `{0}` stands for its first argument, and so on.
        inputs: What a value that is given becomes, by its number.
        in_fp32: Whether autocast is off and half precision is made single.
    """

    remedy: str
    arguments: dict[tuple[int, int], str] = field(default_factory=dict)
    calls: dict[int, str] = field(default_factory=dict)
    inputs: dict[int, str] = field(default_factory=dict)
    in_fp32: bool = False


@dataclass
class Script:
    """The text of a script.

    Attributes:
        imports: What it needs besides torch, a line each; definitions follow.
        body: From the values that go in to the last call.
        check: What fails.
        saved: The tensors that are too large for the text, by name.
        names: What each value is called, by its number.
    """

    imports: list[str]
    body: list[str]
    check: list[str]
    saved: dict[str, Tensor]
    names: dict[int, str]


class Writer:
    """Writes the script of a plan."""

    def __init__(self, plan: Plan, mend: Mend | None = None) -> None:
        self._plan = plan
        self._mend = mend or Mend("")
        self._used = set(_RESERVED)
        self._names: dict[int, str] = {}
        self._saved: dict[str, Tensor] = {}
        self._definitions: dict[str, str] = {}

    def write(self) -> Script:
        """The script."""
        plan = self._plan
        body = [self._input(number, value) for number, value in plan.inputs.items()]
        body += self._calls()
        check = self._backward_check() if plan.backward else self._forward_check()
        imports = ["import math"] if any("math." in line for line in [*body, *check]) else []
        return Script(imports + list(self._definitions.values()), body, check, self._saved, self._names)

    def _input(self, number: int, value: Value) -> str:
        name = self._names[number] = self._new_name(value.name, "x")
        mended = self._mend.inputs.get(number, "{}")
        if self._mend.in_fp32 and value.tensor.dtype in (torch.float16, torch.bfloat16):
            mended = mended.format("{}.float()")
        text = mended.format(self._literal(name, value.tensor))
        if self._plan.backward and value.requires_grad:
            text += ".requires_grad_()"
        shape, before = list(value.tensor.shape), self._plan.shapes.get(number)
        of = f", of {before} in the step" if before != shape else ""
        return f"{name} = {text}  # {shape} {_dtype(value.tensor.dtype)}{of}"

    def _calls(self) -> list[str]:
        lines: list[str] = []
        group: Any = None
        place: Place | None = None
        for call in self._plan.calls:
            autocast = None if self._mend.in_fp32 else call.autocast
            now = (autocast, call.with_grad or not self._plan.backward)
            if now != group:
                lines += _opening(*now, self._device())
            indent = "    " * ((now[0] is not None) + (not now[1]))
            if call.place != place and call.place.file:
                lines.append(f"{indent}# {_where(call.place)}: {plain_line(call.place.code)}")
            place, group = call.place, now
            lines.append(indent + self._call(call))
        return lines

    def _call(self, call: Call) -> str:
        text = self._expression(call)
        for new, old in call.changed:
            self._names[new] = self._names[old]
        if not call.writes:
            return text
        targets = [self._result_name(call, number) for number in call.writes]
        self._names.update(zip(call.writes, targets, strict=True))
        several = len(targets) > 1 or call.name.startswith(("torch.linalg.svd", "torch.linalg.eigh"))
        return f"{', '.join(targets)}{',' if several and len(targets) == 1 else ''} = {text}"

    def _result_name(self, call: Call, number: int) -> str:
        known = next((v.name for c in self._plan.calls for v in values_of(self._plan.kept[c.index])
                      if v.number == number and v.name), "")  # fmt: skip
        later = self._plan.calls[self._plan.calls.index(call) + 1 :]
        is_last = all(other.place != call.place for other in later)
        assigned = re.match(r"([A-Za-z_]\w*)\s*=[^=]", call.place.code) if is_last and len(call.writes) == 1 else None
        return self._new_name(known or (assigned[1] if assigned else ""), "out" if is_last else "y")

    def _expression(self, call: Call) -> str:
        kept = self._plan.kept[call.index]
        args = [self._argument(call, place, value) for place, value in enumerate(kept.args)]
        if call.index in self._mend.calls:
            return self._mend.calls[call.index].format(*args, **{k: self._text(v) for k, v in kept.kwargs.items()})
        return self._written(call, args, self._keywords(call, kept.kwargs))

    def _written(self, call: Call, args: list[str], keywords: list[str]) -> str:
        name = call.name
        if isinstance(call.function, type):
            self._definitions.setdefault(name, _source(call.function))
            return f"{name}.apply({', '.join(args)})"
        if not name:
            raise CannotReproduceError(f"a function that is not public is called: {call.function}")
        if not name.startswith("torch.Tensor."):
            return f"{name}({', '.join([*args, *keywords])})"
        short = name.removeprefix("torch.Tensor.")
        first, rest = args[0], args[1:]
        if short.endswith(".__get__"):
            return f"{first}.{short.removesuffix('.__get__')}"
        if short == "__getitem__":
            return f"{first}[{self._index(self._plan.kept[call.index].args[1])}]"
        if short == "__setitem__":
            return f"{first}[{self._index(self._plan.kept[call.index].args[1])}] = {rest[1]}"
        if len(rest) == 1 and not keywords:
            for table, text in ((_INFIX, "{a} {o} {b}"), (_REFLECTED, "{b} {o} {a}"), (_INPLACE, "{a} {o} {b}")):
                if short in table:
                    return text.format(a=_bracketed(first), o=table[short], b=_bracketed(rest[0]))
        if short in ("neg", "__neg__") and not rest:
            return f"-{_bracketed(first)}"
        return f"{_bracketed(first)}.{short}({', '.join([*rest, *keywords])})"

    def _argument(self, call: Call, place: int, value: Any) -> str:
        return self._mend.arguments.get((call.index, place), "{}").format(self._text(value))

    def _keywords(self, call: Call, kwargs: dict[str, Any]) -> list[str]:
        try:
            parameters = inspect.signature(call.function).parameters
        except (TypeError, ValueError):
            parameters = {}  # type: ignore[assignment]
        defaults = {name: p.default for name, p in parameters.items()}
        plain = (int, float, str, bool, type(None))
        left = {k: v for k, v in kwargs.items() if not (isinstance(v, plain) and k in defaults and v == defaults[k])}
        return [f"{name}={self._text(value)}" for name, value in left.items()]

    def _text(self, value: Any) -> str:
        if isinstance(value, Value):
            return self._names[value.number]
        if type(value) in (str, bool, int, type(None)):
            return repr(value)
        if isinstance(value, float):
            return repr(value) if math.isfinite(value) else f"{'-' * (value < 0)}math.{abs(value)!s}"
        if value is Ellipsis:
            return "..."
        if isinstance(value, slice):
            return f"slice({self._text(value.start)}, {self._text(value.stop)}, {self._text(value.step)})"
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            return str(value)
        if isinstance(value, torch.device):
            return repr(str(value))
        if isinstance(value, (list, tuple)):
            inner = ", ".join(map(self._text, value))
            comma = "," if isinstance(value, tuple) and len(value) == 1 else ""
            return f"[{inner}]" if isinstance(value, list) else f"({inner}{comma})"
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return f"{{{', '.join(f'{key!r}: {self._text(item)}' for key, item in value.items())}}}"
        if value in (bool, int, float):
            return str(value.__name__)
        raise CannotReproduceError(f"an argument is a {type(value).__qualname__}, which has no text")

    def _index(self, value: Any) -> str:
        """An index as it is written in brackets."""
        if isinstance(value, slice):
            ends = ["" if end is None else self._text(end) for end in (value.start, value.stop)]
            return ":".join(ends if value.step is None else [*ends, self._text(value.step)])
        if isinstance(value, tuple) and value:
            return ", ".join(map(self._index, value)) + "," * (len(value) == 1)
        return self._text(value)

    def _literal(self, name: str, tensor: Tensor) -> str:
        return literal(name, tensor, self._saved)

    def _forward_check(self) -> list[str]:
        return [line for n in self._plan.bad for line in check(self._names[n], self._names[n])]

    def _backward_check(self) -> list[str]:
        plan = self._plan
        names = [self._names[number] for number in plan.seeds]
        if len(names) == 1 and all(bool((seed == 1).all()) for seed in plan.seeds.values()):
            lines = [f"{names[0]}.sum().backward()"]
        elif len(names) == 1:
            lines = [f"{names[0]}.backward({self._literal('gradient', next(iter(plan.seeds.values())))})"]
        else:
            seeds = [self._literal(f"gradient_of_{n}", s) for n, s in zip(names, plan.seeds.values(), strict=True)]
            lines = [f"torch.autograd.backward([{', '.join(names)}], [{', '.join(seeds)}])"]
        lines += [line for n in plan.bad for line in check(f"{self._names[n]}.grad", f"gradient of {self._names[n]}")]
        return lines

    def _device(self) -> str:
        return next((v.tensor.device.type for v in self._plan.inputs.values()), "cpu")

    def _new_name(self, wanted: str, otherwise: str) -> str:
        stem = re.sub(r"\W+", "_", wanted).strip("_")
        if not stem.isidentifier() or keyword.iskeyword(stem) or not stem.isascii():
            stem = otherwise
        name, count = stem, 2
        while name in self._used:
            name, count = f"{stem}_{count}", count + 1
        self._used.add(name)
        return name


def check(expression: str, name: str) -> list[str]:
    """The lines that fail if a tensor is not finite.

    Args:
        expression: Gives the tensor.
        name: What it is called in the message.
    """
    return [
        f"bad = {expression}.isnan().sum().item(), {expression}.isinf().sum().item()",
        f'assert bad == (0, 0), f"{name}: {{bad[0]}} NaN and {{bad[1]}} infinite of {{{expression}.numel()}} values"',
    ]


def literal(name: str, tensor: Tensor, saved: dict[str, Tensor]) -> str:
    """The text of a tensor.

    Args:
        saved: Gets it where it is too large for a text.
    """
    dtype = "" if tensor.dtype in (torch.float32, torch.int64, torch.bool) else f", dtype={tensor.dtype}"
    device = "" if tensor.device.type == "cpu" else f", device={tensor.device.type!r}"
    if tensor.layout == torch.strided and not tensor.is_complex():
        text = _numbers(tensor) if tensor.numel() <= _INLINE else ""
        flat, shape = tensor.flatten(), tuple(tensor.shape)
        if not tensor.numel():
            return f"torch.zeros({shape}{dtype}{device})"
        if tensor.numel() > 1 and bool((flat == flat[0]).all()):
            return f"torch.full({shape}, {_numbers(flat[0])}{dtype}{device})"
        if 0 < len(text) <= _INLINE_CHARACTERS:
            return f"torch.tensor({text}{dtype}{device})"
    saved[name] = tensor.detach().cpu()
    return f'saved["{name}"]' + (f".to({tensor.device.type!r})" if device else "")


def plain_line(text: str) -> str:
    """One line of text that ends no comment."""
    return "".join(c if c.isprintable() else " " for c in text)[:150]


def _where(place: Place) -> str:
    module = f", in `{place.module}`" if place.module else ""
    return plain_line(f"{Path(place.file or '').name}:{place.line}{module}")


def _opening(autocast: torch.dtype | None, with_grad: bool, device: str) -> list[str]:
    lines = [] if autocast is None else [f'with torch.autocast("{device}", {autocast}):']
    return lines + ([] if with_grad else ["    " * len(lines) + "with torch.no_grad():"])


def _bracketed(text: str) -> str:
    return text if re.fullmatch(r"[\w.\[\]\"']+(\([^()]*\))?", text) else f"({text})"


def _numbers(tensor: Tensor) -> str:
    """Its values as Python writes them, as short as they can be without being others."""

    def written(value: Any) -> str:
        if isinstance(value, list):
            return f"[{', '.join(map(written, value))}]"
        if isinstance(value, float) and not math.isfinite(value):
            return f"{'-' * (value < 0)}math.{abs(value)}"
        if isinstance(value, float) and tensor.dtype != torch.float64:
            return str(np.float32(value)) if tensor.dtype != torch.float16 else str(np.float16(value))
        return repr(value)

    return written(tensor.detach().tolist())


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _source(cls: type, depth: int = 3) -> str:
    """The text of a class of the user's, after what it needs."""
    try:
        text = textwrap.dedent(inspect.getsource(cls)).rstrip()
    except (OSError, TypeError) as error:
        raise CannotReproduceError(f"the text of {cls.__qualname__} is not known") from error
    functions = [f.__func__ if isinstance(f, staticmethod) else f for f in vars(cls).values()]
    before: list[str] = []
    for function in functions:
        if not isinstance(function, types.FunctionType):
            continue
        for name in function.__code__.co_names:
            value = function.__globals__.get(name)
            if isinstance(value, types.ModuleType) and name != "torch":
                before.append(f"import {value.__name__} as {name}")
            elif isinstance(value, type) and depth and value.__module__ == cls.__module__:
                before.append(_source(value, depth - 1))
            elif isinstance(value, (int, float, str)):
                before.append(f"{name} = {value!r}")
            elif callable(value):
                raise CannotReproduceError(f"{cls.__qualname__} calls {name} of its file")
    return "\n".join([*dict.fromkeys(before), "", "", text]).strip("\n")
