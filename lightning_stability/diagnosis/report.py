"""What a diagnosis found: `report.json`, and the same in at most twenty lines of text."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from lightning_stability.atomic import replace_file
from lightning_stability.diagnosis.origin import Origin, as_json
from lightning_stability.diagnosis.step import REJECTED

SCHEMA = 1
_SHOWN_SAMPLES = 8
_NAMES = {"validation": "output of `validation_step`"}
_LARGE = 1e3
_MOST_LINES = 19
_WRITTEN = "The step itself wrote it into the module, outside of the optimizer."
_WHERE = {
    "input": "It was in the batch that the data loader gave.",
    "weights": "It was in the module before the step.",
    "forward": "It was made in the forward pass.",
    "backward": "It was made in the backward pass; the line is that of the forward pass.",
    "optimizer": "The gradients were finite; the optimizer's update made it.",
}


def make_report(
    reproduced: bool | None,
    origin: Origin | None,
    failed: str,
    notes: list[str] | None = None,
    exact: bool | None = None,
    **details: Any,
) -> dict[str, Any]:
    """The content of `report.json`.

    Args:
        reproduced: Whether the failure came again; None if the step could not be run.
        failed: What was non-finite in the recording.
        notes: What limits the answer.
        exact: Whether the losses were the same bits; None if they cannot be compared.
        details: What else it shall say.
    """
    return {
        "schema": SCHEMA,
        "reproduced": reproduced,
        "exact": exact,
        "failed": failed,
        "origin": None if origin is None else origin_as_json(origin),
        "causes": [],
        "counterfactuals": [],
        "excluded": [],
        "notes": notes or [],
        **details,
    }


def origin_as_json(origin: Origin) -> dict[str, Any]:
    """The origin as the report has it."""
    inputs = [{"name": name, **as_json(r)} for name, r in zip(origin.names, origin.inputs, strict=True)]
    fields = (
        "phase",
        "module",
        "op",
        "file",
        "line",
        "code",
        "tensor",
        "samples",
        "aten",
        "dtype",
        "discarded",
        "written",
    )
    return {name: getattr(origin, name) for name in fields} | {"inputs": inputs, "output": as_json(origin.output)}


def as_text(report: dict[str, Any]) -> str:
    """A report in at most twenty lines, with room for the path of the report.

    Args:
        report: What `make_report` returned.
    """
    lines = [_reproduced(report)]
    causes = report["causes"]
    if causes:
        lines += _cause_lines(report)
    if report["origin"] is not None:
        lines += _origin_lines(report["origin"], few=bool(causes))
    elif report["reproduced"]:
        lines.append("No operation of the replay explains it.")
    lines += [f"note: {note}" for note in report["notes"]][: max(0, _MOST_LINES - len(lines))]
    return "\n".join(lines)


def cause_in_a_line(report: dict[str, Any]) -> str | None:
    """The first-named cause; None where none was looked for or found.

    Args:
        report: What `make_report` returned.
    """
    first = report["causes"][0] if report["causes"] else None
    return None if first is None or first["cause"] == "unknown" else f"{first['cause']}: {first['summary']}"


def _cause_lines(report: dict[str, Any]) -> list[str]:
    """Cause, where, evidence in a sentence, remedy, what else it may be, what it is not."""
    first, *others = report["causes"]
    sure = f" (confidence {first['confidence']:.2f})" if first["confidence"] else ""
    lines = [f"Cause: {first['cause']}{sure}. {first['summary'][:1].upper()}{first['summary'][1:]}."]
    if first["evidence"]:
        lines.append(f"  evidence {first['evidence'][0]}")
    remedy = first["remedy"].splitlines()
    lines += [f"  {'remedy' if number == 0 else '':8} {line}" for number, line in enumerate(remedy[:3])]
    if first["dataset_indices"]:
        lines.append(f"  dataset  {_samples(first['dataset_indices']).partition(' ')[2]} (indices of the samples)")
    if others:
        lines.append("  also     " + ", ".join(f"{cause['cause']} {cause['confidence']:.2f}" for cause in others[:4]))
    excluded = list(dict.fromkeys(row["name"] for row in report["excluded"]))
    if excluded:
        lines.append(f"  excluded {', '.join(excluded)}")
    return lines


def one_sentence(origin: Origin) -> str:
    """Where the first non-finite value was made, in one sentence without a full stop.

    Example:
        >>> from lightning_stability.diagnosis.ranges import Range
        >>> origin = Origin("forward", "head", "log", "net.py", 7, "", None, [2], [], Range(0, 0), None, None)
        >>> one_sentence(origin)
        'the first non-finite value was made by `log` in module `head`, net.py:7, sample 2'
    """
    place = f", {_short_path(origin.file)}:{origin.line}" if origin.file else ""
    samples = f", {_samples(origin.samples)}" if origin.samples else ""
    module = _module(origin.module)
    if origin.phase == "input":
        return f"the input was not finite: `{origin.tensor}`{samples}, first used{module}{place}"
    if origin.phase == "weights" and origin.written:
        return f"{_operation(origin)} wrote what is not finite into `{origin.tensor}`, outside of the optimizer{place}"
    if origin.phase == "weights":
        return f"`{origin.tensor}` was not finite before the step, first used{place.removeprefix(',')}"
    if origin.phase == "optimizer":
        return f"the optimizer's update made `{origin.tensor}` non-finite, though its gradients were finite{place}"
    made = f"by {_operation(origin)}" if origin.phase == "forward" else f"in the derivative of `{origin.op}`"
    return f"the first non-finite value was made {made}{module}{place}{samples}{_largest(origin)}"


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write `report.json` and `report.txt`, each whole or not at all.

    Args:
        report: What `make_report` returned.

    Raises:
        OSError: If the folder cannot be written to.
    """
    texts = {"report.json": json.dumps(report, indent=1, allow_nan=False), "report.txt": as_text(report)}
    for name, text in texts.items():
        replace_file(folder / name, lambda file, text=text: file.write(f"{text}\n".encode()))  # type: ignore[misc]


def _reproduced(report: dict[str, Any]) -> str:
    failed = _NAMES.get(report["failed"], report["failed"])
    if failed == REJECTED:
        then = {True: "is not finite", False: "is finite", None: "could not be run"}[report["reproduced"]]
        return f"InputCheck rejected a batch of the step, so its update was discarded. Run again, the step {then}."
    if report["reproduced"] is None:
        return f"The step could not be run again; whether its {failed} becomes non-finite again is not known."
    if not report["reproduced"]:
        return f"Not reproduced: run again, the step's {failed} is finite or fails in another way."
    bits = {True: ", with the same loss bits", False: ", with other loss bits", None: ""}[report["exact"]]
    return f"Reproduced: the {failed} becomes non-finite again{bits}."


def _origin_lines(origin: dict[str, Any], few: bool) -> list[str]:
    lines = [
        _WRITTEN if origin["written"] else _WHERE[origin["phase"]],
        f"  phase    {origin['phase']}" + (" (made in the forward pass, which discarded it)" * origin["discarded"]),
        f"  module   {origin['module'] or '(the LightningModule itself)'}",
        f"  op       {origin['op']}  [{origin['aten']}, {origin['dtype']}]",
    ]
    if origin["file"]:
        lines.append(f"  line     {origin['file']}:{origin['line']}")
        lines += [f"           {origin['code']}"] if origin["code"] else []
    if origin["tensor"]:
        lines.append(f"  tensor   {origin['tensor']}")
    if origin["samples"]:
        lines.append(f"  samples  {_samples(origin['samples']).partition(' ')[2]}")
    lines += [f"  input    {_range(values)}" for values in origin["inputs"][: 1 if few else 4]]
    lines.append(f"  result   {_range(origin['output'])}")
    return lines


def _range(values: dict[str, Any]) -> str:
    name = f"{values['name']}: " if values.get("name") else ""
    if values["min"] is None:
        return f"{name}no finite value" + (f", {values['nonfinite']} non-finite" if values["nonfinite"] else "")
    bad = f", and {values['nonfinite']} non-finite" if values["nonfinite"] else ""
    return f"{name}{values['min']:.4g} to {values['max']:.4g}{bad}"


def _samples(samples: list[int]) -> str:
    shown = ", ".join(map(str, samples[:_SHOWN_SAMPLES]))
    more = f" and {len(samples) - _SHOWN_SAMPLES} more" if len(samples) > _SHOWN_SAMPLES else ""
    return f"{'sample' if len(samples) == 1 else 'samples'} {shown}{more}"


def _module(path: str | None) -> str:
    return f" in module `{path}`" if path else ""


def _operation(origin: Origin) -> str:
    return f"the cast to {origin.dtype}" if origin.op == "to" else f"`{origin.op}`"


def _largest(origin: Origin) -> str:
    """What went in, where it is so large that this is the point."""
    sizes = [max(abs(r.min), abs(r.max)) for r in origin.inputs if math.isfinite(r.min)]
    return f"; the values that went in reach {max(sizes):.3g}" if sizes and max(sizes) > _LARGE else ""


def _short_path(file: str) -> str:
    relative = os.path.relpath(file)
    return file if relative.startswith("..") else relative
