"""What the diagnosis says of every program of the zoo, against what is known: `python -m tests.zoo.table`.

The rules were made with the programs that are not held out. The figures that are published are of the others.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from lightning_stability.diagnosis.investigation import Findings, investigate
from tests.zoo import catalogue
from tests.zoo.program import Expected
from tests.zoo.recording import record


@dataclass
class Row:
    """One program with one seed.

    Attributes:
        program: Its name.
        seed: Of its places.
        held_out: Whether no rule was made with it.
        expected: The causes that are right.
        found: The first-named cause.
        confidence: Of it.
        cause_right: Whether it is one of the expected ones.
        where_right: Whether it also points to the right place.
        seconds: Of the whole diagnosis.
        misplaced: What it points to instead, as found and expected.
        others: The causes that were named after it.
        remedy: What it proposes.
        summary: What it says.
    """

    program: str
    seed: int
    held_out: bool
    expected: list[str]
    found: str
    confidence: float
    cause_right: bool
    where_right: bool
    seconds: float
    misplaced: dict[str, Any]
    others: list[str]
    remedy: str
    summary: str


class History(pl.Callback):
    """The rows that history.jsonl would have of the steps before."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._loss: float | None = None

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._loss = float(loss.detach()) / (scaler.get_scale() if scaler else 1.0)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        norms = {n: float(p.grad.norm()) for n, p in pl_module.named_parameters() if p.grad is not None}
        total = sum(norm**2 for norm in norms.values()) ** 0.5
        rates = [group["lr"] for group in optimizer.param_groups]
        row = {"loss": self._loss, "grad_norm": total, "grad_norms": norms, "learning_rates": rates}
        self.rows.append({"step": trainer.global_step, **row})


def find(name: str, seed: int) -> tuple[Expected, Findings]:
    """Train a program until it goes wrong, and diagnose that."""
    torch.manual_seed(seed)
    program = catalogue.program(name, seed)
    history = History()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step, _ = record(program, [history])
    assert step is not None, f"{name}: nothing went wrong"
    assert program.expected is not None
    return program.expected, investigate(step, history.rows, budget_seconds=60.0)


def judge(name: str, seed: int) -> Row:
    """The first-named cause against what is known."""
    start = time.monotonic()
    expected, findings = find(name, seed)
    seconds = time.monotonic() - start
    first = findings.causes[0]
    right = first.cause in expected.causes
    misplaced: dict[str, Any] = {}
    if right:
        said = asdict(first) | {"option": first.facts.get("option")}
        misplaced = expected.misplaced(first.cause, said)
    return Row(
        name,
        seed,
        catalogue.held_out(name),
        list(expected.causes),
        first.cause,
        first.confidence,
        right,
        right and not misplaced,
        round(seconds, 2),
        misplaced,
        [cause.cause for cause in findings.causes[1:]],
        first.remedy,
        first.summary,
    )


def summary(rows: list[Row]) -> dict[str, Any]:
    """The figures of some rows."""
    count = max(1, len(rows))
    return {
        "programs": len({row.program for row in rows}),
        "runs": len(rows),
        "cause_right": sum(row.cause_right for row in rows) / count,
        "where_right": sum(row.where_right for row in rows) / count,
        "unknown": sum(row.found == "unknown" for row in rows),
        "median_seconds": statistics.median(row.seconds for row in rows) if rows else 0.0,
        "calibration": [
            {
                "from": low,
                "to": high,
                "runs": len(some),
                "right": sum(row.cause_right for row in some) / max(1, len(some)),
            }
            for low, high in ((0.0, 0.4), (0.4, 0.7), (0.7, 0.9), (0.9, 1.01))
            if (some := [row for row in rows if low <= row.confidence < high])
        ],
    }


def main() -> None:
    """Print the table, and write it as JSON."""
    parser = argparse.ArgumentParser("python -m tests.zoo.table")
    parser.add_argument("programs", nargs="*", help="all by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--split", choices=["open", "held_out", "all"], default="all")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    os.environ["LIGHTNING_STABILITY_CALLBACKS"] = "none"
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    rows = []
    for name in given.programs or catalogue.FAILURES:
        if not given.programs and given.split != "all" and catalogue.held_out(name) != (given.split == "held_out"):
            continue
        for seed in range(given.seeds):
            row = judge(name, seed)
            rows.append(row)
            mark = "  " if row.where_right else "~ " if row.cause_right else "! "
            said = f"{mark}{name:24} {row.expected[0]:20} {row.found:20} {row.confidence:.2f} {row.seconds:5.1f} s"
            print(said, row.misplaced or "", flush=True)
    splits = {"open": [r for r in rows if not r.held_out], "held_out": [r for r in rows if r.held_out]}
    figures = {name: summary(some) for name, some in splits.items() if some}
    print(json.dumps(figures, indent=1))
    if given.json:
        given.json.write_text(json.dumps({"figures": figures, "rows": [asdict(row) for row in rows]}, indent=1))


if __name__ == "__main__":
    main()
