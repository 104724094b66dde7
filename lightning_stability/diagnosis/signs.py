"""What the replayed step's numbers say before anything is tried: which counterfactuals are worth it follows from it."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_stability.diagnosis.entries import batch_size, scales
from lightning_stability.diagnosis.operations import is_outside, is_over_nothing, size_of
from lightning_stability.diagnosis.origin import Origin, short_name
from lightning_stability.diagnosis.replay import Outcome
from lightning_stability.diagnosis.step import RecordedStep
from lightning_stability.diagnosis.trace import Operation, Trace
from lightning_stability.internals import compiles_its_call, within_compiled

_SCALES = {"mul", "div", "true_divide", "mul_", "div_"}
_BEFORE, _WITHIN = 30.0, 1e3
"""Factors that are worth a look: before the first layer with parameters, and behind it."""
_LARGE = 1e3
"""Where numbers are far from the scale that layers are made for."""


@dataclass
class Amplifier:
    """An operation without parameters that makes numbers much larger.

    Attributes:
        module: In whose code it is.
        file: The user's file.
        line: The line in it.
        op: The operation.
        factor: Largest result over largest input.
        code: The text of the line.
        overflows: Whether its own result leaves the number format.
    """

    module: str | None
    file: str | None
    line: int | None
    op: str
    factor: float
    code: str
    overflows: bool = False


@dataclass
class Signs:
    """All that the rules know besides the trials.

    Attributes:
        failed: What became non-finite in the replay; in the recording, if the replay is finite.
        reproduced: Whether it did.
        batch: Which of the window's batches failed.
        batch_size: Of that batch.
        precision: Lightning's word.
        loss_scale: The GradScaler's.
        first_step: Whether no update came before; None if that is not known.
        outside: Whether the origin's operation got what is outside of its domain.
        over_nothing: Whether it is a mean over no values.
        amplifiers: Operations without parameters that made numbers much larger, in order.
        sample_scales: For each entry of the bad batch, how large each sample is.
        gains: For each parameter, by how much it makes what it is applied to larger.
        outputs: For each parameter, how large what it makes of inputs of size 1 usually is.
        sizes: For each parameter, its L2 norm.
        growth: By which factor the loss or the gradient norm grew over the steps before; 1 if it did not.
        growing: Which of them, or which group of parameters.
        moved: For each parameter, how far updates can have moved it since training began, over how large it is now;
            None where that is not known.
        compiled: Paths of compiled modules.
        wrapped: Those of them that `torch.compile(module)` made.
        hyperparameters: The module's.
        dataset_indices: Of the bad batch's samples, where known.
        descriptions: Of the same samples, such as a file's name, where known.
        device: Such as `"cuda"`.
        rank: Of the process that recorded it.
        has_history: Whether anything is known of the steps before.
        options: Of the optimizer's groups, as they were at the update.
    """

    failed: str
    reproduced: bool = True
    batch: int = 0
    batch_size: int = 0
    precision: str = "32-true"
    loss_scale: float | None = None
    first_step: bool | None = None
    outside: bool = False
    over_nothing: bool = False
    amplifiers: list[Amplifier] = field(default_factory=list)
    sample_scales: dict[str, list[float]] = field(default_factory=dict)
    gains: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, float] = field(default_factory=dict)
    growth: float = 1.0
    growing: str | None = None
    moved: dict[str, float] = field(default_factory=dict)
    compiled: list[str] = field(default_factory=list)
    wrapped: list[str] = field(default_factory=list)
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    dataset_indices: list[int] | None = None
    descriptions: list[str] | None = None
    device: str = "cpu"
    rank: int = 0
    has_history: bool = False
    options: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_half(self) -> bool:
        """Whether the step runs in fp16."""
        return self.precision.startswith("16")


def read_signs(
    step: RecordedStep,
    origin: Origin | None,
    outcome: Outcome,
    trace: Trace,
    history: list[dict[str, Any]],
    dataset_indices: list[list[int] | None] | None = None,
    descriptions: list[list[str]] | None = None,
) -> Signs:
    """What the replay's numbers say.

    Args:
        step: The recorded step.
        origin: Where its first non-finite value was made.
        outcome: Of the replay.
        trace: Its operations.
        history: Rows of the steps before, as history.jsonl has them.
        dataset_indices: Of the samples of each batch of the window.
        descriptions: Of the same samples.
    """
    failure = outcome.failure
    number = failure.batch if failure else 0
    batch = step.batches[min(number, len(step.batches) - 1)] if step.batches else None
    parameters = _parameters(step)
    growth, growing = growth_of(history)
    known = dataset_indices[number] if dataset_indices and number < len(dataset_indices) else None
    global_step = step.trainer.get("global_step")
    return Signs(
        failed=failure.what if failure else step.failed,
        reproduced=failure is not None,
        batch=number,
        batch_size=batch_size(batch),
        precision=step.precision,
        loss_scale=step.loss_scale,
        first_step=None if global_step is None else global_step == 0,
        outside=origin is not None and origin.phase in ("forward", "backward") and is_outside(origin),
        over_nothing=origin is not None and is_over_nothing(origin),
        amplifiers=amplifiers(trace, set(parameters)),
        sample_scales=scales(batch),
        sizes={name: float(tensor.detach().double().norm()) for name, tensor in parameters.items()},
        gains={name: gain(tensor, name in _embeddings(step.module)) for name, tensor in parameters.items()},
        outputs={name: output_size(tensor, name in _embeddings(step.module)) for name, tensor in parameters.items()},
        growth=growth,
        growing=growing,
        moved=_moved(step, history, parameters),
        compiled=[
            path for path, m in step.module.named_modules() if within_compiled(m) is not None or compiles_its_call(m)
        ],
        wrapped=[path for path, m in step.module.named_modules() if within_compiled(m) is not None],
        hyperparameters=dict(getattr(step.module, "hparams", {})),
        dataset_indices=known,
        descriptions=descriptions[number] if descriptions and number < len(descriptions) else None,
        device=str(step.environment.get("device", next((p.device.type for p in step.module.parameters()), "cpu"))),
        has_history=bool(history),
        options=outcome.options,
        rank=int(step.trainer.get("global_rank", 0)),
    )


def amplifiers(trace: Trace, parameters: set[str]) -> list[Amplifier]:
    """Operations of the forward pass, without a parameter, from whose result on the numbers are far from unit scale.

    Args:
        trace: Of the step.
        parameters: Names.
    """
    found, has_begun = [], False
    for operation in trace.operations:
        factor = _factor(operation, parameters)
        has_begun |= any(entry.name in parameters for entry in operation.inputs)
        least = _WITHIN if has_begun else _BEFORE
        is_large = size_of(operation.output) >= _LARGE or operation.output.infinite > 0
        if factor is not None and factor >= least and is_large:
            place = operation.place
            op = short_name(operation.name).strip("_")
            overflows = operation.output.infinite > 0
            found.append(Amplifier(place.module, place.file, place.line, op, factor, place.code, overflows))
    return found


def _factor(operation: Operation, parameters: set[str]) -> float | None:
    forward = operation.place.node is None and not operation.in_optimizer
    if not forward or short_name(operation.name) not in _SCALES:
        return None
    if any(entry.range.nonfinite for entry in operation.inputs):
        return None
    if any(entry.name in parameters for entry in operation.inputs):
        return None
    before = next((e for e in operation.inputs if e.name is None or e.name.startswith("batch")), None)
    others = [e.range for e in operation.inputs if e is not before]
    constants = [*operation.numbers, *(r.min for r in others if r.min == r.max)]
    if len(constants) == 1 and constants[0]:
        return abs(constants[0]) if "mul" in operation.name else 1 / abs(constants[0])
    largest = 0.0 if before is None else size_of(before.range)
    return size_of(operation.output) / largest if 0 < largest < math.inf else None


@torch.no_grad()
def gain(parameter: Tensor, is_embedding: bool = False) -> float:
    """By how much a parameter makes what it is applied to larger: the norm of a matrix, the size of a vector.

    Args:
        parameter: Any.
        is_embedding: Whether rows of it are looked up.

    Example:
        >>> round(gain(3 * torch.eye(4)), 3)
        3.0
    """
    if not parameter.is_floating_point() or not parameter.numel() or hasattr(parameter, "to_local"):
        return 1.0
    values = parameter.detach().double()
    if not bool(values.isfinite().all()):
        return math.inf
    largest = float(values.abs().max())
    if values.dim() < 2 or is_embedding or not largest:
        return float(values.pow(2).mean().sqrt())
    matrix = values.reshape(len(values), -1) / largest
    vector = matrix.abs().sum(dim=0)
    for _ in range(8):
        vector = matrix.T @ (matrix @ (vector / vector.norm()))
    return largest * float(vector.norm().sqrt())


@torch.no_grad()
def output_size(parameter: Tensor, is_embedding: bool = False) -> float:
    """How large one output of a matrix usually is, of independent inputs of size 1; of a vector, its values.

    Args:
        parameter: Any.
        is_embedding: Whether rows of it are looked up.

    Example:
        >>> output_size(torch.full((1000, 4), 3.0))
        6.0
    """
    if not parameter.is_floating_point() or not parameter.numel() or hasattr(parameter, "to_local"):
        return 1.0
    values = parameter.detach().double()
    if values.dim() < 2 or is_embedding:
        return float(values.pow(2).mean().sqrt())
    return float(values.norm()) / math.sqrt(len(values))


def growth_of(history: list[dict[str, Any]]) -> tuple[float, str | None]:
    """By which factor the loss or a gradient norm has grown over the last steps, and which.

    Args:
        history: Rows of history.jsonl, oldest first.

    Example:
        >>> growth_of([{"loss": 1.0}, {"loss": 1.0}, {"loss": 1e3}, {"loss": 1e6}])
        (1000000.0, 'loss')
    """
    series: dict[str, list[float]] = {}
    for row in history:
        norms = {f"gradient of {name}": value for name, value in (row.get("grad_norms") or {}).items()}
        for name, value in {"loss": row.get("loss"), "gradient norm": row.get("grad_norm"), **norms}.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                series.setdefault(name, []).append(abs(value))
    found = {name: _growth(values) for name, values in series.items() if len(values) >= 3}
    if not found:
        return 1.0, None
    top = max(found, key=lambda name: found[name])
    return found[top], top


def _growth(values: list[float]) -> float:
    usual = statistics.median(sorted(values)[: max(1, len(values) // 2)])
    return max(1.0, max(values[-3:]) / usual) if usual > 0 else 1.0


def _moved(step: RecordedStep, history: list[dict[str, Any]], parameters: dict[str, Tensor]) -> dict[str, float]:
    """How far updates can have moved each parameter, over how large it is; where the optimizer bounds that.

    An update of Adam's kind moves no element by much more than the learning rate. One of SGD moves a parameter by the
    learning rate times the norm of its gradient, which history has.
    """
    steps = int(step.trainer.get("global_step") or 0)
    if not steps or not step.optimizers:
        return {}
    groups = step.optimizers[step.optimizer].param_groups
    group_of = {id(p): number for number, group in enumerate(groups) for p in group["params"]}
    own = {name: group_of.get(id(p), 0) for name, p in step.module.named_parameters()}
    moved = {}
    for name, tensor in parameters.items():
        number = own.get(name, 0)
        options = groups[number]
        rate = float(options.get("lr", 0.0))
        size = float(tensor.detach().float().norm())
        if "betas" in options or "alpha" in options:
            reach = rate * steps * math.sqrt(tensor.numel())
        else:
            reach = sum(_rate_of(row, number, rate) * _gradient_of(row, name) for row in history)
            reach *= 1 / (1 - float(options.get("momentum", 0.0) or 0.0))
        if math.isfinite(size) and size > 0:
            moved[name] = reach / size
    return moved


def _rate_of(row: dict[str, Any], group: int, otherwise: float) -> float:
    rates = row.get("learning_rates") or [otherwise]
    return _number(rates[min(group, len(rates) - 1)])


def _gradient_of(row: dict[str, Any], name: str) -> float:
    """The gradient norm of a parameter, where it was measured; at most that of its group, or of all."""
    norms = row.get("grad_norms") or {}
    groups = [norm for group, norm in norms.items() if name == group or name.startswith(f"{group}.")]
    return _number(min(groups, default=row.get("grad_norm"), key=_number))


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0


def _parameters(step: RecordedStep) -> dict[str, Tensor]:
    """As they were before the step."""
    return step.state["parameters"] if step.state is not None else dict(step.module.named_parameters())


def _embeddings(module: nn.Module) -> set[str]:
    return {f"{path}.weight" for path, m in module.named_modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
