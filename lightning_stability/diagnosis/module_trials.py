"""Passes that change the module: its weights, its number format, its optimizer's options."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_stability.diagnosis import changes
from lightning_stability.diagnosis.bench import MOST_ITEMS, Bench
from lightning_stability.diagnosis.trials import Change, Trial
from lightning_stability.health.values import nonfinite_names
from lightning_stability.internals import has_own_parameters

_USUAL: dict[str, Any] = {"lr": 1e-3, "eps": 1e-8}
_IMPLEMENTATIONS = {"foreach", "fused", "capturable", "differentiable", "params"}
"""Options that change how an update is computed, and not what it is."""


def finite_weights(bench: Bench) -> None:
    """The non-finite values of the parameter or buffer set to 0; where that is not enough, those of all."""
    first = bench.origin.tensor if bench.origin is not None else None
    if not first or bench.lab.try_(changes.with_finite_tensors([first])).finite:
        return
    module, state = bench.step.module, bench.step.state
    every = state["parameters"] | state["buffers"] if state is not None else dict(module.named_parameters())
    others = [name for name in nonfinite_names(every.items()) if name != first]
    if others:
        bench.lab.try_(changes.with_finite_tensors([first, *others]))


def larger_eps(bench: Bench) -> None:
    """The layer of the origin with an epsilon that is no rounding error of its format."""
    path = bench.origin.module if bench.origin is not None else None
    eps = getattr(bench.step.module.get_submodule(path), "eps", None) if path else None
    if path and isinstance(eps, float) and eps < 1e-7:
        bench.lab.try_(changes.with_eps(path, 1e-5))


def tamed_weights(bench: Bench) -> None:
    """The smallest set of parameters that have to be smaller."""
    large = {name: gain for name, gain in bench.signs.gains.items() if 1.5 < gain < math.inf}
    if not large:
        return
    first = bench.lab.try_(changes.with_tamed_weights(large), keep=False)
    if not first.finite:
        bench.lab.keep(first)
        return
    names = sorted(large, key=lambda name: -large[name])[:MOST_ITEMS]
    bench.keep_smallest(names, lambda part: changes.with_tamed_weights({name: large[name] for name in part}), first)


def earlier_weights(bench: Bench) -> None:
    """Weights of before: the newest checkpoint that cures, by bisection; else weights that are drawn anew."""
    if not bench.earlier:
        if not bench.signs.first_step:
            bench.lab.try_(changes.with_new_weights())
        return

    def of(index: int) -> Trial:
        at, load = bench.earlier[index]
        words = f"the weights of step {at:,}, from a checkpoint"
        return bench.lab.try_(changes.with_weights(load(), words, step=at))

    # the newest that cures: all that are older do so too, if they have grown ever since
    low, high = 0, len(bench.earlier) - 1
    if not of(high).finite:
        return
    while low < high:
        middle = (low + high) // 2
        if of(middle).finite:
            high = middle
        else:
            low = middle + 1


def update_again(bench: Bench) -> None:
    """Weights that were bad before the step, after finite gradients: whether another update makes them so again."""
    name, step = bench.origin.tensor if bench.origin is not None else None, bench.step
    if not name or bench.signs.first_step or not step.optimizers:
        return
    parameter = dict(step.module.named_parameters()).get(name)
    owned = {id(p) for group in step.optimizers[step.optimizer].param_groups for p in group["params"]}
    if parameter is None or id(parameter) not in owned:
        return
    again = changes.update_alone(name)
    if bench.lab.try_(again).finite:
        again = changes.update_alone(name, by_mean=True)
        bench.lab.try_(again)
    if bench.lab.trials[-1].finite is not False:
        return
    for change in _valid(bench):
        if bench.lab.try_(replace(change, instead=again.instead)).finite:
            return


def valid_options(bench: Bench) -> None:
    """Each option of the optimizer as its class has it by default: those that nobody wants first."""
    for change in _valid(bench):
        bench.lab.try_(change)


def _valid(bench: Bench) -> Iterator[Change]:
    step = bench.step
    optimizer = step.optimizers[step.optimizer]
    groups: list[dict[str, Any]] = [{n: v for n, v in g.items() if n != "params"} for g in optimizer.param_groups]
    if bench.signs.options:  # a hook of the module may change them before the update
        groups = bench.signs.options
    elif step.state is not None:  # a schedule may have moved on since
        groups = step.state["optimizers"][step.optimizer]["param_groups"]
    usual = _USUAL | {n: p.default for n, p in inspect.signature(type(optimizer)).parameters.items() if n in groups[0]}
    if any(p.dtype == torch.float16 for group in optimizer.param_groups for p in group["params"]):
        usual["eps"] = 1e-4
    given = {name: [group.get(name) for group in groups] for name in usual}
    for name in sorted(usual, key=lambda name: _rank(name, given[name])):
        other = next((value for value in given[name] if value is not None and value != usual[name]), None)
        if other is not None and name not in _IMPLEMENTATIONS and usual[name] is not inspect.Parameter.empty:
            yield changes.with_option(name, usual[name], f"{name}={usual[name]} instead of {other}")


def _rank(name: str, values: list[Any]) -> tuple[int, str]:
    """What nobody wants first, then what is switched on, then the numbers."""
    is_flag = any(isinstance(value, bool) for value in values)
    return (0 if any(_is_odd(name, value) for value in values) else 1 if is_flag else 2), name


def _is_odd(name: str, value: object) -> bool:
    """Whether an option is none that anybody wants."""
    numbers = value if isinstance(value, (tuple, list)) else [value]
    for number in numbers:
        if isinstance(number, Tensor):
            number = float(number)
        if isinstance(number, (int, float)) and (not math.isfinite(number) or number < 0):
            return True
    return name in ("eps", "lr") and value == 0


def other_formats(bench: Bench) -> None:
    """The same step in other number formats."""
    given = bench.signs.precision
    tried = {"16-mixed": ["32-true", "bf16-mixed"], "16-true": ["32-true", "bf16-mixed"]}
    for precision in tried.get(given, ["32-true", "64-true"] if given.startswith("bf16") else ["64-true"]):
        if precision != given:
            bench.lab.try_(changes.in_precision(precision))


def smallest_loss_scale(bench: Bench) -> None:
    """A loss scale of 1: where that helps, the scaler would have come to it."""
    if bench.signs.loss_scale is not None and bench.signs.failed == "gradient" and bench.signs.loss_scale > 1:
        bench.lab.try_(changes.with_loss_scale(1.0))


def modules_in_fp32(bench: Bench) -> None:
    """The smallest set of modules that has to be kept in fp32."""
    if not bench.signs.precision.endswith("-mixed"):
        return
    if not any(t.finite for t in bench.lab.trials if t.facts.get("precision") == "32-true"):
        return
    origin = bench.origin
    if origin is not None and origin.module:
        alone = bench.lab.try_(changes.with_module_in_fp32([origin.module]), keep=False)
        if alone.finite:
            bench.lab.keep(alone)
            return
    paths = [path for path, m in bench.step.module.named_modules() if path and has_own_parameters(m)]
    if origin is not None and origin.module is not None and origin.module not in paths:
        paths.append(origin.module)
    if not 0 < len(paths) <= MOST_ITEMS:
        return
    whole = bench.lab.try_(changes.with_module_in_fp32(paths), keep=False)
    if whole.finite:
        bench.keep_smallest(paths, changes.with_module_in_fp32, whole)
