"""The experiments of a diagnosis: small passes over one question, is the step finite if this is changed?

Which passes are worth trying, and in which order, follows from the origin and the signs. All of them share one budget.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lightning_stability.diagnosis import changes
from lightning_stability.diagnosis.attention import with_free_key, with_plain_attention
from lightning_stability.diagnosis.batch_trials import (
    bad_samples,
    columns_of_samples,
    finite_entry,
    scaled_entries,
    unscaled,
    valid_targets,
)
from lightning_stability.diagnosis.bench import Bench
from lightning_stability.diagnosis.errors import OutOfTimeError
from lightning_stability.diagnosis.mending import functions_with
from lightning_stability.diagnosis.mends import mends_of
from lightning_stability.diagnosis.module_trials import (
    earlier_weights,
    finite_weights,
    larger_eps,
    modules_in_fp32,
    other_formats,
    smallest_loss_scale,
    tamed_weights,
    update_again,
    valid_options,
)
from lightning_stability.diagnosis.operations import SOFTMAX, family_of
from lightning_stability.diagnosis.origin import Origin
from lightning_stability.diagnosis.signs import Signs

Pass = Callable[[Bench], None]


def run_trials(bench: Bench) -> list[str]:
    """Run the passes that are worth it, until the time is up.

    Returns:
        What there was no time for, in words; the first of it may have been tried in part.
    """
    passes = plan(bench.origin, bench.signs)
    for number, one in enumerate(passes):
        bench.lab.begin(number, len(passes))
        try:
            one(bench)
        except OutOfTimeError:
            return [_WORDS[left] for left in passes[number:]]
    return []


def plan(origin: Origin | None, signs: Signs) -> list[Pass]:
    """The passes that are worth trying, the cheapest and likeliest first."""
    if origin is None:
        return [compiled_code] if signs.compiled else [same_again]
    if origin.phase == "input":
        return [finite_entry, bad_samples, often_blamed]
    if origin.phase == "weights":
        return [*([mended_line] if origin.written else [finite_weights, update_again]), often_blamed]
    if origin.phase == "optimizer":
        return [valid_options, other_formats]
    mask = [free_key] if family_of(origin) == SOFTMAX else []
    if signs.outside:
        return [
            *mask,
            larger_eps,
            mended_line,
            valid_targets,
            bad_samples,
            columns_of_samples,
            other_formats,
            often_blamed,
        ]
    scale = [unscaled, scaled_entries, bad_samples, columns_of_samples, tamed_weights, earlier_weights]
    return [*mask, *scale, other_formats, smallest_loss_scale, mended_line, modules_in_fp32, often_blamed]


# The passes that are not of the batch or of the module alone


def same_again(bench: Bench) -> None:
    """The step as it was, once more."""
    bench.lab.try_(changes.again())


def compiled_code(bench: Bench) -> None:
    """The step is finite eagerly: as it was run, compiled."""
    bench.lab.try_(changes.again())
    bench.lab.try_(changes.compiled())


def free_key(bench: Bench) -> None:
    """No row of attention has all its keys masked."""
    bench.lab.try_(with_free_key())


def mended_line(bench: Bench) -> None:
    """The origin's line with an epsilon or a clamp; the first change of it that is a cure."""
    assert bench.origin is not None
    mends, first = mends_of(bench.origin), None
    functions = functions_with(mends[0].file, mends[0].line) if mends else []
    for mend in mends if functions else []:
        trial = bench.lab.try_(changes.with_line(mend, functions), keep=False)
        first = first or trial
        if trial.finite:
            first = trial
            break
    if first is not None:
        bench.lab.keep(first)


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
        lab.try_(with_plain_attention())


_WORDS: dict[Pass, str] = {
    finite_entry: "a finite batch",
    valid_targets: "valid targets",
    bad_samples: "other samples",
    columns_of_samples: "other columns",
    unscaled: "another scale",
    scaled_entries: "another scale of the batch",
    finite_weights: "finite weights",
    tamed_weights: "smaller weights",
    earlier_weights: "earlier weights",
    larger_eps: "a larger epsilon",
    mended_line: "the line with an epsilon or a clamp",
    free_key: "a mask with a free key",
    other_formats: "other number formats",
    smallest_loss_scale: "a loss scale of 1",
    modules_in_fp32: "single modules in float32",
    valid_options: "other options of the optimizer",
    update_again: "another update",
    same_again: "the same again",
    compiled_code: "compiled code",
    often_blamed: "what is often blamed",
}
"""What each pass changes, for a reader who is told that there was no time for it."""
