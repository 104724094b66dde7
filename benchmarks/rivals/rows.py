"""The rows of the comparison: each way as the README of its package says, as callbacks of a Trainer.

A package that is written for a training loop of one's own gets a small callback that calls it where its README does.
What it says of a run is whatever it prints, logs, warns of or raises, and `findings`, what it answers when asked.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
from common.rivals import spike_detection
from pytorch_lightning.callbacks import EarlyStopping

from lightning_stability import (
    GradNormMonitor,
    IncidentReport,
    InputCheck,
    NaNEarlyStop,
    PrecisionFallback,
    SpikeRecovery,
)
from rivals import packages, tracers, watchers

Places = list[str]
"""Names of modules or parameters, and `file:line`, in the order in which they are said."""


@dataclass
class Attached:
    """A way in one run.

    Attributes:
        callbacks: For the Trainer.
        options: More for the Trainer.
        findings: What it says of the run when asked, besides what it prints, logs and raises.
        places: Where it says that something first went wrong; None if it names no places.
        stops: The exceptions by which it ends a run on purpose.
    """

    callbacks: list[pl.Callback] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    findings: Callable[[], str] = str
    places: Callable[[BaseException | None], Places] | None = None
    stops: tuple[str, ...] = ()


@dataclass
class Row:
    """A way of the table.

    Attributes:
        name: In the table.
        make: A fresh one; with True it looks as closely as it can, which is how it is asked for places.
        package: On the index.
        module: That has to be there.
    """

    name: str
    make: Callable[[bool], Attached]
    package: str | None = None
    module: str | None = None

    def missing(self) -> str | None:
        """Why it cannot be run here."""
        if self.module is None or importlib.util.find_spec(self.module) is not None:
            return None
        return f"{self.package} is not installed"

    def version(self) -> str | None:
        """Of its package."""
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(self.package) if self.package else None
        return None


def _bare(closely: bool) -> Attached:
    return Attached()


def _early_stopping(closely: bool) -> Attached:
    stopping = EarlyStopping("loss_epoch", check_on_train_epoch_end=True, patience=10**9, verbose=True)
    return Attached([stopping])


def _spike_detection(closely: bool) -> Attached:
    return Attached([spike_detection()], stops=("TrainingSpikeException",))


def _detect_anomaly(closely: bool) -> Attached:
    options = {"detect_anomaly": True}
    return Attached([], options, places=tracers.lines_of_anomaly, stops=("RuntimeError",))


def _grad_norm(closely: bool) -> Attached:
    return Attached([tracers.LogGradNorms()])


def _clipping(closely: bool) -> Attached:
    return Attached([], {"gradient_clip_val": 1.0})


def _tracer(closely: bool) -> Attached:
    tracer = tracers.ModuleTracer()
    return Attached([tracer], places=lambda error: tracer.places, stops=("NonFiniteOutput",))


def _ours_early_stop(closely: bool) -> Attached:
    return Attached([NaNEarlyStop()])


def _all_ours(closely: bool) -> Attached:
    report = IncidentReport(tempfile.mkdtemp(), budget_seconds=60.0 if closely else 0.0)
    callbacks = [NaNEarlyStop(), PrecisionFallback(), GradNormMonitor(), InputCheck(), SpikeRecovery(), report]
    return Attached(callbacks)


def _of_package(make: Callable[[bool], Any], stops: tuple[str, ...] = ()) -> Callable[[bool], Attached]:
    """A callback with `findings` and maybe `places`, as those of `packages.py` are."""

    def attach(closely: bool) -> Attached:
        with contextlib.redirect_stdout(io.StringIO()):
            callback = make(closely)
        places = (lambda error: list(callback.places())) if hasattr(callback, "places") else None
        findings = getattr(callback, "findings", str)
        return Attached([callback], findings=findings, places=places, stops=stops)

    return attach


BARE = "bare Lightning"
NAN_EARLY_STOP = "**ours:** NaNEarlyStop"
ALL_OURS = "**ours:** all six that act in a step"

ROWS = [
    Row(BARE, _bare),
    Row("EarlyStopping(check_finite=True)", _early_stopping),
    Row("SpikeDetection", _spike_detection),
    Row("Trainer(detect_anomaly=True)", _detect_anomaly),
    Row("grad_norm logged by hand", _grad_norm),
    Row("gradient clipping at 1.0", _clipping),
    Row("module hooks, as Hugging Face's", _tracer),
    Row("nndiagnostics", _of_package(packages.InfCheck), "nndiagnostics", "diagnostics"),
    Row("stabilityguard", _of_package(packages.StabilityGuard), "stabilityguard", "stabilityguard"),
    Row("arc-training, its callback", _of_package(packages.Arc), "arc-training", "arc"),
    Row("arc-training, with the loss", _of_package(packages.ArcWithLoss), "arc-training", "arc"),
    Row("arc-vigil", _of_package(packages.Vigil), "arc-vigil", "arc_vigil"),
    Row("zclip", _of_package(packages.zclip), "zclip", "zclip"),
    Row("trainscope", _of_package(packages.TrainScope), "trainscope", "trainscope"),
    Row("torchmortem", _of_package(packages.TorchMortem), "torchmortem", "torchmortem"),
    Row("nansense", _of_package(packages.nansense), "nansense", "nansense"),
    Row("sherlorch", _of_package(packages.Sherlorch), "sherlorch", "sherlorch"),
    Row("thermoclaw", _of_package(watchers.Thermoclaw), "thermoclaw", "thermoclaw"),
    Row("trainpulse", _of_package(watchers.TrainPulse), "trainpulse", "trainpulse"),
    Row("training-doctor", _of_package(watchers.TrainingDoctor), "training-doctor", "training_doctor"),
    Row("trainwatch", _of_package(watchers.TrainWatch), "trainwatch", "trainwatch"),
    Row(NAN_EARLY_STOP, _ours_early_stop),
    Row(ALL_OURS, _all_ours),
]

ABSENT = {
    "mosaicml 0.32.1 (Composer's NaNMonitor and OptimizerMonitor)": (
        "needs torch < 2.7.1; installed without its dependencies, `import composer` ends with "
        "ModuleNotFoundError: No module named 'torchvision'"
    ),
    "opguard 0.1.0": "RuntimeError: Native builds require CUDA-enabled Torch and the CUDA toolkit; set CUDA_HOME.",
    "nvidia-resiliency-ext 0.4.1": (
        "installs, but looks at no numbers: it restarts processes that hang or die, and needs its own launcher; "
        "0.7.0 has no build for this platform's Python"
    ),
    "losslint, runmedic": "read a log after the run, not the run",
    "optax's apply_if_finite": "is for JAX",
}
"""What is not in the table, and why: found by installing it."""


def rows(names: list[str] | None) -> list[Row]:
    """Those of these names (a part of a name will do), and the bare one."""
    return [row for row in ROWS if names is None or row.name == BARE or any(name in row.name for name in names)]
