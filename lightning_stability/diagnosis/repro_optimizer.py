"""The script of an update that is not finite, though the gradients were: one parameter, and its optimizer."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_stability.diagnosis.origin import Origin
from lightning_stability.diagnosis.replay import Replay
from lightning_stability.diagnosis.repro_plan import CannotReproduceError
from lightning_stability.diagnosis.repro_text import Mend, Script, check, literal
from lightning_stability.diagnosis.step import RecordedStep

_VALID = {"eps": 1e-8, "lr": 1e-3, "weight_decay": 0.0, "momentum": 0.0}


@dataclass
class _Before:
    """A parameter just before the update."""

    name: str
    weight: Tensor | None = None
    gradient: Tensor | None = None
    state: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


class _Watcher:
    """Told by a replay when the optimizer's step begins.

    Args:
        name: The parameter that the update made bad.
    """

    def __init__(self, replay: Replay, name: str, optimizer: int) -> None:
        self.before = _Before(name)
        self._replay = replay
        self._optimizer = optimizer

    @property
    def in_optimizer(self) -> bool:
        """Whether the optimizer's step is under way."""
        return False

    @in_optimizer.setter
    def in_optimizer(self, value: bool) -> None:
        if not value:
            return
        parameter = dict(self._replay.module.named_parameters())[self.before.name]
        for optimizer in self._replay.optimizers:
            for group in optimizer.param_groups:
                if parameter.grad is None or not any(parameter is p for p in group["params"]):
                    continue
                self.before.weight = parameter.detach().clone()
                self.before.gradient = parameter.grad.detach().clone()
                state = optimizer.state.get(parameter, {})
                self.before.state = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
                self.before.options = {k: v for k, v in group.items() if k != "params"}

    def name_batch(self, batch: Any) -> None:
        """Nothing depends on it."""

    def __enter__(self) -> _Watcher:
        """Nothing."""
        return self

    def __exit__(self, *error: Any) -> None:
        """Nothing."""


def optimizer_scripts(step: RecordedStep, origin: Origin) -> tuple[Any, ...]:
    """The script of the update, and pairs of a change and the script with it.

    Raises:
        CannotReproduceError: If the optimizer is not one of torch's.
    """
    replay = Replay(step)
    watcher = _Watcher(replay, origin.tensor or "", step.optimizer)
    replay.run(watcher)
    before, optimizer = watcher.before, replay.optimizers[step.optimizer]
    cls = _of_torch(optimizer)
    if before.weight is None:
        raise CannotReproduceError(f"the update of {origin.tensor} did not come again")
    before = _smallest(before, cls)
    wrong = [name for name, value in before.options.items() if name in _VALID and _is_invalid(name, value)]
    found = [(Mend(f"`{name}={_VALID[name]}`"), _script(before, cls, {name: _VALID[name]})) for name in wrong]
    return _script(before, cls, {}), *found


def _of_torch(optimizer: Optimizer) -> Any:
    cls = type(optimizer)
    if getattr(torch.optim, cls.__name__, None) is not cls:
        raise CannotReproduceError(f"the optimizer {cls.__qualname__} is not one of torch's")
    return cls


def _is_invalid(name: str, value: Any) -> bool:
    number = float(value)
    return not math.isfinite(number) or (name == "eps" and number == 0)


def _smallest(before: _Before, cls: type) -> _Before:
    """One value of the parameter, if its update alone is not finite."""
    assert before.weight is not None
    assert before.gradient is not None
    updated = _update(before, cls)
    bad = (~torch.isfinite(updated)).flatten().nonzero().flatten().tolist()
    if not bad:
        return before

    def one(tensor: Any) -> Any:
        same = isinstance(tensor, Tensor) and tensor.shape == before.weight.shape  # type: ignore[union-attr]
        return tensor.flatten()[bad[0] : bad[0] + 1].clone() if same else tensor

    state = {name: one(value) for name, value in before.state.items()}
    small = _Before(before.name, one(before.weight), one(before.gradient), state, before.options)
    return small if not bool(torch.isfinite(_update(small, cls)).all()) else before


def _update(before: _Before, cls: Any) -> Tensor:
    assert before.weight is not None
    weight = nn.Parameter(before.weight.clone())
    weight.grad = None if before.gradient is None else before.gradient.clone()
    given = _options(before.options, cls)
    made = cls([weight], **{name: value for name, value in given.items() if name not in _refused(given)})
    made.param_groups[0].update(_refused(given))
    if before.state:
        made.state[weight] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in before.state.items()}
    made.step()
    return weight.detach()


def _options(options: dict[str, Any], cls: Any) -> dict[str, Any]:
    """Those that differ from the defaults."""
    known = inspect.signature(cls.__init__).parameters
    plain = {k: v.item() if hasattr(v, "item") else v for k, v in options.items() if k in known}  # numpy's, too
    return {k: v for k, v in plain.items() if v != known[k].default and v is not None}


def _refused(options: dict[str, Any]) -> dict[str, Any]:
    """Those that an optimizer may refuse when it is made; a schedule or a hook gives them later."""
    return {k: v for k, v in options.items() if isinstance(v, float) and not math.isfinite(v)}


def _script(before: _Before, cls: Any, changed: dict[str, Any]) -> Script:
    assert before.weight is not None
    assert before.gradient is not None
    saved: dict[str, Tensor] = {}
    given = _options(before.options | changed, cls)
    refused = _refused(given)
    options = "".join(f", {name}={_number(value)}" for name, value in given.items() if name not in refused)
    body = [
        f"weight = torch.nn.Parameter({literal('weight', before.weight, saved)})  # of `{before.name}`",
        f"weight.grad = {literal('gradient', before.gradient, saved)}",
        f"optimizer = torch.optim.{cls.__name__}([weight]{options})",
    ]
    body += [f"optimizer.param_groups[0][{name!r}] = {_number(value)}" for name, value in refused.items()]
    if before.state:
        items = {k: literal(k, v, saved) if isinstance(v, Tensor) else repr(v) for k, v in before.state.items()}
        body.append(f"optimizer.state[weight] = {{{', '.join(f'{k!r}: {v}' for k, v in items.items())}}}")
    body.append("optimizer.step()")
    return Script(
        ["import math"] if any("math." in line for line in body) else [], body, check("weight", "weight"), saved, {}
    )


def _number(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f"{'-' * (value < 0)}math.{abs(value)}"
    if isinstance(value, (int, float, str, bool)) or (
        isinstance(value, (list, tuple)) and all(isinstance(v, (int, float)) for v in value)
    ):
        return repr(value)
    raise CannotReproduceError(f"an option of the optimizer is a {type(value).__qualname__}")
