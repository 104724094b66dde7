"""What a diagnosis concludes: the causes that origin, signs and trials speak for, likeliest first.

A pure function of what was found. Each rule looks at one kind of cause and says how sure it is. One whose cure also
works in the run's own number format, and that explains it by something further from normal, goes first.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lightning_stability.diagnosis.operations import EXPONENTIAL, SOFTMAX, family_of
from lightning_stability.diagnosis.origin import Origin
from lightning_stability.diagnosis.signs import Amplifier, Signs
from lightning_stability.diagnosis.trials import Trial

FLOOR = 0.4
"""Below this confidence the answer is `unknown`."""
_WILD = 8.0
"""A sample this many times the size of the others is wild."""
_ABSURD = 1e3
"""A parameter that makes outputs this large of inputs of size 1 is absurd."""
_FAR = 30.0
"""A scale or a gain this far from 1 is what it deviates by, and not the number format."""
_MOVED = 0.3
"""A parameter that updates can have moved by this part of its size has been trained to what it is."""
_GROWN = 1e2
"""A loss that grew by this factor is one that diverges."""


@dataclass(frozen=True)
class Cause:
    """One cause, as `report.json` has it.

    Attributes:
        cause: One of the words of the docs' table.
        module: The path of the module in whose own code it happened; None where there is none.
        tensor: An entry of the batch, a parameter or a buffer.
        samples: Positions in the bad batch.
        op: The operation.
        file: The user's file.
        line: The line in it.
        confidence: From 0 to 1.
        summary: One sentence, without a full stop.
        evidence: What was seen and tried, a sentence each.
        remedy: What can be pasted.
        dataset_indices: Of the samples, where known.
        facts: Numbers that the summary is made of, such as `factor`.
    """

    cause: str
    module: str | None
    tensor: str | None
    samples: list[int]
    op: str | None
    file: str | None
    line: int | None
    confidence: float
    summary: str = ""
    evidence: list[str] = field(default_factory=list)
    remedy: str = ""
    dataset_indices: list[int] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The cause as the report has it; JSON has no infinity."""
        facts = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in self.facts.items()}
        return asdict(self) | {"facts": facts}


@dataclass(frozen=True)
class Case:
    """What the rules look at.

    Attributes:
        origin: Where the first non-finite value was made; None if the step is finite now.
        signs: What the numbers say.
        trials: What was tried.
        may_differ: Whether the replay may be another step than the recorded one: on another machine, or one that is not
            deterministic.
    """

    origin: Origin | None
    signs: Signs
    trials: list[Trial]
    may_differ: bool = False

    def cures(self, name: str) -> list[Trial]:
        """The trials of a kind that made the step finite."""
        return [trial for trial in self.trials if trial.name == name and trial.finite]

    def tried(self, name: str) -> list[Trial]:
        """All trials of a kind."""
        return [trial for trial in self.trials if trial.name == name]

    @property
    def cures_in_precision(self) -> set[str]:
        """The number formats in which the step is finite."""
        return {trial.facts["precision"] for trial in self.cures("precision")}


Rule = Callable[[Case], Cause | None]


def find_causes(case: Case) -> list[Cause]:
    """The causes, likeliest first; `unknown` alone if none is likely enough."""
    found = [cause for rule in _RULES if (cause := rule(case)) is not None]
    found = sorted((c for c in found if c.confidence >= FLOOR), key=lambda cause: -cause.confidence)
    return _one_of_each(found) or [_cause(case, "unknown", 0.0)]


def _one_of_each(causes: list[Cause]) -> list[Cause]:
    seen: dict[str, Cause] = {}
    for cause in causes:
        seen.setdefault(cause.cause, cause)
    if not seen:
        return []
    first, *others = seen.values()
    return [
        first,
        *(replace(other, confidence=round(min(other.confidence, 1 - first.confidence), 3)) for other in others),
    ]


# The rules


def _nonfinite_input(case: Case) -> Cause | None:
    if case.origin is None or case.origin.phase != "input":
        return None
    return _cause(case, "nonfinite_input", 0.98 if case.cures("batch") else 0.8)


def _nonfinite_weights(case: Case) -> Cause | None:
    if case.origin is None or case.origin.phase != "weights":
        return None
    cures = case.cures("operation" if case.origin.written else "weights")
    by_optimizer = any(trial.finite is False for trial in case.tried("update"))
    return _cause(
        case,
        "nonfinite_weights",
        0.5 if by_optimizer else 0.98 if cures else 0.85,
        facts={"written": case.origin.written},
    )


def _optimizer_update(case: Case) -> Cause | None:
    origin, cures = case.origin, case.cures("optimizer")
    facts = cures[0].facts if cures else {}
    if origin is not None and origin.phase == "weights" and any(t.finite is False for t in case.tried("update")):
        where = dict.fromkeys(("op", "file", "line")) | {"facts": facts | {"before": True}}
        return _cause(case, "optimizer_update", 0.95 if cures else 0.85, **where)
    if origin is None or origin.phase != "optimizer":
        return None
    return _cause(case, "optimizer_update", 0.97 if cures else 0.6, facts=facts)


def _transient(case: Case) -> Cause | None:
    again = case.tried("same again")
    if case.origin is not None or not again or not again[0].finite or case.signs.failed == "rejected":
        return None
    if case.signs.compiled or case.may_differ:
        return None
    return _cause(case, "transient", 0.9)


def _compiled_code(case: Case) -> Cause | None:
    if case.origin is not None or not case.signs.compiled:
        return None
    if any(trial.finite is False for trial in case.tried("compiled")):
        return _cause(case, "compiled_code", 0.97, module=case.signs.compiled[0])
    return None


def _masked_attention(case: Case) -> Cause | None:
    origin = case.origin
    if origin is None or family_of(origin) != SOFTMAX or not case.cures("mask"):
        return None
    return _cause(case, "masked_attention", 0.97, samples=origin.samples or _found_samples(case))


def _empty_reduction(case: Case) -> Cause | None:
    if case.origin is None or not case.signs.over_nothing:
        return None
    cures = case.cures("targets")
    tensor = cures[0].facts["tensor"] if cures else case.origin.tensor
    return _cause(case, "empty_reduction", 0.95 if cures or case.cures("operation") else 0.8, tensor=tensor)


def _undefined(case: Case) -> Cause | None:
    origin, signs = case.origin, case.signs
    if origin is None or not signs.outside or signs.over_nothing:
        return None
    if family_of(origin) == SOFTMAX:
        return None
    confidence = 0.95 if case.cures("operation") else 0.8
    kind = "undefined_gradient" if origin.phase == "backward" else "undefined_operation"
    return _cause(case, kind, confidence, samples=_found_samples(case) or origin.samples)


def _exponential(case: Case) -> Cause | None:
    """An exponential of sound numbers that is too large for any format: the operation, if nothing else is wild."""
    origin = case.origin
    if origin is None or family_of(origin) != EXPONENTIAL or not case.cures("operation"):
        return None
    return _cause(case, "undefined_operation", 0.6)


def _extreme_sample(case: Case) -> Cause | None:
    origin, signs = case.origin, case.signs
    if origin is None or origin.phase not in ("forward", "backward") or signs.outside:
        return None
    found, size = _found_samples(case), signs.batch_size
    if not found or len(found) > max(1, size // 4):
        return None
    entry, ratio = _deviation(signs, found)
    columns = case.cures("columns")
    entry = columns[0].facts["tensor"] if columns else entry
    if ratio < _WILD / 2:
        return None
    confidence = 0.96 if ratio > 10 * _WILD else 0.9 if ratio > _WILD else 0.55
    facts = {"ratio": ratio, "columns": columns[0].facts["columns"] if columns else []}
    return _cause(case, "extreme_sample", confidence, samples=found, tensor=entry, facts=facts)


def _input_scale(case: Case) -> Cause | None:
    origin, signs = case.origin, case.signs
    if origin is None or signs.outside:
        return None
    cures = case.cures("input scale")
    if not cures:
        return None
    facts = max(cures, key=lambda trial: trial.facts["factor"]).facts
    factor = facts["factor"]
    confidence = 0.97 if factor >= 1e3 else 0.9 if factor >= 100 else 0.75 if factor >= 30 else 0.5
    amplifier = _amplifier(signs, facts)
    module = origin.module if facts["module"] is None else facts["module"]
    where: dict[str, Any] = {"module": module, "tensor": facts.get("tensor"), "samples": []}
    if amplifier is not None:
        where |= {"file": amplifier.file, "line": amplifier.line, "op": amplifier.op}
    return _cause(case, "input_scale", confidence, facts={"factor": factor, "by": facts["module"]}, **where)


def _weights(case: Case) -> Cause | None:
    origin, signs = case.origin, case.signs
    if origin is None or origin.phase not in ("forward", "backward") or signs.outside:
        return None
    cures = case.cures("weights")
    if not cures:
        return None
    tensors = next((trial.facts["tensors"] for trial in cures if trial.facts.get("tensors")), list(signs.gains))
    tensor = max(tensors, key=lambda name: signs.sizes.get(name, 0.0), default=None)
    gain = signs.gains.get(tensor or "", 0.0)
    facts = {"gain": gain, "growth": signs.growth}
    unknown = signs.first_step is False and not signs.has_history and gain >= _FAR  # absurd, and it was no fault before
    if signs.first_step is not True and (
        unknown or signs.growth >= _GROWN or signs.moved.get(tensor or "", 0.0) >= _MOVED
    ):
        confidence = 0.95 if signs.growth >= 10 * _GROWN else 0.85 if signs.growth >= _GROWN or gain >= _FAR else 0.75
        return _cause(case, "divergence", confidence, tensor=tensor, samples=[], facts=facts)
    only_cure = not case.cures_in_precision or not signs.precision.startswith(("16", "bf16"))
    only_cure &= origin.dtype != "float16" or signs.precision == "16-true"  # the code's own cast to it, if none cures
    usual = signs.outputs.get(tensor or "", gain)
    confidence = 0.95 if usual >= _ABSURD else 0.85 if usual >= _FAR else 0.75 if only_cure else 0.3
    return _cause(case, "extreme_weights", confidence, tensor=tensor, samples=[], facts=facts)


def _fp16_overflow(case: Case) -> Cause | None:
    origin, signs = case.origin, case.signs
    if origin is None or origin.phase not in ("forward", "backward") or signs.outside:
        return None
    cures = case.cures_in_precision & {"32-true", "bf16-mixed"}
    if not (cures and signs.is_half) and origin.dtype != "float16":
        return None
    modules = case.cures("modules in float32")
    facts = {"modules": modules[0].facts["modules"]} if modules else {}
    further = any(trial.facts["factor"] >= _FAR for trial in case.cures("input scale"))
    weights = _weights(case)
    further |= weights is not None and weights.confidence > 0.7
    return _cause(case, "fp16_overflow", 0.6 if further else 0.9 if cures else 0.7, facts=facts)


_RULES: list[Rule] = [
    *(_nonfinite_input, _nonfinite_weights, _optimizer_update, _compiled_code, _transient),
    *(_masked_attention, _empty_reduction, _undefined, _extreme_sample, _input_scale, _weights),
    *(_fp16_overflow, _exponential),
]
"""Of two that are equally sure, the earlier one is named first: it explains more with a smaller change."""


# What the rules share


def _cause(case: Case, kind: str, confidence: float, **given: Any) -> Cause:
    """A cause at the origin, or where it is given to be."""
    origin, signs = case.origin, case.signs
    if origin is None:
        at: dict[str, Any] = dict.fromkeys(("module", "tensor", "op", "file", "line")) | {"samples": []}
    else:
        at = {name: getattr(origin, name) for name in ("module", "tensor", "op", "file", "line", "samples")}
    facts = given.pop("facts", {})
    at |= given
    known = signs.dataset_indices
    indices = [known[i] for i in at["samples"] if i < len(known)] if known and at["samples"] else None
    names = signs.descriptions
    if names and at["samples"]:
        facts = facts | {"described": [names[i] for i in at["samples"] if i < len(names)]}
    return Cause(kind, confidence=confidence, dataset_indices=indices, facts=facts, **at)


def _found_samples(case: Case) -> list[int]:
    cures = case.cures("samples")
    return cures[-1].facts["samples"] if cures else []


def _deviation(signs: Signs, samples: list[int]) -> tuple[str | None, float]:
    """The entry in which samples are furthest from the others, and by which factor."""
    found: dict[str, float] = {}
    for entry, values in signs.sample_scales.items():
        others = [value for index, value in enumerate(values) if index not in samples]
        usual = statistics.median(others) if others else 0.0
        least = min(values[index] for index in samples)
        found[entry] = least / usual if usual > 0 else (math.inf if least > 0 else 1.0)
    furthest = max(found, key=lambda name: found[name], default=None)
    return furthest, found[furthest] if furthest is not None else 1.0


def _amplifier(signs: Signs, facts: dict[str, Any]) -> Amplifier | None:
    same = (a for a in signs.amplifiers if a.module == facts["module"] and a.factor == facts["factor"])
    return next(same, None)
