"""The layer scale check: what reaches each layer in the first training step of a fit, and who makes it too large."""

from __future__ import annotations

import csv
import io
import math
from typing import Any

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info

from lightning_stability.atomic import replace_file
from lightning_stability.callbacks.base import warn_always
from lightning_stability.events import EventLog
from lightning_stability.health.layer_scales import LayerScale, LayerScales, Scale, scale_of
from lightning_stability.health.scale_findings import HOLDS_MASKS, ScaleFinding, UnitScale
from lightning_stability.health.values import named_tensors
from lightning_stability.internals import has_own_dispatch

FILE_NAME = "input_scales.csv"
MOST_WARNINGS = 5
_FIRST, _WORST = 4, 4  # rows of the table on screen
_NAMED = 3  # layers that one warning names
_SIDES = ("mean", "std", "least", "largest")
_COLUMNS = (
    "layer", "class", "calls", "input_mean", "input_deviation", "input_least", "input_largest", "output_deviation",
)  # fmt: skip


class LayerCheck:
    """Measures the input of every layer in the first training step, by forward hooks, and says what it has seen.

    With `only_warnings` nothing is said or written where nothing is far from unit scale. The first rank alone measures.
    """

    def __init__(self, trainer: Any, max_scale_ratio: float, only_warnings: bool = False) -> None:
        precision = str(trainer.precision)
        name = "bf16" if precision.startswith("bf16") else "fp16" if precision.startswith("16") else ""
        limit = {"bf16": torch.finfo(torch.bfloat16).max, "fp16": torch.finfo(torch.float16).max}.get(name)
        self._trainer = trainer
        self._unit = UnitScale(max_scale_ratio, limit)
        self._format = name
        self._only_warnings = only_warnings
        self._watched: LayerScales | None = None
        self._batch: dict[str, Scale] = {}

    def start(self, batch: Any) -> None:
        """The first batch, as it was before a 16-true precision converted it, is about to be trained."""
        if self._trainer.is_global_zero:
            self._batch = {name: scale_of(tensor) for name, tensor in named_tensors(batch) if _has_scale(tensor)}
            self._watched = LayerScales(self._trainer.lightning_module)
            self._watched.__enter__()

    def finish(self, events: EventLog, failed: bool = False) -> None:
        """The forward pass is over, or has raised: say what was seen, once."""
        if self._watched is None:
            return
        watched = self._watched
        self.close()
        try:
            layers = watched.read()
        except RuntimeError as error:  # of figures that cannot be read, such as those made within `vmap`
            reason = (str(error).splitlines() or [""])[0]
            rank_zero_info(f"InputCheck: what reaches the layers could not be seen ({reason}).")
            return
        if failed and not layers:
            return
        # of a batch that is not finite itself the layers tell nothing more
        is_finite = all(scale.is_finite for scale in self._batch.values())
        findings = list(self._unit.findings(layers)) if is_finite else []
        if findings or not self._only_warnings:
            self._report(layers, findings, events)

    def close(self) -> None:
        """Measure no more; the fit may have ended within its first step."""
        if self._watched is not None:
            self._watched.__exit__(None, None, None)
            self._watched = None

    def _report(self, layers: list[LayerScale], findings: list[ScaleFinding], events: EventLog) -> None:
        precision, where = str(self._trainer.precision), ""
        if events.path is not None:
            path = events.path.with_name(FILE_NAME)
            try:
                replace_file(path, lambda file: file.write(_csv(layers)))
                where = f"; all of them: {path}"
            except OSError as error:  # the run goes before its record
                warn_always(f"InputCheck: {path} cannot be written ({error}). Training continues without it.")
        if layers:
            rank_zero_info(
                f"InputCheck: measured {len(layers)} layers in the first batch, in {precision}: the first and those"
                f" farthest from unit scale{where}\n{_table(layers)}"
            )
        else:
            rank_zero_info("InputCheck: no layer was seen in the first batch: they are compiled, or not modules.")
        for finding in findings[:MOST_WARNINGS]:
            warn_always(f"InputCheck: {self._sentence(finding)}.")
        if (more := len(findings) - MOST_WARNINGS) > 0:
            warn_always(f"InputCheck: {more} more layer{'s are' if more > 1 else ' is'} like these.")
        events.write(
            "input_scales",
            self._trainer.global_step,
            self._trainer.current_epoch,
            precision=precision,
            layers=len(layers),
            far_from_unit_scale=[
                {
                    "layer": finding.layer.name,
                    "side": finding.side,
                    "deviation": finding.scale.std,
                    "cause": finding.cause.name if finding.cause else None,
                    "factor": finding.cause.ratio if finding.cause else None,
                    "others": len(finding.others),
                }
                for finding in findings
            ],
        )

    def _sentence(self, finding: ScaleFinding) -> str:
        sentence = f"the {finding.side} of `{finding.layer.name}` {self._what(finding.scale)}{self._why(finding)}"
        if finding.others:
            named = [f"`{layer.name}` ({_in_short(layer.input)})" for layer in finding.others[: _NAMED - 1]]
            more = len(finding.others) - len(named)
            named += [f"{more} more layer{'s' if more > 1 else ''}"] if more else []
            sentence += f". It reaches {', '.join(named[:-1])}{' and ' if named[:-1] else ''}{named[-1]} too"
        return sentence

    def _what(self, scale: Scale) -> str:
        end = "" if self._unit.limit is None else f": {self._format} ends at {_number(self._unit.limit)}"
        if not scale.is_finite:
            return f"is not finite{end}"
        if not self._unit.is_near_limit(scale):
            return f"has std {_number(scale.std)}"
        if self._unit.is_off(scale.std):
            return f"has std {_number(scale.std)}{end}"
        return f"has values up to {_number(scale.abs_max)}{end}"

    def _why(self, finding: ScaleFinding) -> str:
        cause, itself, batch_std = finding.cause, "", 0.0
        if self._batch:
            name, scale = max(self._batch.items(), key=lambda item: item[1].abs_max)
            batch_std, which = scale.std, f"`{name}`" if len(self._batch) > 1 else "the batch"
            itself = f"; {which} itself has std {_number(batch_std)}"
        if cause is not None:
            return f"{itself}{', so' if itself else ';'} `{cause.name}` {_does(cause)}"
        if not finding.scale.is_finite or not batch_std > 0.0 or not self._unit.is_off(finding.scale.std / batch_std):
            return itself
        return f"{itself}, so what comes before it {_multiplies(finding.scale.std / batch_std)}"


def _has_scale(tensor: torch.Tensor) -> bool:
    if has_own_dispatch(tensor) and not hasattr(tensor, "to_local"):
        return False
    is_plain = tensor.layout == torch.strided and not tensor.is_nested
    return bool(tensor.is_floating_point() and is_plain and tensor.numel())


def _does(cause: LayerScale) -> str:
    if cause.output is not None and not cause.output.is_finite:
        return "returns values that are not finite"
    return "brings it in" if cause.ratio is None else _multiplies(cause.ratio)


def _multiplies(ratio: float) -> str:
    return f"multiplies by {_number(ratio)}" if ratio >= 1.0 else f"divides by {_number(1.0 / ratio)}"


def _in_short(scale: Scale | None) -> str:
    return _number(scale.std) if scale is not None and scale.is_finite else "not finite"


def _table(layers: list[LayerScale]) -> str:
    """The first layers and the worst ones, as lines of text."""
    worst = sorted(layers[_FIRST:], key=_distance, reverse=True)[:_WORST]
    chosen = {layer.name for layer in [*layers[:_FIRST], *worst]}
    lines = [["layer", "class", "input: std", "mean", "range", "output: std"]]
    for layer in layers:
        if layer.name in chosen:
            scale = layer.input
            figures = ["-"] * 3
            if scale is not None:
                span = f"{_number(scale.least)} to {_number(scale.largest)}"
                figures = [_number(scale.std), _number(scale.mean), span]
            lines.append([layer.name, layer.kind, *figures, _number(layer.output.std) if layer.output else "-"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    justify = [str.ljust, str.ljust, *[str.rjust] * 4]
    return "\n".join(
        "  ".join(fit(cell, width) for fit, cell, width in zip(justify, line, widths, strict=True)).rstrip()
        for line in lines
    )


def _distance(layer: LayerScale) -> float:
    """How far a layer's input is from unit scale."""
    if layer.input is None or layer.kind in HOLDS_MASKS:
        return -1.0
    if not layer.input.is_finite:
        return math.inf
    return abs(math.log(layer.input.std)) if layer.input.std > 0.0 else 0.0


def _number(value: float) -> str:
    """A number as one would say it: 47,081 and 1.0 and 0.0012."""
    size = abs(value)
    if not math.isfinite(value) or size == 0.0:
        return f"{value:g}"
    if size >= 1e9 or size < 1e-3:
        return f"{value:.2g}"
    if size >= 1e3:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size > 0.95 else f"{value:.2g}"


def _csv(layers: list[LayerScale]) -> bytes:
    """All layers, in forward order."""
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(_COLUMNS)
    for layer in layers:
        figures = [getattr(layer.input, side, None) for side in _SIDES] + [getattr(layer.output, "std", None)]
        cells = ["" if figure is None else f"{figure:.6g}" for figure in figures]
        rows.writerow([layer.name, layer.kind, layer.calls, *cells])
    return text.getvalue().encode()
