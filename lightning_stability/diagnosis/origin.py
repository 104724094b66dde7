"""The first operation whose result is non-finite though what went into it is not, on the path to the failure.

The walk goes backwards from the loss (gradient, buffer, weight): first from NaN to NaN, to where the first NaN was
made; then, if infinities went into that, from infinity to infinity to where the first of them was made. An infinity
that was written on purpose, such as a mask's, ends the second walk: the operation that made NaN of it is the origin.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from lightning_stability.diagnosis.ranges import Range
from lightning_stability.diagnosis.trace import Input, Operation, Trace

Phase = Literal["input", "weights", "forward", "backward", "optimizer"]

_WRITES_NUMBERS = {
    *("masked_fill", "masked_fill_", "fill_", "fill", "full", "full_like", "new_full", "scalar_tensor", "index_fill"),
    *("index_fill_", "constant_pad_nd", "masked_scatter", "scatter", "scatter_", "index_put", "index_put_", "copy_"),
    *("where", "lift_fresh", "slice_scatter", "select_scatter"),
}
"""Operations that place given numbers: an infinity that they make was asked for."""

_OF_LOGARITHMS = {
    *("add", "add_", "baddbmm", "logaddexp", "softmax", "_softmax", "log_softmax", "_log_softmax", "logsumexp", "exp"),
    *("max", "amax", "maximum", "clamp", "where", "masked_fill", "masked_fill_", "copy_", "clone", "_to_copy", "cat"),
    *("stack", "index", "index_select", "gather", "embedding"),
}
"""Operations that a mask of the batch may go into: to them, -inf is the logarithm of 0."""

_PUBLIC_NAMES = {
    "addmm": "linear",
    "convolution": "conv",
    "mkldnn_convolution": "conv",
    "cudnn_convolution": "conv",
    "nll_loss_forward": "nll_loss",
    "nll_loss2d_forward": "nll_loss",
    "mm": "matmul",
    "bmm": "matmul",
    "baddbmm": "matmul",
    "native_batch_norm": "batch_norm",
    "cudnn_batch_norm": "batch_norm",
    "native_layer_norm": "layer_norm",
    "native_group_norm": "group_norm",
    "linalg_vector_norm": "norm",
    "_to_copy": "to",
}


@dataclass
class Origin:
    """Where the first non-finite value was made.

    Attributes:
        phase: `"input"` and `"weights"`: it was there before the step; `"forward"`, `"backward"`, `"optimizer"`.
        module: The path of the module in whose code it happened, as in `named_modules()`; `""` is the LightningModule.
        op: The operation in torch's public words, such as `"log"`; in the backward pass, the one that was
            differentiated.
        file: The user's file; None if there is no code of the user's.
        line: The line in it; in the backward pass, that of the forward operation.
        code: The text of that line.
        tensor: The name of an entry of the batch (`batch[0]`), a parameter or a buffer.
        samples: The positions in the batch whose rows are non-finite, where that can be told.
        inputs: The range of each tensor that went in.
        output: The range of the result.
        aten: The dispatched operation, such as `"aten.div.Tensor"`.
        dtype: Of the result, such as `"float16"`.
        failed: What became non-finite in the end: `"loss"`, `"gradient"`, `"buffer"`, `"weight"`.
        discarded: Whether the value was made in the forward pass, which discarded it, as `where` does; the backward
            pass met it again.
        names: The name of each input that is a parameter, a buffer or an entry of the batch.
        written: Whether it is a parameter that the step itself wrote it into, outside of the optimizer, as a hook does.
        makers: The name of the operation that made each input; `"count"` for whole numbers.
        constants: The numbers from Python that it was given and that are not finite, such as `"nan"`.

    Example:
        >>> import torch
        >>> from pytorch_lightning import LightningModule
        >>> from lightning_stability.diagnosis import RecordedStep, find_origin
        >>> from lightning_stability.recovery.random_state import RandomState
        >>> class Model(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(1, 1)
        ...     def training_step(self, batch, batch_idx):
        ...         return self.layer(batch).sum() / batch.min()
        >>> batch = torch.tensor([[1.0], [0.0]])
        >>> origin = find_origin(RecordedStep(Model(), [batch], [RandomState.capture()]))
        >>> origin.phase, origin.op, origin.module, origin.failed
        ('forward', 'div', '', 'loss')
    """

    phase: Phase
    module: str | None
    op: str | None
    file: str | None
    line: int | None
    code: str
    tensor: str | None
    samples: list[int]
    inputs: list[Range]
    output: Range
    aten: str | None
    dtype: str | None
    failed: str = "loss"
    discarded: bool = False
    names: list[str | None] = field(default_factory=list)
    written: bool = False
    makers: list[str | None] = field(default_factory=list)
    constants: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Birth:
    """An operation that made something non-finite, or a leaf that held it and the operation that read it."""

    operation: Operation | None
    leaf: Input | None = None
    name: str | None = None

    @property
    def order(self) -> tuple[int, bool]:
        index = -1 if self.operation is None else self.operation.index
        return index, self.leaf is None


def find(trace: Trace, targets: Iterable[tuple[str, Tensor]], failed: str) -> Origin | None:
    """Find the origin of what has become non-finite.

    Args:
        trace: Of the step.
        targets: Names and tensors that are non-finite now.
        failed: What they are, for the record.

    Returns:
        The origin; None if no recorded operation wrote the targets.
    """
    starts: dict[int, str] = {}
    for name, tensor in targets:
        index = trace.writer_of(tensor)
        if index is not None:
            starts.setdefault(index, name)
    births = _births(trace, starts, lambda r: r.nan > 0)
    if not births:  # infinite, but nowhere NaN
        births = _births(trace, starts, lambda r: r.infinite > 0) or _misuses(trace, starts)
    birth = min(births, key=lambda b: b.order, default=None)
    if birth is not None and birth.leaf is None:
        birth = _infinity_behind(trace, birth)
    if birth is None or birth.operation is None:
        return None
    spoilt = _spoilt_by(trace, birth)
    if spoilt is not None:
        return replace(_describe(trace, birth, failed, None), phase="weights", tensor=spoilt, samples=[], written=True)
    first = min(starts)
    target = starts[first] if failed in ("weight", "gradient") else None
    return _describe(trace, birth, failed, _name_of_target(trace, starts, birth) or target)


def _infinity_behind(trace: Trace, birth: _Birth) -> _Birth:
    """The operation that made the infinities which became NaN here; the birth itself where they were asked for."""
    operation = birth.operation
    assert operation is not None
    infinite = [entry for entry in operation.inputs if entry.range.infinite and entry.reaches]
    sources = {entry.source: "" for entry in infinite if entry.source is not None}
    behind = _births(trace, sources, lambda r: r.infinite > 0)
    behind += [_Birth(operation, entry) for entry in infinite if entry.source is None and _is_damage(entry, operation)]
    if not behind:
        return birth
    return min(behind, key=lambda b: b.order)


def _misuses(trace: Trace, starts: Iterable[int]) -> list[_Birth]:
    """Where an infinity that was written on purpose became one of another kind: the loss of a masked target is +inf."""
    births = _births(trace, starts, lambda r: r.infinite > 0, on_purpose=True)
    turned = _births(trace, starts, lambda r: r.posinf > 0, on_purpose=True)
    return [birth for birth in turned if birth.leaf is None] or births


def _births(
    trace: Trace, starts: Iterable[int], is_such: Callable[[Range], bool], on_purpose: bool = False
) -> list[_Birth]:
    """All places where values of a kind came into being that reached one of the operations.

    Args:
        trace: Of the step.
        starts: Operations to walk back from.
        is_such: Whether a range has such values.
        on_purpose: Whether infinities that were asked for count.
    """
    found: list[_Birth] = []
    to_do, seen = [index for index in starts if is_such(trace.operations[index].output)], set[int]()
    while to_do:
        index = to_do.pop()
        if index in seen:
            continue
        seen.add(index)
        operation = trace.operations[index]
        before = [entry for entry in operation.inputs if is_such(entry.range) and entry.reaches]
        read = [trace.reader_of_number(n) for n in operation.scalars]
        from_python = [i for i in read if i is not None and i < index and is_such(trace.operations[i].output)]
        to_do += [entry.source for entry in before if entry.source is not None and entry.source < index]
        to_do += from_python
        found += [
            _Birth(operation, entry)
            for entry in before
            if entry.source is None and (on_purpose or _is_damage(entry, operation))
        ]
        if not before and not from_python and (on_purpose or not _is_asked_for(operation)):
            found.append(_Birth(operation))
    return found


def _is_damage(leaf: Input, reader: Operation) -> bool:
    """Whether a leaf's values are none that anybody puts there: -inf is what masks are made of."""
    if leaf.range.nan or leaf.range.posinf:
        return True
    return (leaf.name or "").startswith("batch") and short_name(reader.name) not in _OF_LOGARITHMS


def _is_asked_for(operation: Operation) -> bool:
    """Whether an operation wrote infinities that it was given as a number."""
    return (
        not operation.output.nan
        and short_name(operation.name) in _WRITES_NUMBERS
        and any(math.isinf(number) for number in operation.scalars)
    )


def _spoilt_by(trace: Trace, birth: _Birth) -> str | None:
    """The parameter that got the values of a birth, if that was before the optimizer's update: a hook wrote it."""
    assert birth.operation is not None
    if birth.operation.in_optimizer or (birth.leaf is not None and birth.leaf.name is not None):
        return None
    for name, index in trace.spoilt_parameters():
        to_do, seen = [index], set[int]()
        while to_do:
            index = to_do.pop()
            if index not in seen:
                seen.add(index)
                entries = trace.operations[index].inputs
                to_do += [e.source for e in entries if e.source is not None and e.source < index]
        if birth.operation.index in seen:
            return name
    return None


def _name_of_target(trace: Trace, starts: dict[int, str], birth: _Birth) -> str | None:
    """The name of the gradient or weight that the operation itself wrote."""
    return starts.get(birth.operation.index) if birth.operation is not None else None


def _describe(trace: Trace, birth: _Birth, failed: str, target: str | None) -> Origin:
    operation, leaf = birth.operation, birth.leaf
    assert operation is not None
    place = operation.place
    discarded = failed == "gradient" and place.node is None  # the loss was finite
    phase: Phase = "backward" if place.node is not None or discarded else "forward"
    module, tensor = place.module, None
    samples: list[int] = []
    if leaf is not None and leaf.name is not None:
        tensor = leaf.name
        phase = "input" if tensor.startswith("batch") else "weights"
        if phase == "input":
            samples = _samples(leaf.rows, leaf.length, trace.batch_size)
        else:
            module = tensor.rpartition(".")[0]
    elif operation.in_optimizer:
        phase, tensor = "optimizer", target
        module = (target or "").rpartition(".")[0]
    else:
        tensor = next((entry.name for entry in operation.inputs if (entry.name or "").startswith("batch")), None)
        samples = _samples(operation.rows, operation.length, trace.batch_size)
    op = short_name(operation.name)
    if place.node is not None:
        op = _of_node(place.node)
    return Origin(
        phase=phase,
        module=module,
        op=_PUBLIC_NAMES.get(op, op.removesuffix("_forward").strip("_")),
        file=place.file,
        line=place.line,
        code=place.code,
        tensor=tensor,
        samples=samples,
        inputs=[entry.range for entry in operation.inputs],
        output=operation.output,
        aten=operation.name,
        dtype=str(operation.dtype).removeprefix("torch."),
        failed=failed,
        discarded=discarded and phase == "backward",
        names=[entry.name for entry in operation.inputs],
        makers=[trace.maker_of(entry) for entry in operation.inputs],
        constants=[str(number) for number in operation.scalars],
    )


def short_name(name: str) -> str:
    """The operation's name alone: `log` of `aten.log`."""
    return name.split(".")[1] if "." in name else name


def _of_node(node: str) -> str:
    """The operation that an autograd node differentiates: `sqrt` of `SqrtBackward0`."""
    stem = re.sub(r"Backward\d*$", "", node.rpartition("::")[2])
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", stem).lower()


def _samples(rows: tuple[int, ...], length: int, batch_size: int) -> list[int]:
    """Which samples rows belong to, where the first dimension is the batch, alone or with others flattened into it."""
    if not rows or not batch_size or length % batch_size:
        return []
    each = length // batch_size
    return sorted({row // each for row in rows})


def as_json(values: Range) -> dict[str, Any]:
    """A range as the report has it; `min` and `max` are of the finite values, None where there are none."""
    return {
        "min": values.min if math.isfinite(values.min) else None,
        "max": values.max if math.isfinite(values.max) else None,
        "nonfinite": values.nonfinite,
    }
