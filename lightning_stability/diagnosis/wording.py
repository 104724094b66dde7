"""What a diagnosis concludes, in sentences."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from lightning_stability.diagnosis.causes import Case, Cause
from lightning_stability.diagnosis.operations import size_of
from lightning_stability.diagnosis.origin import Origin
from lightning_stability.diagnosis.trials import Trial

_FORMAT_ALONE = "the numbers are as they were: another format hides the cause"


def summary_of(cause: Cause, case: Case) -> str:
    """One sentence, without a full stop."""
    return _SUMMARIES[cause.cause](cause, case)


def evidence_for(cause: Cause, case: Case) -> list[str]:
    """What was seen and tried that speaks for a cause."""
    names = _EVIDENCE.get(cause.cause, ())
    cures = [trial for name in names for trial in case.cures(name)]
    return [*_seen(cause, case), *(_sentence(trial) for trial in cures[:4])]


def excluded_by(case: Case, cause: Cause) -> list[dict[str, Any]]:
    """What was tried and is no cure, and what is one only because another number format hides the cause.

    Args:
        cause: The first one.
    """
    rows = []
    for trial in case.trials:
        if trial.finite is False or trial.finite is None:
            rows.append({"name": _NAMES.get(_key(trial), trial.name), "tried": trial.change, "came": trial.outcome})
        elif trial.name == "precision" and cause.cause not in ("fp16_overflow", "unknown"):
            came = f"{trial.outcome}; {_FORMAT_ALONE}"
            rows.append({"name": "precision", "tried": trial.change, "came": came})
    return rows


def _key(trial: Trial) -> tuple[str, Any]:
    return trial.name, trial.facts.get("option")


_NAMES = {("optimizer", "lr"): "learning rate"}


def _sentence(trial: Trial) -> str:
    """A trial in a sentence, without a full stop."""
    before = "" if trial.change.startswith(("in ", "nothing")) else "with "
    return f"{before}{trial.change} the step is {trial.outcome}"


def _seen(cause: Cause, case: Case) -> list[str]:
    signs, seen = case.signs, []
    if cause.cause == "divergence" and signs.growing:
        seen.append(f"over the steps before, the {signs.growing} became {signs.growth:,.3g} times larger")
    if cause.cause == "extreme_sample" and cause.facts.get("columns"):
        columns = cause.facts["columns"]
        seen.append(f"of that sample {_listed('column', columns)} would have to be another")
    return seen


def short_path(file: str) -> str:
    """A file's path from here, where it is below.

    Args:
        file: An absolute path.
    """
    relative = os.path.relpath(file)
    return file if relative.startswith("..") else relative


def listed_samples(samples: list[int]) -> str:
    """Positions in the batch, in words."""
    return _listed("sample", samples)


def _listed(what: str, numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"{what}{'' if len(numbers) == 1 else 's'} {shown}"


def _where(cause: Cause) -> str:
    place = f" at {short_path(cause.file)}:{cause.line}" if cause.file else ""
    return f" in `{cause.module}`{place}" if cause.module else place


def _described(cause: Cause) -> str:
    """What the data module says of the samples."""
    known = cause.facts.get("described", [])
    more = f"; and {len(known) - 3} more" if len(known) > 3 else ""
    return f" ({'; '.join(known[:3])}{more})" if known else ""


def _for_samples(cause: Cause) -> str:
    return f", for {listed_samples(cause.samples)}" if cause.samples else ""


def _reach(origin: Origin | None) -> str:
    """What went in, as a range."""
    ranges = [] if origin is None else [r for r in origin.inputs if size_of(r) or r.min == r.max]
    return f"what goes in reaches from {ranges[-1].min:.4g} to {ranges[-1].max:.4g}" if ranges else "outside its domain"


def _nonfinite_input(cause: Cause, case: Case) -> str:
    samples = f" in {listed_samples(cause.samples)}{_described(cause)}" if cause.samples else ""
    return f"`{cause.tensor}` held NaN or infinity{samples} when the data loader gave it"


def _extreme_sample(cause: Cause, case: Case) -> str:
    is_are, place = ("is", "its") if len(cause.samples) == 1 else ("are", "their")
    which = f"{listed_samples(cause.samples)}{_described(cause)} of `{cause.tensor}`"
    size = f"{cause.facts['ratio']:,.4g} times as large as the others"
    return f"{which} {is_are} {size}; with others in {place} place the step is finite"


def _input_scale(cause: Cause, case: Case) -> str:
    factor = f"{cause.facts['factor']:,.5g}"
    module = cause.facts["by"]
    if module is not None:
        module = f"`{module}`" if module else "the training step"
        return f"{module} makes its input {factor} times larger; with that undone the step is finite"
    return f"`{cause.tensor}` has a deviation of about {factor} in all samples; at unit deviation the step is finite"


def _fp16_overflow(cause: Cause, case: Case) -> str:
    named = cause.facts.get("modules")
    what = f"`{named[0]}`" if named and named[0] and len(named) == 1 else f"what is computed{_where(cause)}"
    return f"{what} does not fit float16, whose largest number is 65,504; its numbers are sound in a wider format"


def _undefined_operation(cause: Cause, case: Case) -> str:
    if case.origin is not None and case.origin.constants:
        return f"`{cause.op}`{_where(cause)} is given the number {' and '.join(case.origin.constants)} by the code"
    return f"`{cause.op}`{_where(cause)} is not defined for what it gets{_for_samples(cause)}: {_reach(case.origin)}"


def _undefined_gradient(cause: Cause, case: Case) -> str:
    return f"`{cause.op}`{_where(cause)} is finite and its derivative is not{_for_samples(cause)}"


def _masked_attention(cause: Cause, case: Case) -> str:
    return f"every key is masked{_for_samples(cause)}{_where(cause)}: a softmax over -inf alone is NaN"


def _empty_reduction(cause: Cause, case: Case) -> str:
    why = f", because of `{cause.tensor}`" if cause.tensor else ""
    return f"the mean{_where(cause)} is over no values{why}"


def _divergence(cause: Cause, case: Case) -> str:
    growth, gain = cause.facts["growth"], cause.facts["gain"]
    largest = f"`{cause.tensor}` has grown to a gain of {gain:,.3g}" if cause.tensor else "the weights have grown"
    if growth < 10 or case.signs.growing is None:
        return f"training has driven the weights too far: {largest}; scaled down to 1 the step is finite"
    return f"the training diverged: the {case.signs.growing} became {growth:,.3g} times larger, and {largest}"


def _nonfinite_weights(cause: Cause, case: Case) -> str:
    if cause.facts.get("written"):
        return f"`{cause.op}`{_where(cause)} wrote what is not finite into `{cause.tensor}`, outside of the optimizer"
    return f"`{cause.tensor}` was not finite before the step"


def _extreme_weights(cause: Cause, case: Case) -> str:
    gain = f"{cause.facts['gain']:,.4g}"
    return f"`{cause.tensor}` makes what it is applied to {gain} times larger; at a gain of 1 the step is finite"


def _optimizer_update(cause: Cause, case: Case) -> str:
    if cause.facts.get("before"):
        made = f"an update before made `{cause.tensor}` non-finite, as another one does again"
    else:
        made = f"the gradients are finite and the optimizer's update of `{cause.tensor}` is not"
    option = f"; with an ordinary `{cause.facts['option']}` it is finite" if cause.facts.get("option") else ""
    return f"{made}{option}"


def _compiled_code(cause: Cause, case: Case) -> str:
    return f"`{cause.module}` is not finite when it is compiled, and finite when it runs eagerly"


def _transient(cause: Cause, case: Case) -> str:
    where = f"{case.signs.device}, rank {case.signs.rank}"
    return f"run again, the same step is finite: a transient fault of {where}, or a race"


def _unknown(cause: Cause, case: Case) -> str:
    count = sum(trial.finite is not True for trial in case.trials)
    return f"none of {count} changes that were tried explains it" if count else "nothing could be tried"


_SUMMARIES: dict[str, Callable[[Cause, Case], str]] = {
    "nonfinite_input": _nonfinite_input,
    "extreme_sample": _extreme_sample,
    "input_scale": _input_scale,
    "fp16_overflow": _fp16_overflow,
    "undefined_operation": _undefined_operation,
    "undefined_gradient": _undefined_gradient,
    "masked_attention": _masked_attention,
    "empty_reduction": _empty_reduction,
    "divergence": _divergence,
    "nonfinite_weights": _nonfinite_weights,
    "extreme_weights": _extreme_weights,
    "optimizer_update": _optimizer_update,
    "compiled_code": _compiled_code,
    "transient": _transient,
    "unknown": _unknown,
}
_EVIDENCE: dict[str, tuple[str, ...]] = {
    "nonfinite_input": ("batch", "samples"),
    "extreme_sample": ("samples", "columns"),
    "input_scale": ("input scale",),
    "fp16_overflow": ("precision", "modules in float32"),
    "undefined_operation": ("operation", "samples"),
    "undefined_gradient": ("operation", "samples"),
    "masked_attention": ("mask", "operation", "samples"),
    "empty_reduction": ("targets", "operation"),
    "divergence": ("weights",),
    "nonfinite_weights": ("weights",),
    "extreme_weights": ("weights",),
    "optimizer_update": ("optimizer",),
    "compiled_code": ("same again",),
    "transient": ("same again",),
}
