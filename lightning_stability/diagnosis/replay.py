"""Running a recorded step again, on a copy of its module, as Lightning's loop ran it.

The module that was recorded, its gradients and metrics, and the process's random state are afterwards as they were.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from lightning_stability._compat import is_instance_by_name
from lightning_stability.diagnosis.errors import DiagnosisError, OutOfTimeError, memory_for
from lightning_stability.diagnosis.replayed_module import ReplayedOptimizer, attach, note_logged
from lightning_stability.diagnosis.step import RecordedStep, restore_state
from lightning_stability.diagnosis.validation import metric_states, reset_metrics, spoilt_outputs
from lightning_stability.health.values import nonfinite_names
from lightning_stability.recovery.random_state import RandomState

_NOBODY = object()


@dataclass(eq=False)
class Failure(Exception):
    """What became non-finite first in a replay; ends it."""

    what: str
    """`"loss"`, `"gradient"`, `"buffer"`, `"weight"` or `"validation"`."""
    tensors: list[tuple[str, Tensor]]
    batch: int
    """Which of the window's."""


@dataclass
class Outcome:
    """What a replay came to."""

    losses: list[float] = field(default_factory=list)
    failure: Failure | None = None
    options: list[dict[str, Any]] = field(default_factory=list)
    """Of the optimizer's groups, as they were at the update."""


class Watching(Protocol):
    """What is told of a replay as it goes; active while it lasts."""

    in_optimizer: bool
    """Whether the optimizer's step is under way."""

    def name_batch(self, batch: Any) -> None:
        """The batch that is replayed next."""

    def __enter__(self) -> Any:
        """The replay begins."""

    def __exit__(self, *error: Any) -> None:
        """It is over."""


class Replay:
    """A copy of a recorded module, in the state before the step.

    Raises:
        DiagnosisError: If the module cannot be copied or its precision not be set up.
    """

    def __init__(self, step: RecordedStep) -> None:
        self.step = step
        refuse(step)
        self.module, self.optimizers = _copy(step)
        self._batches = [copy.deepcopy(batch) for batch in step.batches]  # a training_step may change them in place
        self.device = next(self.module.parameters(), torch.empty(0)).device
        self.plugin = make_precision(step.precision, self.device.type)
        self._nonfinite_buffers: set[str] = set()
        self._outcome = Outcome()
        self._trace: Watching | None = None
        self._batch = 0
        self._left_out = step.steps_before
        self._loss: tuple[int, Tensor] | None = None
        self._has_stepped = False

    def run(self, trace: Watching | None = None, compiled: bool = False) -> Outcome:
        """Run the step once; a replay is used once.

        Args:
            trace: Told of each batch.
            compiled: Whether compiled code runs compiled; else it runs eagerly.

        Raises:
            DiagnosisError: If the module's code raises an error.
        """
        self._trace = trace
        self._nonfinite_buffers = set(nonfinite_names(self.module.named_buffers()))
        again = memory_for("run the step again")
        with _same_process_afterwards(compiled), again, trace or contextlib.nullcontext(), torch.enable_grad():
            try:
                self._run_window() if self.step.validation_loader is None else self._run_validation()
            except Failure as failure:
                self._outcome.failure = failure
            except OutOfTimeError:
                raise
            except Exception as error:
                where = "training_step" if self.step.validation_loader is None else "validation_step"
                raise DiagnosisError(
                    f"the step could not be run again: {type(error).__name__} in {where}: {error}"
                ) from error
        return self._outcome

    def change_batches(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put other tensors into the copies of the batches.

        Args:
            change: Returns what takes a tensor's place.
        """
        self._batches = [apply_to_collection(batch, Tensor, change) for batch in self._batches]

    def _run_window(self) -> None:
        step, module = self.step, cast(Any, self.module)
        automatic = getattr(module, "automatic_optimization", True)
        attach(self)
        for number, batch in enumerate(self._batches):
            self._batch = number
            index = step.batch_indices[self._batch]
            module.on_train_batch_start(batch, index)
            step.random_states[self._batch].restore()
            if self._trace is not None:
                self._trace.name_batch(batch)
            with self.plugin.train_step_context():
                output = module.training_step(*((batch, index) if _takes_index(module.training_step) else (batch,)))
            loss = output if isinstance(output, Tensor) or output is None else output.get("loss")
            if automatic and loss is not None:
                self._backward(loss / step.loss_divisor)
            elif not automatic and not self._left_out:  # of optimizers that Lightning does not know, too
                self._check("weight", list(self.module.named_parameters()))
            self._check("buffer", self._new_buffers())
        if automatic:
            self.update(self.optimizers[step.optimizer] if self.optimizers else None)

    def _run_validation(self) -> None:
        """The modules are in the modes that they were recorded in."""
        step, module, [batch] = self.step, cast(Any, self.module), self._batches
        attach(self)
        logged = note_logged(module)
        reset_metrics(module)
        before = set(nonfinite_names(metric_states(module)))
        arguments = [batch, step.batch_indices[0]]
        if _takes(module.validation_step, "dataloader_idx"):
            arguments.append(cast(int, step.validation_loader))
        elif not _takes_index(module.validation_step):
            arguments.pop()
        step.random_states[0].restore()
        if self._trace is not None:
            self._trace.name_batch(batch)
        with self.plugin.val_step_context(), torch.no_grad():
            output = module.validation_step(*arguments)
        states = [(name, state) for name, state in metric_states(module) if name not in before]
        self._check("validation", [*spoilt_outputs(output), *logged, *states])

    def _backward(self, loss: Tensor) -> None:
        module = cast(Any, self.module)
        self._outcome.losses.append(float(loss.detach()))
        self.backward(loss, module.backward)
        module.on_after_backward()

    def backward(self, loss: Tensor, run: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Check a loss, run the backward pass from it, and check the gradients.

        Args:
            loss: Divided, not yet scaled.
        """
        scale = self.step.loss_scale
        if not self._left_out:
            self._check("loss", [("loss", loss.detach())])
        run(loss if scale is None else loss * scale, *args, **kwargs)
        if not self._left_out:
            self._check("gradient", self._gradients())

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """The same in manual optimization, where a batch may have several.

        Args:
            loss: Not scaled.
        """
        if self._has_stepped:
            self._has_stepped = False
            self._outcome.losses.clear()
        batch, before = self._loss or (-1, loss)
        total = loss.detach() if batch != self._batch else before + loss.detach()  # summed as the recording's
        if batch == self._batch:
            self._outcome.losses.pop()
        self._loss = self._batch, total
        self._outcome.losses.append(float(total.sum()))
        self.backward(loss, cast(Any, self.module).backward, *args, **kwargs)

    def update(self, optimizer: Optimizer | None) -> None:
        """What Lightning does between the backward pass and the next batch."""
        step, module = self.step, cast(Any, self.module)
        if optimizer is None:
            return
        self._loss, self._has_stepped = None, True  # (a second optimizer may step on the same losses)
        if self._left_out:
            self._left_out -= 1
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if step.loss_scale is not None:
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad.mul_(1.0 / step.loss_scale)
        module.on_before_optimizer_step(optimizer)
        self._check("gradient", self._gradients())
        if step.clip_value and step.clip_algorithm == "value":
            nn.utils.clip_grad_value_(parameters, step.clip_value)
        elif step.clip_value:
            nn.utils.clip_grad_norm_(parameters, step.clip_value)
        groups = optimizer.param_groups
        self._outcome.options = [{name: group[name] for name in group if name != "params"} for group in groups]
        if self._trace is not None:
            self._trace.in_optimizer = True
        with torch.no_grad():
            optimizer.step()
        if self._trace is not None:
            self._trace.in_optimizer = False
        self._check("weight", list(self.module.named_parameters()))

    def _gradients(self) -> list[tuple[str, Tensor]]:
        return [(name, p.grad) for name, p in self.module.named_parameters() if p.grad is not None]

    def _new_buffers(self) -> list[tuple[str, Tensor]]:
        return [(name, b) for name, b in self.module.named_buffers() if name not in self._nonfinite_buffers]

    def _check(self, what: str, tensors: list[tuple[str, Tensor]]) -> None:
        names = set(nonfinite_names(tensors))
        if names:
            raise Failure(what, [(name, tensor) for name, tensor in tensors if name in names], self._batch)


def refuse(step: RecordedStep) -> None:
    """Refuse what a replay in one process cannot do.

    Raises:
        DiagnosisError: If its parameters are sharded, or it synchronises batch norms over ranks.
    """
    module = step.module
    recorded = {} if step.state is None else step.state["parameters"]
    if any(hasattr(parameter, "to_local") for parameter in (*module.parameters(), *recorded.values())):
        raise DiagnosisError("the parameters are sharded over several ranks; a replay needs all of them on one")
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and any(isinstance(m, nn.SyncBatchNorm) for m in module.modules()):
        raise DiagnosisError("the module has SyncBatchNorm layers, which wait for the other ranks")


def make_precision(precision: str, device: str) -> Precision:
    """Lightning's plugin of a precision; `16-mixed` is fp16 on a CPU too.

    Args:
        precision: Lightning's word.

    Raises:
        DiagnosisError: If it is none of torch's own number formats.
    """
    if precision == "16-mixed" or precision == "bf16-mixed":
        scaler = torch.amp.GradScaler(device) if precision == "16-mixed" else None
        return MixedPrecision(cast(Any, precision), device, scaler)
    if precision == "16-true" or precision == "bf16-true":
        return HalfPrecision(cast(Any, precision))
    if precision == "64-true":
        return DoublePrecision()
    if precision == "32-true":
        return Precision()
    raise DiagnosisError(f"a step in the precision {precision!r} cannot be run again; expected 16, bf16, 32 or 64 bits")


def same_losses(recorded: list[float], replayed: list[float]) -> bool:
    """Whether two lists of losses are the same bits, up to the first that is not finite.

    Args:
        replayed: Those of a replay, which ends at its first failure.
    """
    for a, b in zip(recorded, replayed, strict=False):
        if not math.isfinite(a):
            return math.isnan(a) == math.isnan(b) and (math.isnan(a) or a == b)
        if a != b:
            return False
    return len(replayed) > 0


def _takes(method: Any, name: str) -> bool:
    return name in inspect.signature(method).parameters


def _takes_index(method: Any) -> bool:
    parameters = list(inspect.signature(method).parameters.values())
    several = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
    return len(parameters) >= 2 or several


def _copy(step: RecordedStep) -> tuple[nn.Module, list[Optimizer]]:
    """The module and its optimizers in the recorded state, apart from the run's own."""
    memo = _memo(step.module)
    try:
        with memory_for("make a second copy of the module"):
            module, optimizers = copy.deepcopy((step.module, step.optimizers), memo)
            if step.state is not None:
                restore_state(step.state, module, optimizers)
    except DiagnosisError:
        raise
    except ValueError as error:  # restore_state's
        raise DiagnosisError(str(error)) from error
    except Exception as error:
        raise DiagnosisError(f"the module cannot be copied: {type(error).__name__}: {error}") from error
    for part in module.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is _NOBODY]:
                del hooks[key]
    return module, optimizers


def _memo(module: nn.Module) -> dict[int, Any]:
    """What `copy.deepcopy` shall make of things that are no part of the module's state."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # such as attention weights kept for a plot
                memo[id(value)] = value.detach().clone()
            elif isinstance(value, (Dataset, DataLoader)) or is_instance_by_name(value, "LightningDataModule"):
                memo[id(value)] = value  # shared: it may be large
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
            for hook in hooks.values():
                owner = getattr(hook, "__self__", None)
                if owner is not None and not isinstance(owner, nn.Module):  # a callback's: it shall not see the replay
                    memo[id(owner)] = _NOBODY
    for parameter in module.parameters():
        if parameter.grad is not None:
            memo[id(parameter.grad)] = None
    return memo


@contextlib.contextmanager
def _same_process_afterwards(compiled: bool) -> Iterator[None]:
    """The random state is restored, warnings are not shown again, compiled code runs eagerly if it shall."""
    random_state = RandomState.capture()
    eagerly = None if compiled else getattr(torch.compiler, "set_stance", None)
    try:
        with warnings.catch_warnings(), eagerly("force_eager") if eagerly else contextlib.nullcontext():
            warnings.simplefilter("ignore")
            yield
    finally:
        random_state.restore()


__all__ = ["Failure", "Outcome", "Replay", "ReplayedOptimizer", "make_precision", "refuse", "same_losses"]
