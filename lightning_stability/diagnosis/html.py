"""`report.html`: a diagnosis as one page. All that comes from the incident's folder is text, and escaped."""

from __future__ import annotations

import difflib
import json
import math
from importlib import metadata
from pathlib import Path
from typing import Any

from lightning_stability.atomic import replace_file
from lightning_stability.diagnosis.html_samples import sample_section
from lightning_stability.diagnosis.incident import Incident, read_incident
from lightning_stability.pages import what_is_missing
from lightning_stability.pages.numbers import as_number, is_wide_ranging

FILE_NAME = "report.html"
_MAX_BYTES = 1_450_000
_MOST_SPANS = 70
_LIMITS = {"float16": ("fp16", 65504.0), "bfloat16": ("bf16", 3.3895e38), "float32": ("fp32", 3.4028e38)}


def write_page(folder: Path, report: dict[str, Any]) -> str | None:
    """Write `report.html` into an incident's folder; whatever fails in it, the diagnosis goes before it.

    Args:
        report: The content of `report.json`.

    Returns:
        Why there is none; None if it was written.
    """
    missing = what_is_missing()
    if missing is not None:
        return f"report.html was not written: {missing}"
    try:
        text = page_of(read_incident(folder), report)
        replace_file(folder / FILE_NAME, lambda file: file.write(text.encode()))
    except Exception as error:
        return f"report.html was not written: {type(error).__name__}: {error}"
    return None


def page_of(incident: Incident, report: dict[str, Any]) -> str:
    """The page of an incident.

    Args:
        report: The content of `report.json`.
    """
    from lightning_stability.pages.page import render  # (matplotlib and jinja2 are no dependencies of the package)

    values = {
        "version": metadata.version("lightning-stability"),
        "made": "",
        "folder": incident.folder.name,
        "heading": _heading(incident),
        "chips": _chips(incident, report),
        "answer": _answer(report),
        "history": _history(incident),
        "layers": _layers(report),
        "counterfactuals": [_counterfactual(row) for row in _rows(report, "counterfactuals")],
        "excluded": [_excluded(row) for row in _rows(report, "excluded")],
        "samples": sample_section(incident, report),
        "repro": _repro(incident.folder, report.get("repro")),
        "facts": _facts(incident),
        "notes": report.get("notes", []),
    }
    text = render("incident.html", **values)
    if len(text.encode()) > _MAX_BYTES:  # what takes room can be left out; the answer stays
        text = render("incident.html", **{**values, "samples": None})
    return text


def _rows(report: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [row for row in report.get(name, []) if isinstance(row, dict)]


def _heading(incident: Incident) -> str:
    failed, step = incident.about["failed"], incident.about["details"].get("step")
    where = "" if step is None else f" at step {step:,}" if isinstance(step, int) else f" at step {step}"
    losses = [float.fromhex(loss) for loss in incident.about["losses"]]
    bad = next((loss for loss in losses if not math.isfinite(loss)), None)
    if failed == "loss" and bad is not None:
        return f"The loss was {bad:g}{where}"
    if failed == "rejected":
        return f"A batch was rejected{where}"
    return f"The {failed} was not finite{where}"


def _chips(incident: Incident, report: dict[str, Any]) -> list[tuple[str, str]]:
    reproduced, exact = report.get("reproduced"), report.get("exact")
    again = {
        True: ("fails again" + (", with the same loss bits" if exact else ""), "good"),
        False: ("not reproduced", "warn"),
        None: ("not run again", "warn"),
    }[reproduced]
    about, details = incident.about, incident.about["details"]
    chips = [again, (f"precision {about['precision']}", "")]
    if "epoch" in details:
        chips.append((f"epoch {details['epoch']}, batch {details.get('batch_idx', 'unknown')}", ""))
    return [*chips, (f"on {about['environment'].get('device', 'an unknown device')}", "")]


def _answer(report: dict[str, Any]) -> dict[str, Any]:
    causes, origin = _rows(report, "causes"), report.get("origin")
    known = [cause for cause in causes if cause.get("cause") != "unknown"]
    first = known[0] if known else {}
    where = []
    place = first if first.get("file") else origin or {}
    module = first.get("module") if first.get("module") is not None else (origin or {}).get("module")
    if module is not None:
        where.append(("Module", module or "the LightningModule itself"))
    if place.get("file"):
        where.append(("Line", f"{place['file']}:{place['line']}"))
    tensor = first.get("tensor") or (origin or {}).get("tensor")
    if tensor:
        where.append(("Tensor", tensor))
    samples = first.get("samples") or (origin or {}).get("samples") or []
    if samples:
        where.append(("Samples", _listed(samples)))
    if first.get("dataset_indices"):
        where.append(("In the dataset", _listed(first["dataset_indices"])))
    if origin:
        where += [("First bad value", _origin_sentence(origin))] if first else []
        where += [("Went in", _range(values)) for values in origin["inputs"][:3]]
        where.append(("Came out", _range(origin["output"])))
    same_line = origin and (place.get("file"), place.get("line")) == (origin["file"], origin["line"])
    summary = str(first.get("summary") or "")
    return {
        "look": "" if first or origin else "warn",
        "cause": first.get("cause", "unknown" if causes else ""),
        "confidence": first.get("confidence"),
        "headline": f"{summary[:1].upper()}{summary[1:]}." if summary else _headline(report, bool(causes)),
        "code": origin["code"] if origin and (same_line or not first) else "",
        "where": where,
        "evidence": first.get("evidence") or [],
        "remedy": first.get("remedy") or "",
        "others": known[1:5],
        "hint": "" if causes or report.get("reproduced") is None else "No cause was looked for.",
    }


def _headline(report: dict[str, Any], was_looked_for: bool) -> str:
    if report.get("origin"):
        said = f"{_origin_sentence(report['origin'])}."
        return f"{said} Nothing that was tried cures it." if was_looked_for else said
    if report.get("reproduced") is False:
        return "Run again, the step is finite, or fails in another way."
    return "The step could not be run again." if report.get("reproduced") is None else "No operation explains it."


def _origin_sentence(origin: dict[str, Any]) -> str:
    module = f" in `{origin['module']}`" if origin.get("module") else ""
    phase, op, tensor = origin["phase"], origin["op"], origin["tensor"]
    if phase == "input":
        return f"`{tensor}` was not finite when it came from the data loader"
    if phase == "weights" and origin["written"]:
        return f"`{op}`{module} wrote what is not finite into `{tensor}`, outside of the optimizer"
    if phase == "weights":
        return f"`{tensor}` was not finite before the step"
    if phase == "optimizer":
        return f"The optimizer's update made `{tensor}` non-finite, though its gradient was finite"
    if phase == "backward":
        return f"The derivative of `{op}`{module} made the first non-finite value"
    return f"{'The cast to ' + origin['dtype'] if op == 'to' else f'`{op}`'}{module} made the first non-finite value"


def _history(incident: Incident) -> dict[str, Any] | None:
    from lightning_stability.pages.charts import Mark, Series, curves

    rows = [row for row in incident.history if isinstance(row.get("step"), int)]
    if len(rows) < 2:
        return None
    step = incident.about["details"].get("step")
    marks = [Mark(step, "bad")] if isinstance(step, int) else []
    steps = [row["step"] for row in rows] + [int(mark.x) for mark in marks]
    span, charts = (min(steps), max(steps)), []
    for name, key in (("Loss", "loss"), ("Gradient norm, before clipping", "grad_norm"), ("Loss scale", "loss_scale")):
        told = [(row["step"], as_number(row[key])) for row in rows if row.get(key) is not None]
        if told:
            x, y = [at for at, _ in told], [value for _, value in told]
            charts.append((name, curves(name, [Series(x, y)], marks, is_wide_ranging(y), span)))
    caption = f"The last {len(rows):,} steps. The dashed line is the step that went wrong."
    return {"caption": caption, "charts": charts} if charts else None


def _layers(report: dict[str, Any]) -> dict[str, Any] | None:
    from lightning_stability.pages.charts import Limit, ranges

    rows = _rows(report, "layers")
    if not rows:
        return None
    origin = (report.get("origin") or {}).get("module")
    shown = _some(rows, origin)
    formats = {row.get("dtype") for row in rows} | {(report.get("origin") or {}).get("dtype")}
    limits = [Limit(*_LIMITS[name]) for name in ("float16", "bfloat16", "float32") if name in formats]
    ends = " and ".join(
        f"{limit.name} ends at {limit.value:,.0f}" if limit.value < 1e6 else f"{limit.name} at {limit.value:.2g}"
        for limit in limits
    )
    left_out = f" {len(shown)} of {len(rows)} are drawn." if len(shown) < len(rows) else ""
    caption = (
        "What each layer gave in the step that went wrong, in forward order: the size of its values without the sign,"
        f" from the smallest that is not 0 to the largest; the dot is their mean. {ends}.{left_out}"
    )
    spans = [_span(row, row["output"], origin) for row in shown]
    with_gradient = [row for row in shown if row.get("gradient")]
    gradients = [_span(row, row["gradient"], origin) for row in with_gradient]
    return {
        "caption": caption,
        "outputs": ranges("range of every layer's output", spans, limits, "size of the output's values"),
        "gradient_caption": "In the same order; the backward pass came from below.",
        "gradients": ranges("range of the gradients", gradients, limits, "size of the gradient") if gradients else "",
        "rows": [row | row["output"] | {"marked": row["module"] == origin} for row in rows[:1000]],
    }


def _some(rows: list[dict[str, Any]], origin: str | None) -> list[dict[str, Any]]:
    """Of many layers those about the origin, the largest ones, and every so many-th."""
    if len(rows) <= _MOST_SPANS:
        return rows
    center = next((place for place, row in enumerate(rows) if row["module"] == origin), 0)
    kept = set(range(center - 12, center + 13))
    largest = sorted(range(len(rows)), key=lambda place: -(rows[place]["output"]["largest"] or 0.0))
    kept |= set(largest[:10]) | set(range(0, len(rows), math.ceil(len(rows) / 30)))
    return [row for place, row in enumerate(rows) if place in kept]


def _span(row: dict[str, Any], sizes: dict[str, Any], origin: str | None) -> Any:
    from lightning_stability.pages.charts import Span

    low, high, middle = sizes["smallest"], sizes["largest"], sizes["mean"]
    return Span(str(row["module"]), low, high or None, middle, sizes["nonfinite"], row["module"] == origin)


def _counterfactual(row: dict[str, Any]) -> dict[str, Any]:
    seconds = row.get("seconds")
    return {
        "name": row.get("name", ""),
        "change": row.get("change", ""),
        "finite": bool(row.get("finite")),
        "outcome": row.get("outcome") or {True: "finite", False: "not finite"}.get(row.get("finite"), "not run"),  # type: ignore[arg-type]
        "seconds": f"{seconds:.2f}" if isinstance(seconds, (int, float)) else "",
    }


def _excluded(row: dict[str, Any]) -> dict[str, str]:
    return {"name": str(row.get("name", "")), "text": ", ".join(str(row[k]) for k in ("tried", "came") if row.get(k))}


def _repro(folder: Path, repro: Any) -> dict[str, Any] | None:
    if not isinstance(repro, dict):
        return None
    text = _text_of(folder / "repro.py") if repro.get("path") else ""
    mended = _text_of(folder / "repro_mended.py") if repro.get("mended") else ""
    return {
        **{"mended": "", "message": "", "why_not": "it was not asked for"},
        **repro,
        "text": text,
        "difference": _difference(text, mended),
    }


def _difference(before: str, after: str) -> list[tuple[str, str]]:
    """The lines that are others, but for the comment that says so."""
    kinds = {"+ ": "added", "- ": "removed"}
    lines = difflib.ndiff(before.splitlines(), after.splitlines())
    return [(kinds[line[:2]], line) for line in lines if line[:2] in kinds and not line[2:].startswith("# Mended")]


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")[:20_000] if path.is_file() else ""


def _facts(incident: Incident) -> list[tuple[str, str]]:
    about, environment = incident.about, incident.about["environment"]
    settings = environment.get("settings", {})
    names = ("torch", "lightning", "python", "numpy")
    facts = [
        ("Module", about["module"]["class"]),
        ("Hyperparameters", json.dumps(about["module"]["hyperparameters"], default=str)),
        ("Optimizer", f"{about.get('optimizer_class')} {json.dumps(about['optimizer_options'][:1], default=str)}"),
        ("Precision", about["precision"]),
        ("Loss scale", "" if about["loss_scale"] is None else f"{about['loss_scale']:,}"),
        ("Clipping", "" if not about["clip_value"] else f"{about['clip_value']} by {about['clip_algorithm']}"),
        ("Batches", ", ".join(map(str, about["batch_indices"][:20]))),
        ("Device", f"{environment.get('device')} ({environment.get('processor')})"),
        ("Versions", ", ".join(f"{name} {environment[name]}" for name in names if name in environment)),
        ("Settings", ", ".join(f"{name}: {value}" for name, value in settings.items())),
        ("Not kept", "; ".join(f"{name}: {why}" for name, why in incident.left_out.items())),
        ("Folder", str(incident.folder)),
    ]
    return [(name, text) for name, text in facts if text]


def _range(values: dict[str, Any]) -> str:
    name = f"{values['name']}: " if values.get("name") else ""
    bad = f"{values['nonfinite']:,} not finite" if values["nonfinite"] else ""
    if values["min"] is None:
        return name + (bad or "no floating point values")
    same = values["min"] == values["max"]
    finite = f"{values['min']:.4g}" if same else f"{values['min']:.4g} to {values['max']:.4g}"
    return name + finite + (f", and {bad}" if bad else "")


def _listed(numbers: list[Any]) -> str:
    more = f" and {len(numbers) - 12} more" if len(numbers) > 12 else ""
    return ", ".join(map(str, numbers[:12])) + more
