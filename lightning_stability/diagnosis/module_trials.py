"""Passes that change the module: its weights, its number format, its optimizer's options."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_stability.diagnosis import changes
from lightning_stability.diagnosis.bench import MOST_ITEMS, Bench
from lightning_stability.diagnosis.ddmin import ddmin
from lightning_stability.diagnosis.trials import Trial
from lightning_stability.internals import has_own_parameters

_USUAL = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.0, "momentum": 0.9, "betas": (0.9, 0.999), "alpha": 0.99}


def finite_weights(bench: Bench) -> None:
    """The non-finite values of the parameter or buffer set to 0."""
    assert bench.origin is not None
    if bench.origin.tensor:
        bench.lab.try_(changes.with_finite_tensor(bench.origin.tensor))


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
    found = ddmin(
        names,
        lambda part: bool(part) and bench.lab.cures(changes.with_tamed_weights({name: large[name] for name in part})),
    )
    bench.lab.try_(changes.with_tamed_weights({name: large[name] for name in found}))


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


def valid_options(bench: Bench) -> None:
    """Each option of the optimizer made an ordinary one: those that nobody wants first, then the usual suspects."""
    group = bench.step.optimizers[bench.step.optimizer].param_groups[0]
    is_half = any(p.dtype == torch.float16 for p in group["params"])
    usual = _USUAL | ({"eps": 1e-4} if is_half else {})
    for name, value in sorted(usual.items(), key=lambda item: not _is_odd(item[0], group.get(item[0]))):
        is_suspect = name in group and (_is_odd(name, group[name]) or name in ("eps", "lr"))
        if is_suspect and group[name] != value:
            bench.lab.try_(changes.with_option(name, value, f"{name}={value} instead of {group[name]}"))


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
    if not 0 < len(paths) <= MOST_ITEMS or not bench.lab.cures(changes.with_module_in_fp32(paths)):
        return
    found = ddmin(paths, lambda part: bool(part) and bench.lab.cures(changes.with_module_in_fp32(part)))
    bench.lab.try_(changes.with_module_in_fp32(found))
