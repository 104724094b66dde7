"""The experiments of a diagnosis: small passes over one question, is the step finite if this is changed?

Which passes are worth trying, and in which order, follows from the origin and the signs. All of them share one budget.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_stability.diagnosis import changes
from lightning_stability.diagnosis.attention import with_free_key, with_plain_attention
from lightning_stability.diagnosis.ddmin import ddmin
from lightning_stability.diagnosis.entries import replaced_columns, replaced_samples, with_entries
from lightning_stability.diagnosis.errors import OutOfTimeError
from lightning_stability.diagnosis.mends import mends_of
from lightning_stability.diagnosis.operations import SOFTMAX, family_of
from lightning_stability.diagnosis.origin import Origin
from lightning_stability.diagnosis.signs import Signs
from lightning_stability.diagnosis.step import RecordedStep
from lightning_stability.diagnosis.trials import Change, Laboratory, Trial
from lightning_stability.health.values import named_tensors
from lightning_stability.internals import has_own_parameters

_MOST_ITEMS = 512
"""Samples, columns and modules that a search looks through."""
_USUAL = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.0, "momentum": 0.9, "betas": (0.9, 0.999), "alpha": 0.99}


@dataclass
class Bench:
    """What a pass works with.

    Attributes:
        lab: Runs trials.
        step: The recorded step.
        origin: Where its first non-finite value was made; None if it is finite now.
        signs: What its numbers say.
        earlier: Weights of checkpoints from before the step, the newest first: their step, and a function that loads.
    """

    lab: Laboratory
    step: RecordedStep
    origin: Origin | None
    signs: Signs
    earlier: list[tuple[int, Callable[[], dict[str, Tensor]]]]


Pass = Callable[[Bench], None]


def run_trials(bench: Bench) -> bool:
    """Run the passes that are worth it, until the time is up.

    Args:
        bench: What they work with.

    Returns:
        Whether there was time for all.
    """
    for one in plan(bench.origin, bench.signs):
        try:
            one(bench)
        except OutOfTimeError:
            return False
    return True


def plan(origin: Origin | None, signs: Signs) -> list[Pass]:
    """The passes that are worth trying, the cheapest and likeliest first.

    Args:
        origin: Where the first non-finite value was made.
        signs: What the numbers say.
    """
    if origin is None:
        return [compiled_code] if signs.compiled else [same_again]
    if origin.phase == "input":
        return [finite_entry, bad_samples, often_blamed]
    if origin.phase == "weights":
        return [finite_weights, often_blamed]
    if origin.phase == "optimizer":
        return [valid_options, other_formats]
    mask = [free_key] if family_of(origin) == SOFTMAX else []
    if signs.outside:
        return [*mask, mended_line, valid_targets, bad_samples, columns_of_samples, other_formats, often_blamed]
    scale = [unscaled, scaled_entries, bad_samples, columns_of_samples, tamed_weights, earlier_weights]
    return [*mask, *scale, other_formats, smallest_loss_scale, mended_line, modules_in_fp32, often_blamed]


# What is there before the step


def same_again(bench: Bench) -> None:
    """The step as it was, once more."""
    bench.lab.try_(changes.again())


def compiled_code(bench: Bench) -> None:
    """The step is finite eagerly: as it was run, compiled."""
    bench.lab.try_(changes.again())
    bench.lab.try_(changes.compiled())


def finite_entry(bench: Bench) -> None:
    """The non-finite values of the batch's entry set to 0."""
    assert bench.origin is not None
    entry = bench.origin.tensor

    def finite(name: str, tensor: Tensor) -> Tensor:
        return torch.nan_to_num(tensor, 0.0, 0.0, 0.0) if name == entry and tensor.is_floating_point() else tensor

    words = f"the non-finite values of `{entry}` set to 0"
    bench.lab.try_(Change("batch", words, lambda step: with_entries(step, finite), facts={"tensor": entry}))


def finite_weights(bench: Bench) -> None:
    """The non-finite values of the parameter or buffer set to 0."""
    assert bench.origin is not None
    if bench.origin.tensor:
        bench.lab.try_(changes.with_finite_tensor(bench.origin.tensor))


def valid_options(bench: Bench) -> None:
    """Each option of the optimizer made an ordinary one."""
    group = bench.step.optimizers[bench.step.optimizer].param_groups[0]
    for name, value in sorted(_USUAL.items(), key=lambda item: not _is_odd(item[0], group.get(item[0]))):
        if name in group and group[name] != value:
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


# The operation


def free_key(bench: Bench) -> None:
    """No row of attention has all its keys masked."""
    bench.lab.try_(with_free_key())


def mended_line(bench: Bench) -> None:
    """The origin's line with an epsilon or a clamp; the first change of it that is a cure."""
    assert bench.origin is not None
    first = None
    for mend in mends_of(bench.origin):
        trial = bench.lab.try_(changes.with_line(mend), keep=False)
        first = first or trial
        if trial.finite:
            first = trial
            break
    if first is not None:
        bench.lab.keep(first)


def valid_targets(bench: Bench) -> None:
    """Where a mean is over nothing: each entry of whole numbers made one that nothing ignores."""
    if not bench.signs.over_nothing:
        return
    batch = bench.step.batches[bench.signs.batch]
    for entry, tensor in named_tensors(batch):
        if tensor.is_floating_point() or tensor.is_complex():
            continue

        def valid(name: str, tensor: Tensor, entry: str = entry) -> Tensor:
            if name != entry:
                return tensor
            return torch.ones_like(tensor) if tensor.dtype == torch.bool else torch.zeros_like(tensor)

        words = f"`{entry}` " + ("all true" if tensor.dtype == torch.bool else "of class 0 throughout")
        bench.lab.try_(Change("targets", words, lambda step, v=valid: with_entries(step, v), facts={"tensor": entry}))


# The batch


def bad_samples(bench: Bench) -> None:
    """The smallest set of samples without which the step is finite; others take their place."""
    size, number = bench.signs.batch_size, bench.signs.batch
    known = bench.origin.samples if bench.origin is not None else []
    if not 2 <= size <= _MOST_ITEMS or _has_found_samples(bench):
        return

    def without(samples: list[int]) -> Change:
        shown = ", ".join(map(str, samples[:8])) + (f" and {len(samples) - 8} more" if len(samples) > 8 else "")
        words = f"other samples of the batch in the place of {shown}"
        facts = {"samples": samples, "of": size}
        return Change(
            "samples", words, lambda step: with_entries(step, replaced_samples(samples, size), number), facts=facts
        )

    suspects = _suspects(bench, known)
    if not bench.lab.cures(without(suspects)):
        good = next((index for index in range(size) if index not in set(suspects)), 0)
        suspects = [index for index in range(size) if index != good]
        all_but_one = bench.lab.try_(without(suspects), keep=False)
        if not all_but_one.finite:
            bench.lab.keep(all_but_one)
            return
    found = ddmin(suspects, lambda part: bool(part) and bench.lab.cures(without(part)))
    bench.lab.try_(without(found))


def _suspects(bench: Bench, known: list[int]) -> list[int]:
    """The samples to begin with: those that the origin names, or those that are far larger than the rest."""
    size = bench.signs.batch_size
    if known and len(known) < size:
        return known
    largest: list[float] = [0.0] * size
    for values in bench.signs.sample_scales.values():
        usual = statistics.median(values) or 1.0
        largest = [max(a, b / usual) for a, b in zip(largest, values, strict=True)]
    far = [index for index, value in enumerate(largest) if value > 4]
    return far if 0 < len(far) < size else list(range(1, size))


def _has_found_samples(bench: Bench) -> bool:
    return any(trial.name == "samples" and trial.finite for trial in bench.lab.trials)


def columns_of_samples(bench: Bench) -> None:
    """The smallest set of columns or channels in those samples."""
    found = next((t.facts["samples"] for t in bench.lab.trials if t.name == "samples" and t.finite), None)
    size, number = bench.signs.batch_size, bench.signs.batch
    if not found:
        return
    for entry, tensor in named_tensors(bench.step.batches[number]):
        if not (tensor.is_floating_point() and tensor.dim() >= 2 and len(tensor) == size):
            continue
        count = tensor.shape[1]
        if not 2 <= count <= _MOST_ITEMS:
            continue

        def without(columns: list[int], entry: str = entry) -> Change:
            words = f"columns {', '.join(map(str, columns[:8]))} of `{entry}` from another sample"
            change = replaced_columns(entry, columns, found, size)
            facts = {"columns": columns, "tensor": entry, "samples": found}
            return Change("columns", words, lambda step: with_entries(step, change, number), facts=facts)

        if bench.lab.cures(without(list(range(count)))):
            columns = ddmin(range(count), lambda part, w=without: bool(part) and bench.lab.cures(w(part)))
            bench.lab.try_(without(columns))
            return


def unscaled(bench: Bench) -> None:
    """What made the numbers much larger undone."""
    for amplifier in bench.signs.amplifiers[:3]:
        if amplifier.module:
            if bench.lab.try_(changes.with_scaled_output(amplifier.module, amplifier.factor)).finite:
                return
        else:
            _try_entries_divided(bench, amplifier.factor)


def _try_entries_divided(bench: Bench, factor: float) -> None:
    for entry in bench.signs.sample_scales:

        def divided(name: str, tensor: Tensor, entry: str = entry) -> Tensor:
            return tensor / factor if name == entry else tensor

        words = f"`{entry}` divided by {factor:,.4g}"
        facts = {"tensor": entry, "factor": factor, "module": ""}
        bench.lab.try_(Change("input scale", words, lambda step, d=divided: with_entries(step, d), facts=facts))


def scaled_entries(bench: Bench) -> None:
    """Each entry of numbers brought to unit deviation, and clipped."""
    for entry, values in bench.signs.sample_scales.items():
        usual = statistics.median(values)
        if not usual > 8:
            continue

        def scaled(name: str, tensor: Tensor, entry: str = entry, usual: float = usual) -> Tensor:
            return (tensor / usual).clamp(-10, 10) if name == entry else tensor

        words = f"`{entry}` divided by {usual:,.4g}, to unit deviation, and clipped at 10"
        facts = {"tensor": entry, "factor": usual, "module": None}
        bench.lab.try_(Change("input scale", words, lambda step, s=scaled: with_entries(step, s), facts=facts))


# The weights


def tamed_weights(bench: Bench) -> None:
    """The smallest set of parameters that have to be smaller."""
    large = {name: gain for name, gain in bench.signs.gains.items() if 1.5 < gain < math.inf}
    if not large:
        return
    first = bench.lab.try_(changes.with_tamed_weights(large), keep=False)
    if not first.finite:
        bench.lab.keep(first)
        return
    names = sorted(large, key=lambda name: -large[name])[:_MOST_ITEMS]
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


# The format


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
    if not 0 < len(paths) <= _MOST_ITEMS or not bench.lab.cures(changes.with_module_in_fp32(paths)):
        return
    found = ddmin(paths, lambda part: bool(part) and bench.lab.cures(changes.with_module_in_fp32(part)))
    bench.lab.try_(changes.with_module_in_fp32(found))


# What people blame


def often_blamed(bench: Bench) -> None:
    """What is blamed most for a NaN: label smoothing, the learning rate, the schedule, fused attention."""
    lab = bench.lab
    if changes.has_label_smoothing(bench.step.module):
        lab.try_(changes.without_label_smoothing())
    if bench.step.optimizers:
        tenth = changes.with_option("lr", lambda lr: lr / 10, "a tenth of the learning rate")
        lab.try_(tenth)
        group = bench.step.optimizers[bench.step.optimizer].param_groups[0]
        if "initial_lr" in group:
            words = f"the learning rate that it began with, {group['initial_lr']:g}"
            lab.try_(replace(changes.with_option("lr", group["initial_lr"], words), name="schedule"))
    if "attention" in ((bench.origin.op if bench.origin else None) or ""):
        with contextlib.suppress(RuntimeError):
            lab.try_(with_plain_attention())
