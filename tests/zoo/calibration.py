"""Confidence against truth, over the first looks at programs that no rule had seen: `python -m tests.zoo.calibration`.

It draws `docs/images/calibration.svg` of the first looks that `benchmarks/results` keeps, by their dates.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]
PLOT = _ROOT / "docs" / "images" / "calibration.svg"
EDGES = (0.4, 0.7, 0.9, 0.96, 1.01)
_SIDE, _MARGIN = 240, 46


@dataclass
class Bucket:
    """Runs whose first-named cause was said about as surely.

    Attributes:
        low: The lowest confidence.
        said: Their mean confidence.
        runs: How many.
        right: Which part of them was right.
    """

    low: float
    said: float
    runs: int
    right: float


def first_looks() -> list[dict[str, Any]]:
    """The rows of all first looks."""
    files = sorted((_ROOT / "benchmarks" / "results").glob("causes_first_look_*.json"))
    return [row for file in files for row in json.loads(file.read_text())["rows"]]


def buckets(rows: list[dict[str, Any]]) -> list[Bucket]:
    """Confidence against truth; `unknown` claims nothing and is left out.

    Args:
        rows: As `tests.zoo.table` writes them.
    """
    found = []
    for low, high in itertools.pairwise(EDGES):
        some = [row for row in rows if low <= row["confidence"] < high]
        if some:
            said = sum(row["confidence"] for row in some) / len(some)
            found.append(Bucket(low, said, len(some), sum(row["cause_right"] for row in some) / len(some)))
    return found


def as_svg(found: list[Bucket]) -> str:
    """A dot for each bucket, as large as it has runs; on the diagonal, confidence is what it says.

    Args:
        found: The buckets.
    """

    def x(value: float) -> float:
        return _MARGIN + _SIDE * (value - 0.4) / 0.6

    def y(value: float) -> float:
        return 20 + _SIDE * (1 - value) / 0.6

    marks = [0.4, 0.6, 0.8, 1.0]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_SIDE + 90} {_SIDE + 70}" width="{_SIDE + 90}" '
        'font-family="sans-serif" font-size="11" fill="#555">',
        f'<rect x="{x(0.4)}" y="{y(1.0)}" width="{_SIDE}" height="{_SIDE}" fill="none" stroke="#999"/>',
        f'<line x1="{x(0.4)}" y1="{y(0.4)}" x2="{x(1)}" y2="{y(1)}" stroke="#999" stroke-dasharray="4 3"/>',
        *(f'<text x="{x(m):.0f}" y="{y(0.4) + 16:.0f}" text-anchor="middle">{m:g}</text>' for m in marks),
        *(f'<text x="{x(0.4) - 6:.0f}" y="{y(m) + 4:.0f}" text-anchor="end">{100 * m:.0f} %</text>' for m in marks),
        f'<text x="{x(0.7):.0f}" y="{y(0.4) + 34:.0f}" text-anchor="middle">confidence said</text>',
        f'<text x="{x(0.42):.0f}" y="{y(0.95):.0f}">runs whose cause was right</text>',
    ]
    for bucket in found:
        place = f'cx="{x(bucket.said):.1f}" cy="{y(bucket.right):.1f}"'
        parts.append(f'<circle {place} r="{3 + bucket.runs**0.5 / 2:.1f}" fill="#3b7dd8" fill-opacity="0.7"/>')
        parts.append(f'<text x="{x(bucket.said) - 14:.0f}" y="{y(bucket.right) + 20:.0f}">{bucket.runs}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    """Draw the plot, and print its numbers."""
    found = buckets(first_looks())
    PLOT.write_text(as_svg(found))
    for bucket in found:
        print(f"{bucket.low:.2f} and more: said {bucket.said:.2f}, right {bucket.right:.2f} of {bucket.runs}")


if __name__ == "__main__":
    main()
