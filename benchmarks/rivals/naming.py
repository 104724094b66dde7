"""Whether a way names the place where a program of the zoo goes wrong: the module, or the line.

Read as generously as can be: of a list of places the first or the last may be the right one (a reader may know which
end to look at), a parameter or a part stands for its module, and either the module or the line will do.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision

from lightning_stability.health.values import nonfinite_names
from rivals import tracers
from rivals.rows import Attached
from tests.zoo import catalogue
from tests.zoo.program import Expected, Program
from tests.zoo.table import judge


class StopAfterBad(pl.Callback):
    """Ends the run after the first step whose loss, gradient, weights or buffers are not finite."""

    def __init__(self) -> None:
        self.bad = False
        self.buffers: set[str] = set()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.buffers = set(nonfinite_names(pl_module.named_buffers()))

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        self.bad = self.bad or not math.isfinite(float(loss.detach()))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is None or scaler.get_scale() <= 1.0:  # otherwise it skips the step, as it should
            gradients = ((n, p.grad) for n, p in pl_module.named_parameters() if p.grad is not None)
            self.bad = self.bad or bool(nonfinite_names(gradients))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        names = {*nonfinite_names(pl_module.named_parameters()), *nonfinite_names(pl_module.named_buffers())}
        if self.bad or names - self.buffers:
            trainer.should_stop = True
            trainer.limit_val_batches = 0


def train(program: Program, attached: Attached) -> list[str]:
    """Train until it goes wrong; the places that are named."""
    options: dict[str, Any] = {"precision": program.precision}
    if program.precision == "16-mixed":
        scaler = torch.amp.GradScaler("cpu", init_scale=program.loss_scale)
        options = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
    callbacks = [*attached.callbacks, StopAfterBad()]
    defaults: dict[str, Any] = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "callbacks": callbacks}
    silent = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    raised: BaseException | None = None
    tracers.AnomalyText.text = ""

    def keep(message: Any, *rest: Any) -> None:
        tracers.AnomalyText.text += f"{message}\n"

    log = io.StringIO()
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = keep  # type: ignore[assignment]
        try:
            trainer = pl.Trainer(**(defaults | silent | options | program.options | attached.options))
            trainer.fit(program.module, program.data)
        except Exception as error:
            raised = error
    assert attached.places is not None
    return attached.places(raised)


def is_right(places: list[str], expected: Expected) -> dict[str, bool]:
    """Whether the module, and whether the line is named."""
    modules = [plain(place) for place in places if not is_line(place)]
    wanted = {expected.module, expected.cause_module or expected.module}
    if expected.phase == "weights" or expected.phase == "optimizer":
        wanted |= {(expected.tensor or "").rpartition(".")[0]}
    named = {modules[0], modules[-1]} if modules else set()
    input_named = expected.phase == "input" and bool(places) and places[0].endswith("(its input)")
    try:
        line = f"/{Path(expected.file).name}:{expected.line}"
    except ValueError:  # a flipped bit happens at no line
        line = "/no line"
    return {
        "module": input_named or any(same(module, right) for module in named for right in wanted),
        "line": any(place.endswith(line) for place in places if is_line(place)),
    }


def is_line(place: str) -> bool:
    return place.rpartition(":")[2].isdigit()


def same(module: str, right: str) -> bool:
    """The module, or a part of it."""
    return right != "" and (module == right or module.startswith(f"{right}."))


def plain(place: str) -> str:
    """Without what a tool puts around the name of a module."""
    return place.removesuffix(" (its input)").removeprefix("model.")


def judged(make: Any, names: list[str]) -> dict[str, Any]:
    """What a way names in each program."""
    programs = {}
    for name in names:
        torch.manual_seed(0)
        program = catalogue.program(name, 0)
        assert program.expected is not None
        try:
            places = train(program, make(True))
            error = None
        except Exception as raised:
            places, error = [], f"{type(raised).__name__}: {raised}"[:160]
        right = is_right(places, program.expected)
        shown = [Path(place).name if is_line(place) else place for place in places[:4]]
        programs[name] = {**right, "silent": not places, "places": shown, **({"error": error} if error else {})}
    return counted(programs)


def ours(names: list[str]) -> dict[str, Any]:
    """The same of the diagnosis: its first-named cause, and where it says that it is."""
    programs = {}
    for name in names:
        row = judge(name, 0)
        says = {"module": row.where_right, "line": row.where_right, "cause": row.cause_right}
        programs[name] = {**says, "silent": row.found == "unknown", "places": [row.found]}
    return counted(programs)


def counted(programs: dict[str, Any]) -> dict[str, Any]:
    """How many are right, wrong, silent."""
    right = sum(found["module"] or found["line"] for found in programs.values())
    silent = sum(found["silent"] for found in programs.values())
    count = {"right": right, "silent": silent, "wrong": len(programs) - right - silent, "of": len(programs)}
    return {**count, "programs": programs}
