"""Which layers get numbers of a scale that hurts, and which layer makes them so."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_stability.health.layer_scales import LayerScale, Scale

MOST_WARNINGS = 5
NEAR_LIMIT = 10.0
"""A magnitude within this factor of the largest number of a 16-bit format is near it."""

_FIRST, _WORST = 4, 4  # rows of the table on screen
_NAMED = 3  # layers that one warning names
_HOLDS_MASKS = ("Softmax", "LogSoftmax", "Softmax2d")  # what enters these may be -inf or next to it by design
_CSV_SIDES = ("mean", "deviation", "least", "largest")


@dataclass(frozen=True, slots=True)
class Row:
    """One layer, in the precision that is trained in and in fp32.

    Attributes:
        trained: In the precision that is trained in; None if it was not called there.
        exact: In fp32; the same object where that is trained in, None where nobody ran it.
    """

    trained: LayerScale | None
    exact: LayerScale | None

    @property
    def layer(self) -> LayerScale:
        """Whichever there is, the fp32 one before the other."""
        layer = self.exact or self.trained
        assert layer is not None
        return layer


@dataclass(slots=True)
class _Finding:
    """Layers whose input is far from unit scale for one reason: the first of them, and the rest.

    Attributes:
        row: The first.
        side: What of it, "input" or "output".
        cause: The layer that multiplies; None for what is before all layers.
        others: Those that come after it, each as its name and a word on its input.
    """

    row: Row
    side: str
    cause: Row | None
    others: list[tuple[str, str]] = field(default_factory=list)


class ScaleReport:
    """What the layers of a module got from one batch, judged.

    Args:
        trained: In the precision that is trained in, in forward order.
        exact: In fp32; None if nobody ran it.
        batch: The floating tensors of the batch, by name.
        max_ratio: A deviation above this, or below one over this, is far from unit scale.
        precision: What is trained in, in Lightning's words.
        limit: The largest number of that, if it has 16 bits.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_stability.health.layer_scales import LayerScales, scale_of
        >>> net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        >>> _ = nn.init.constant_(net[0].weight, 5000.0), nn.init.zeros_(net[0].bias)
        >>> batch = torch.tensor([[1.0], [-1.0]])
        >>> with LayerScales(net) as scales:
        ...     _ = net(batch)
        >>> report = ScaleReport(scales.read(), scales.read(), {"batch": scale_of(batch)}, 100.0, "32-true")
        >>> report.warnings()
        ['the input of `1` has deviation 5,000; the batch itself has deviation 1.0, so `0` multiplies by 5,000']
    """

    def __init__(
        self,
        trained: list[LayerScale],
        exact: list[LayerScale] | None,
        batch: Mapping[str, Scale],
        max_ratio: float,
        precision: str,
        limit: float | None = None,
    ) -> None:
        self.precision = precision
        self._max_ratio = max_ratio
        self._limit = limit
        self._batch = max(batch.items(), key=lambda item: item[1].abs_max, default=None)
        self._many = len(batch) > 1
        self.rows = list(_paired(trained, exact))
        # of a batch that is not finite itself the layers tell nothing more
        self._findings = list(self._find()) if all(scale.is_finite for scale in batch.values()) else []

    @property
    def format(self) -> str:
        """The 16-bit format's name."""
        return "bf16" if self.precision.startswith("bf16") else "fp16"

    def warnings(self) -> list[str]:
        """One sentence for each cause, the first causes first; the last says how many are left out."""
        sentences = [self._sentence(finding) for finding in self._findings[:MOST_WARNINGS]]
        more = len(self._findings) - MOST_WARNINGS
        if more > 0:
            sentences.append(f"{more} more layer{'s are' if more > 1 else ' is'} like these")
        return sentences

    def event(self) -> dict[str, Any]:
        """What an event says of it."""
        return {
            "precision": self.precision,
            "layers": len(self.rows),
            "far_from_unit_scale": [
                {
                    "layer": finding.row.layer.name,
                    "side": finding.side,
                    "deviation": self._deviation(finding.row, finding.side),
                    "cause": finding.cause.layer.name if finding.cause else None,
                    "factor": _ratio(finding.cause) if finding.cause else None,
                    "others": len(finding.others),
                }
                for finding in self._findings
            ],
        }

    def table(self) -> str:
        """The first layers and the worst ones, as lines of text."""
        worst = sorted(self.rows[_FIRST:], key=self._badness, reverse=True)[:_WORST]
        chosen = {id(row) for row in [*self.rows[:_FIRST], *worst]}
        both = any(row.exact is not row.trained for row in self.rows)
        head = [
            "layer",
            "class",
            "input: deviation",
            *(["in fp32"] if both else []),
            "mean",
            "range",
            "output: deviation",
        ]
        lines = [head]
        for row in self.rows:
            if id(row) in chosen:
                first = (row.trained or row.layer).input
                scales = [first, row.exact.input if row.exact else None] if both else [first]
                shown = row.layer.input
                lines.append(
                    [
                        row.layer.name,
                        row.layer.kind,
                        *(_number(scale.deviation) if scale else "-" for scale in scales),
                        _number(shown.mean) if shown else "-",
                        f"{_number(shown.least)} to {_number(shown.largest)}" if shown else "-",
                        _number(row.layer.output.deviation) if row.layer.output else "-",
                    ]
                )
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def write_csv(self, path: Path) -> None:
        """Write all layers, in forward order.

        Args:
            path: The file; its folder is made if it is missing.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            rows = csv.writer(file)
            figures = [*(f"input_{side}" for side in _CSV_SIDES), "output_deviation"]
            rows.writerow(["layer", "class", "calls", *figures, *(f"fp32_{name}" for name in figures)])
            for row in self.rows:
                layer = row.layer
                rows.writerow([layer.name, layer.kind, layer.calls, *_cells(row.trained), *_cells(row.exact)])

    # What is far from unit scale, and why.

    def _find(self) -> Iterator[_Finding]:
        finding: _Finding | None = None
        cause: Row | None = None
        for row in self.rows:
            if row.layer.kind not in _HOLDS_MASKS and self._is_far(row, "input"):
                reason = cause if self._explains(cause, row) else None
                if finding is not None and (finding.cause is reason or self._is_overflow_alone(row)):
                    finding.others.append((row.layer.name, self._in_short(row)))
                else:
                    finding = _Finding(row, "input", reason)
                    yield finding
            if self._makes_far(row):
                cause = row
        last = self.rows[-1] if self.rows else None
        if last is not None and self._is_far_output(last) and (finding is None or not self._is_far(last, "input")):
            yield _Finding(last, "output", cause)

    def _is_far(self, row: Row, side: str) -> bool:
        scale = getattr(row.layer, side)
        if scale is None:
            return False
        return self._is_out_of_scale(scale.deviation) or not scale.is_finite or self._is_near_limit(row, side)

    def _is_far_output(self, row: Row) -> bool:
        scale = row.layer.output
        return scale is not None and (not scale.is_finite or self._is_near_limit(row, "output"))

    def _is_out_of_scale(self, deviation: float) -> bool:
        return deviation > self._max_ratio or 0.0 < deviation < 1.0 / self._max_ratio

    def _is_near_limit(self, row: Row, side: str) -> bool:
        """Whether the 16-bit format overflows, or is about to."""
        if self._limit is None:
            return False
        scales = [getattr(layer, side) for layer in (row.trained, row.exact) if layer is not None]
        return any(scale is not None and not scale.abs_max < self._limit / NEAR_LIMIT for scale in scales)

    def _makes_far(self, row: Row) -> bool:
        """Whether a layer's output is out of scale, and its input is another scale."""
        output, ratio = row.layer.output, _ratio(row)
        if output is None or not self._is_out_of_scale(output.deviation):
            return False
        return row.layer.input is None or (ratio is not None and self._is_out_of_scale(ratio))

    def _explains(self, cause: Row | None, row: Row) -> bool:
        """Whether a layer's input is of the scale of what an earlier one put out."""
        if cause is None or cause.layer.output is None or row.layer.input is None:
            return False
        there, here = cause.layer.output.deviation, row.layer.input.deviation
        return not here > 0.0 or not self._is_out_of_scale(here / there)

    def _is_overflow_alone(self, row: Row) -> bool:
        """Whether the numbers are fine in fp32 and follow an overflow in the 16-bit format."""
        trained, exact = (layer.input if layer else None for layer in (row.trained, row.exact))
        if trained is None or exact is None or trained.is_finite or not exact.is_finite:
            return False
        return not self._is_out_of_scale(exact.deviation) and exact.abs_max < (self._limit or math.inf) / NEAR_LIMIT

    def _in_short(self, row: Row) -> str:
        if self._is_overflow_alone(row):
            return f"not finite in {self.format}"
        return _number(self._deviation(row, "input"))

    def _deviation(self, row: Row, side: str) -> float:
        scale: Scale = getattr(row.layer, side)
        return scale.deviation

    # In words.

    def _sentence(self, finding: _Finding) -> str:
        sentence = f"the {finding.side} of `{finding.row.layer.name}` {self._what(finding)}{self._why(finding)}"
        if finding.others:
            named = [f"`{name}` ({word})" for name, word in finding.others[: _NAMED - 1]]
            more = len(finding.others) - len(named)
            named += [f"{more} more layer{'s' if more > 1 else ''}"] if more else []
            sentence += f". It reaches {', '.join(named[:-1])}{' and ' if named[:-1] else ''}{named[-1]} too"
        return sentence

    def _what(self, finding: _Finding) -> str:
        row, side = finding.row, finding.side
        scale: Scale = getattr(row.layer, side)
        trained = getattr(row.trained, side, None)
        if not scale.is_finite:
            return "is not finite" + (", in fp32 neither" if row.exact is not None and self._limit is not None else "")
        if not self._is_near_limit(row, side) or self._limit is None:
            return f"has deviation {_number(scale.deviation)}"
        if trained is not None and not trained.is_finite and scale.abs_max < self._limit / NEAR_LIMIT:
            return f"is not finite in {self.format}"
        figure = f"deviation {_number(scale.deviation)}"
        if not self._is_out_of_scale(scale.deviation):
            figure = f"values up to {_number(scale.abs_max)}"
        return f"has {figure}: {self.format} ends at {_number(self._limit)}"

    def _why(self, finding: _Finding) -> str:
        cause = finding.cause
        scale = getattr(finding.row.layer, finding.side)
        itself = ""
        if self._batch is not None:
            name = f"`{self._batch[0]}`" if self._many else "the batch"
            itself = f"; {name} itself has deviation {_number(self._batch[1].deviation)}"
        if cause is not None:
            ratio = _ratio(cause)
            does = "brings it in" if ratio is None else _multiplies(ratio)
            return f"{itself}{', so' if itself else ';'} `{cause.layer.name}` {does}"
        if self._batch is None or not scale.is_finite or self._batch[1].deviation == 0.0:
            return itself
        ratio = scale.deviation / self._batch[1].deviation
        if not self._is_out_of_scale(ratio):
            return itself
        return f"{itself}, so what comes before it {_multiplies(ratio)}"

    def _badness(self, row: Row) -> float:
        scale = row.layer.input
        if scale is None or row.layer.kind in _HOLDS_MASKS:
            return -1.0
        if not scale.is_finite:
            return math.inf
        return abs(math.log(scale.deviation)) if scale.deviation > 0.0 else 0.0


def _paired(trained: Iterable[LayerScale], exact: Iterable[LayerScale] | None) -> Iterator[Row]:
    if exact is None:
        yield from (Row(layer, None) for layer in trained)
        return
    others = {layer.name: layer for layer in exact}
    for layer in trained:
        yield Row(layer, others.pop(layer.name, None))
    yield from (Row(None, layer) for layer in others.values())


def _ratio(row: Row) -> float | None:
    """What a layer multiplies deviations with; None if it has no such number."""
    before, after = row.layer.input, row.layer.output
    if before is None or after is None or not before.deviation > 0.0 or not after.deviation > 0.0:
        return None
    return after.deviation / before.deviation


def _multiplies(ratio: float) -> str:
    return f"multiplies by {_number(ratio)}" if ratio >= 1.0 else f"divides by {_number(1.0 / ratio)}"


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


def _cells(layer: LayerScale | None) -> list[str]:
    if layer is None:
        return [""] * (len(_CSV_SIDES) + 1)
    figures = [getattr(layer.input, side) if layer.input else None for side in _CSV_SIDES]
    figures.append(layer.output.deviation if layer.output else None)
    return ["" if figure is None else f"{figure:.6g}" for figure in figures]
