"""The changes that a trial can be made of: each is to one thing, as narrow as its name says."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from lightning_stability.diagnosis.entries import replaced_columns, replaced_samples, with_entries
from lightning_stability.diagnosis.mending import Mend, mended
from lightning_stability.diagnosis.replay import Failure, Outcome, Replay, make_precision
from lightning_stability.diagnosis.step import RecordedStep
from lightning_stability.diagnosis.trials import Around, Change
from lightning_stability.internals import compiles_its_call
from lightning_stability.recovery.random_state import RandomState

FORMATS = {"32-true": "float32", "64-true": "float64", "bf16-mixed": "bfloat16", "16-mixed": "float16"}


def again() -> Change:
    """Nothing."""
    return Change("same again", "nothing changed")


def compiled() -> Change:
    """Compiled code is not run eagerly."""

    @contextlib.contextmanager
    def around(replay: Replay) -> Iterator[None]:
        for path, module in replay.step.module.named_modules():
            if compiles_its_call(module):  # which a copy does not
                copied = replay.module.get_submodule(path)
                copied.forward = partial(_with_weights_of, copied, module)
        yield

    return Change("compiled", "the compiled code compiled, as in the run", around=around, compiled=True)


def _with_weights_of(weights: nn.Module, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    tensors = dict(weights.named_parameters()) | dict(weights.named_buffers())
    return functional_call(module, tensors, args, kwargs)


def in_precision(precision: str) -> Change:
    """Another number format.

    Args:
        precision: Lightning's word.
    """

    def step(step: RecordedStep) -> RecordedStep:
        return replace(step, loss_scale=None)

    @contextlib.contextmanager
    def around(replay: Replay) -> Iterator[None]:
        dtype = torch.float64 if precision == "64-true" else torch.float32
        for tensor in (*replay.module.parameters(), *replay.module.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
        for state in (state for optimizer in replay.optimizers for state in optimizer.state.values()):
            state.update({k: v.to(dtype) for k, v in state.items() if isinstance(v, Tensor) and v.is_floating_point()})
        replay.plugin = make_precision(precision, replay.device.type)
        replay.change_batches(lambda t: t.to(dtype) if t.is_floating_point() else t)
        yield

    name = FORMATS.get(precision, precision)
    return Change("precision", f"in {name}", step, around, facts={"precision": precision})


def with_loss_scale(scale: float) -> Change:
    """Another loss scale."""
    return Change("loss scale", f"a loss scale of {scale:g}", lambda step: replace(step, loss_scale=scale))


def with_module_in_fp32(paths: list[str]) -> Change:
    """Some modules run without autocast, on float32."""

    @contextlib.contextmanager
    def around(replay: Replay) -> Iterator[None]:
        for path in paths:
            module: Any = replay.module.get_submodule(path)
            name = "training_step" if module is replay.module else "forward"
            setattr(module, name, _in_fp32(getattr(module, name), replay.device.type))
        yield

    shown = ", ".join(f"`{path}`" if path else "the training step" for path in paths)
    return Change("modules in float32", f"{shown} in float32", around=around, facts={"modules": paths})


def _in_fp32(run: Callable[..., Any], device: str) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return run(*map(_to_float, args), **{name: _to_float(value) for name, value in kwargs.items()})

    return forward


def _to_float(value: Any) -> Any:
    is_low = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if is_low else value


def with_entry(name: str, entry: str, change: Callable[[Tensor], Tensor], words: str, **facts: Any) -> Change:
    """An entry of every batch is another tensor.

    Args:
        entry: Such as `batch[0]`.
        change: Returns what takes its place.
    """

    def step(step: RecordedStep) -> RecordedStep:
        return with_entries(step, lambda name, tensor: change(tensor) if name == entry else tensor)

    return Change(name, words, step, facts={"tensor": entry, **facts})


def with_other_samples(samples: list[int], size: int, number: int) -> Change:
    """Other samples of the batch take the place of some.

    Args:
        samples: Positions in the batch.
        number: Which of the window's batches.
    """
    shown = ", ".join(map(str, samples[:8])) + (f" and {len(samples) - 8} more" if len(samples) > 8 else "")

    def step(step: RecordedStep) -> RecordedStep:
        return with_entries(step, replaced_samples(samples, size), number)

    words = f"other samples of the batch in the place of {shown}"
    return Change("samples", words, step, facts={"samples": samples, "of": size})


def with_other_columns(entry: str, columns: list[int], samples: list[int], size: int, number: int) -> Change:
    """Columns or channels of another sample take the place of some of theirs.

    Args:
        columns: Positions in its second dimension.
        samples: Positions in the batch.
        number: Which of the window's batches.
    """

    def step(step: RecordedStep) -> RecordedStep:
        return with_entries(step, replaced_columns(entry, columns, samples, size), number)

    words = f"columns {', '.join(map(str, columns[:8]))} of `{entry}` from another sample"
    return Change("columns", words, step, facts={"columns": columns, "tensor": entry, "samples": samples})


def with_finite_tensors(names: list[str]) -> Change:
    """Parameters or buffers are set to finite values."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return Change(
        "weights",
        f"the non-finite values of `{names[0]}`{more} set to 0",
        around=_on_tensors(set(names), lambda t: torch.nan_to_num(t, 0.0, 0.0, 0.0)),
        facts={"tensors": names},
    )


def with_tamed_weights(gains: dict[str, float]) -> Change:
    """Some parameters are scaled down to a gain of 1."""
    names = list(gains)
    shown = ", ".join(f"`{name}`" for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    around = _each_tensor(lambda name, t: t / gains[name] if name in gains and gains[name] < math.inf else t)
    return Change("weights", f"{shown} scaled down to a gain of 1", around=around, facts={"tensors": names})


def with_new_weights() -> Change:
    """Every module that can do so draws its weights anew."""

    @contextlib.contextmanager
    def around(replay: Replay) -> Iterator[None]:
        before = RandomState.capture()
        torch.manual_seed(0)
        for module in replay.module.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        before.restore()
        yield

    return Change("weights", "weights drawn anew", around=around, facts={"new": True})


def with_weights(weights: dict[str, Tensor], words: str, **facts: Any) -> Change:
    """Other weights.

    Args:
        weights: By name, as in `state_dict`.
    """
    around = _each_tensor(lambda name, t: weights[name].to(t) if name in weights else t)
    return Change("weights", words, around=around, facts=facts)


def update_alone(name: str, by_mean: bool = False) -> Change:
    """One more update of finite weights: whether the optimizer's own arithmetic is finite.

    Args:
        by_mean: Whether the gradients are the optimizer's own running mean of them; else they are 0.
    """

    def update(replay: Replay) -> Outcome:
        optimizer = replay.optimizers[replay.step.optimizer]
        with torch.no_grad():
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                parameter.nan_to_num_(0.0, 0.0, 0.0)
                kept = optimizer.state.get(parameter, {})
                mean = next((kept[key] for key in ("grad_avg", "exp_avg") if by_mean and key in kept), None)
                parameter.grad = torch.zeros_like(parameter) if mean is None else mean.clone()
            optimizer.step()
        parameter = replay.module.get_parameter(name)
        is_finite = bool(parameter.isfinite().all())
        return Outcome(failure=None if is_finite else Failure("weight", [(name, parameter)], 0))

    words = f"{'their running mean as gradients' if by_mean else 'gradients of 0'}, one more update of `{name}`"
    return Change("update", words, instead=update, facts={"tensor": name})


def with_option(name: str, value: Any, words: str) -> Change:
    """Another option of the optimizer, in all groups.

    Args:
        value: The new one; a function of the old one.
    """

    @contextlib.contextmanager
    def around(replay: Replay) -> Iterator[None]:
        optimizer: Optimizer = replay.optimizers[replay.step.optimizer]

        def change(*_: Any) -> None:  # at the update: a hook of the module may write options before
            for group in optimizer.param_groups:
                if name in group:
                    group[name] = value(group[name]) if callable(value) else value

        handle = optimizer.register_step_pre_hook(change)
        yield
        handle.remove()

    return Change(
        "optimizer", words, around=around, facts={"option": name, "value": None if callable(value) else value}
    )


def with_scaled_output(path: str, factor: float, overflows: bool = False) -> Change:
    """What a module returns is divided.

    Args:
        overflows: Whether the format cannot hold what it returns: then it returns what goes in.
    """

    @contextlib.contextmanager
    def around(replay: Replay) -> Iterator[None]:
        def divided(module: nn.Module, inputs: Any, output: Any) -> Any:
            return output / factor if isinstance(output, Tensor) else output

        part: Any = replay.module.get_submodule(path)
        if overflows:
            part.forward = lambda x, *args, **kwargs: x
        handle = None if overflows else part.register_forward_hook(divided)
        yield
        if handle is not None:
            handle.remove()

    words = f"`{path}` left out" if overflows else f"the output of `{path}` divided by {factor:,.4g}"
    return Change("input scale", words, around=around, facts={"module": path, "factor": factor})


def with_line(mend: Mend, functions: list[FunctionType]) -> Change:
    """A line of the user's code is mended."""
    return Change(
        "operation",
        f"the line as `{mend.code}`",
        around=lambda replay: mended(mend, functions),
        facts={"code": mend.code, "file": mend.file, "line": mend.line},
    )


def with_eps(path: str, eps: float) -> Change:
    """Another epsilon of a layer that normalises."""

    @contextlib.contextmanager
    def around(replay: Replay) -> Iterator[None]:
        module: Any = replay.module.get_submodule(path)
        module.eps = eps
        yield

    code = f"model.{path}.eps = {eps!r}"
    return Change("operation", f"`{code}`", around=around, facts={"code": code, "file": None, "line": None})


def without_label_smoothing() -> Change:
    """Label smoothing of 0, wherever an attribute or a hyperparameter has it."""

    @contextlib.contextmanager
    def around(replay: Replay) -> Iterator[None]:
        for module in replay.module.modules():
            if isinstance(getattr(module, "label_smoothing", None), float):
                module.label_smoothing = 0.0  # type: ignore[assignment]
            hyperparameters: Any = getattr(module, "hparams", {})
            if "label_smoothing" in hyperparameters:
                hyperparameters["label_smoothing"] = 0.0
        yield

    return Change("label smoothing", "label smoothing of 0", around=around)


def has_label_smoothing(module: nn.Module) -> bool:
    """Whether there is any."""
    return bool(getattr(module, "hparams", {}).get("label_smoothing")) or any(
        bool(getattr(part, "label_smoothing", 0.0)) for part in module.modules()
    )


def _on_tensors(names: set[str], change: Callable[[Tensor], Tensor]) -> Around:
    return _each_tensor(lambda name, t: change(t) if name in names else t)


def _each_tensor(change: Callable[[str, Tensor], Tensor]) -> Around:
    @contextlib.contextmanager
    def around(replay: Replay) -> Iterator[None]:
        with torch.no_grad():
            for name, tensor in (*replay.module.named_parameters(), *replay.module.named_buffers()):
                if tensor.is_floating_point():
                    tensor.copy_(change(name, tensor.detach()))
        yield

    return around
