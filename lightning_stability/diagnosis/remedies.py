"""What can be pasted against a cause."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from lightning_stability.diagnosis.causes import Case, Cause
from lightning_stability.diagnosis.wording import short_path

_SAME = 0.01
"""How far a hyperparameter may be from a factor that it is taken for."""


def remedy_for(cause: Cause, case: Case) -> str:
    """Lines of code or of a configuration; empty where there is nothing to paste."""
    make = _REMEDIES.get(cause.cause)
    return make(cause, case) if make is not None else ""


def _mended(cause: Cause, case: Case) -> str:
    cures = case.cures("operation")
    if not cures:
        return ""
    facts = cures[0].facts
    if facts["file"] is None:
        return str(facts["code"])
    return _at(facts["code"], facts["file"], facts["line"])


def _at(code: str, file: str, line: int | None) -> str:
    """A line of code with where it belongs; a comment that it has stands for itself."""
    return f"{code}  # {short_path(file)}:{line}"


def _attention(cause: Cause, case: Case) -> str:
    return _mended(cause, case) or "mask[mask.all(dim=-1)] = False  # a row whose keys are all masked attends to all"


def _left_out(cause: Cause, case: Case) -> str:
    if cause.dataset_indices:
        indices = sorted(cause.dataset_indices)
        return f"dataset = Subset(dataset, [i for i in range(len(dataset)) if i not in {indices}])"
    return 'trainer = Trainer(callbacks=[InputCheck(action="skip"), ...])'


def _scale(cause: Cause, case: Case) -> str:
    factor, module = cause.facts["factor"], cause.facts["by"]
    if module:
        option = _option(module, factor, case.signs.hyperparameters)
        if option is not None:
            return option
        return f"model.{module} = torch.nn.Identity()  # it multiplies by {factor:,.4g}"
    entry = cause.tensor or "batch"
    return f"{entry} = {entry} / {factor:.4g}  # to unit deviation, before training_step"


def _option(module: str, factor: float, hyperparameters: dict[str, Any]) -> str | None:
    """The hyperparameter that a module was made with: of its name, or with its factor as the value."""
    name = module.rpartition(".")[2]
    if name in hyperparameters:
        return f"model.{name}: null  # in the configuration; it is {hyperparameters[name]!r}"
    for key, value in hyperparameters.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and value
        if is_number and min(abs(value / factor - 1), abs(value * factor - 1)) < _SAME:
            return f"model.{key}: 1.0  # in the configuration; it is {value!r}"
    return None


def _in_float32(cause: Cause, case: Case) -> str:
    modules = cause.facts.get("modules") or ([cause.module] if cause.module else [])
    lines = [
        f"m = model.{path}; m.forward = torch.autocast('{case.signs.device}', enabled=False)"
        f"(lambda *a, f=m.forward: f(*[x.float() for x in a]))"
        for path in modules
        if path
    ]
    return "\n".join(lines) or 'trainer = Trainer(precision="bf16-mixed")'


def _slower(cause: Cause, case: Case) -> str:
    return "trainer = Trainer(gradient_clip_val=1.0, ...)  # and a tenth of the learning rate, with warm-up"


def _smaller(cause: Cause, case: Case) -> str:
    gain = cause.facts.get("gain", math.nan)
    made = f"model.{cause.tensor}.data /= {gain:.4g}  # to a gain of 1, before training"
    return made if cause.tensor and math.isfinite(gain) else ""


def _finite(cause: Cause, case: Case) -> str:
    if not cause.tensor or cause.facts.get("written"):
        return _mended(cause, case)
    return f"assert model.{cause.tensor}.isfinite().all()  # after loading; load another checkpoint if it fails"


def _other_option(cause: Cause, case: Case) -> str:
    name, value, origin = cause.facts.get("option"), cause.facts.get("value"), case.origin
    if name is None:
        return ""
    given = rf"\b{name}\s*=\s*[^,()]+(\([^()]*\))?"
    if origin is not None and re.search(given, origin.code) and _is_odd(name, origin.code):
        line = re.sub(given, f"{name}={value!r}", origin.code, count=1)
        return _at(line, origin.file or "", origin.line)
    return f"optimizer.param_groups[0][{name!r}] = {value!r}  # until its schedule gives a finite one"


def _is_odd(name: str, code: str) -> bool:
    """Whether the line itself gives the option the value that is at fault, and no schedule does."""
    found = re.search(rf"\b{name}\s*=\s*([\w.+-]+)", code)
    try:
        return found is not None and (float(found[1]) == 0 or not math.isfinite(float(found[1])))
    except ValueError:
        return False


def _eager(cause: Cause, case: Case) -> str:
    path = cause.module
    if not path:
        return 'torch.compiler.set_stance("force_eager")'
    if path in case.signs.wrapped:
        return f"model.{path} = model.{path}._orig_mod"
    return f"model.{path}.forward = torch.compiler.disable(model.{path}.forward)"


_REMEDIES: dict[str, Callable[[Cause, Case], str]] = {
    "nonfinite_input": _left_out,
    "extreme_sample": _left_out,
    "input_scale": _scale,
    "fp16_overflow": _in_float32,
    "undefined_operation": _mended,
    "undefined_gradient": _mended,
    "masked_attention": _attention,
    "empty_reduction": _mended,
    "divergence": _slower,
    "nonfinite_weights": _finite,
    "extreme_weights": _smaller,
    "optimizer_update": _other_option,
    "compiled_code": _eager,
}
