"""Packages of the index that are written for a training loop of one's own, called where their READMEs call them.

Each has `findings`, what it says of the run when asked at the end, and those that name places have `places`.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor


class OfLoss(pl.Callback):
    """Keeps the loss of the step, without the loss scale."""

    loss = float("nan")

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.loss = float(loss.detach()) / (scaler.get_scale() if scaler else 1.0)


class InfCheck(pl.Callback):
    """nndiagnostics: the hooks of icefall that warn of each module whose output or gradient is not finite."""

    def __init__(self, closely: bool) -> None:
        self.said: list[str] = []
        self.handler = _Keep(self.said)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        from diagnostics.hooks import register_inf_check_hooks  # type: ignore[import-not-found]

        logging.getLogger().addHandler(self.handler)
        register_inf_check_hooks(pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        logging.getLogger().removeHandler(self.handler)

    def findings(self) -> str:
        return "\n".join(self.said)

    def places(self) -> list[str]:
        return [re.sub(r"\.(output|grad|param_grad)(\[\d+\])?$", "", text.split()[3]) for text in self.said]


class _Keep(logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__()
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


class StabilityGuard(pl.Callback):
    """`GuardedOptimizer` around the optimizer."""

    def __init__(self, closely: bool) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.said = io.StringIO()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        from stabilityguard import GuardedOptimizer

        options = {"nan_action": "skip", "log_dir": self.folder.name}
        with contextlib.redirect_stdout(self.said):
            guarded = GuardedOptimizer(trainer.optimizers[0], pl_module, **options)

        self.step = trainer.optimizers[0].step
        inside = False

        def step(closure: Callable[[], Any] | None = None) -> Any:
            nonlocal inside
            if inside:  # the guard's own call
                return self.step(closure)
            loss = None if closure is None else closure()
            inside = True
            try:
                with contextlib.redirect_stdout(self.said):
                    guarded.step(loss=None if loss is None else float(loss))
            finally:
                inside = False
            return loss

        trainer.optimizers[0].step = step
        self.guarded = guarded

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if hasattr(self, "guarded"):
            self.guarded._hook_manager.detach()

    def findings(self) -> str:
        return self.said.getvalue()

    def places(self) -> list[str]:
        return re.findall(r"Trigger layer[ \t]*:\x1b\[\w+[ \t]*([\w.]+)", self.findings())


def Arc(closely: bool) -> Any:
    """arc-training's own callback."""
    from arc.api.integrations import LightningCallback  # type: ignore[import-not-found]

    class Callback(LightningCallback):  # type: ignore[misc]
        def findings(self) -> str:
            return _failures(self.controller)

        def places(self) -> list[str]:
            return _named(self.findings())

    return Callback()


class ArcWithLoss(OfLoss):
    """`arc.Controller` as in its quick start: it is handed the loss, and says whether to skip."""

    controller: Any = None

    def __init__(self, closely: bool) -> None:
        pass

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        import arc

        config = arc.ControllerConfig(external_grad_scaler=trainer.precision.startswith("16"))
        self.controller = arc.Controller(pl_module, trainer.optimizers[0], config=config)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.controller.step(torch.tensor(self.loss)).should_skip:
            for parameter in pl_module.parameters():
                parameter.grad = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.controller.close()

    def findings(self) -> str:
        return _failures(self.controller)

    def places(self) -> list[str]:
        return _named(self.findings())


def _failures(controller: Any) -> str:
    return "" if controller is None else "\n".join(f"failure: {entry}" for entry in controller.intervention_log)


def _named(text: str) -> list[str]:
    return re.findall(r"(?:layer|module|param\w*)'?\"?\s*[:=]\s*'?\"?([\w.]+)", text)


class Vigil(OfLoss):
    """arc-vigil: observes before the forward pass, and intervenes."""

    def __init__(self, closely: bool) -> None:
        self.step = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        from arc_vigil import BendexConfig, BendexIntervention, BendexMonitor  # type: ignore[import-not-found]

        children = list(pl_module.children())
        model = children[0] if len(children) == 1 else pl_module  # it watches and freezes direct children
        self.monitor = BendexMonitor(model, config=BendexConfig())
        self.intervention = BendexIntervention(model, trainer.optimizers[0])

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.intervention.step(self.monitor.observe(self.step), self.step)
        self.step += 1

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.intervention.apply_grad_clip()

    def findings(self) -> str:
        return "\n".join(f"instability: {event}" for event in self.monitor.events)

    def places(self) -> list[str]:
        return [str(value) for event in self.monitor.events for key, value in event.items() if "module" in key]


def zclip(closely: bool) -> Any:
    """Its own callback."""
    from zclip import ZClipLightningCallback  # type: ignore[import-not-found]

    return ZClipLightningCallback(alpha=0.97, z_thresh=2.5)


class TrainScope(OfLoss):
    """Records every layer between the backward pass and the update."""

    def __init__(self, closely: bool) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="trainscope-"))
        self.nonfinite: list[str] = []
        self.spikes: list[str] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        import trainscope  # type: ignore[import-not-found]
        from trainscope.core.config import TrainScopeConfig  # type: ignore[import-not-found]

        config = TrainScopeConfig(run_dir=str(self.folder), run_name="run")
        self.scope = trainscope.TrainScope(pl_module, trainer.optimizers[0], config=config).attach()
        self.scope._callbacks.append(self)  # what its browser shows of the layers is handed to its callbacks

    def on_step(self, overall: Any, layers: dict[str, Any]) -> None:
        bad = [name for name, layer in layers.items() if layer["grad_nan_inf_ratio"] > 0]
        self.nonfinite = self.nonfinite or bad

    def on_spike(self, spike: Any, overall: Any, layers: Any) -> None:
        self.spikes.append(f"spike: {spike}")

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.scope.step(self.loss)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if hasattr(self, "scope"):
            self.scope.detach()

    def findings(self) -> str:
        from trainscope.report import build_report, render  # type: ignore[import-not-found]

        said = list(self.spikes)
        with contextlib.suppress(Exception):
            said.append(render(asyncio.run(build_report(self.folder / "run", False)), False, "markdown"))
        return "\n".join([*said, *(f"gradient not finite: {name}" for name in self.nonfinite)])

    def places(self) -> list[str]:
        return self.nonfinite


class TorchMortem(pl.Callback):
    """`Autopsy` around the loop, and its report's findings."""

    def __init__(self, closely: bool) -> None:
        self.sampling = "thorough" if closely else "balanced"

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        from torchmortem import Autopsy  # type: ignore[import-not-found]

        self.autopsy = Autopsy(pl_module, optimizer=trainer.optimizers[0], sampling=self.sampling)
        self.autopsy.attach()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.autopsy.step(loss=float(outputs["loss"]) if outputs else float("nan"))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if hasattr(self, "autopsy"):
            self.autopsy.detach()

    def _found(self) -> list[Any]:
        report = getattr(self.autopsy, "_report", None)
        return [] if report is None else list(report.findings)

    def findings(self) -> str:
        return "\n".join(f"{found.title}: {found.summary}" for found in self._found())

    def places(self) -> list[str]:
        return [layer for found in self._found() for layer in found.affected_layers]


def nansense(closely: bool) -> Any:
    """Its own callback, without its web page: where it pauses for a person, the run is ended."""
    from nansense import session as sessions  # type: ignore[import-not-found]
    from nansense.lightning import NansenseCallback  # type: ignore[import-not-found]

    sessions._UNSERVED_PAUSE_TIMEOUT = 0.01

    class Callback(NansenseCallback):  # type: ignore[misc]
        error: Any = None

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_fit_start(trainer, pl_module)
            self.session.step_run()
            if closely:
                self.session.set_debug_settings(interval=1)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            self.error = self.error or self.session._debug_error
            if self.error is not None and not closely:
                trainer.should_stop = True

        def findings(self) -> str:
            return "" if self.error is None else f"numerical issue: {self.error}"

        def places(self) -> list[str]:
            return [] if self.error is None else [report.layer for report in self.error.layers]

    return Callback(open_browser=False)


class Sherlorch(pl.Callback):
    """Traces every step; where the loss is not finite it says which operation was the first."""

    def __init__(self, closely: bool) -> None:
        self.closely = closely
        self.tracker: Any = None
        self.report: Any = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        import sherlorch  # type: ignore[import-not-found]

        self.tracker = sherlorch.trace(capture_stack=self.closely)
        self.tracker.__enter__()
        self.tracker.watch(pl_module, name="model")

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        if self.report is None and self.tracker.has_issue(loss):
            with contextlib.suppress(KeyError):
                self.report = self.tracker.diagnose(loss)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._leave()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._leave()

    def _leave(self) -> None:
        if self.tracker is not None:
            self.tracker.__exit__(None, None, None)
            self.tracker = None

    def findings(self) -> str:
        return "" if self.report is None else str(self.report)

    def places(self) -> list[str]:
        if self.report is None:
            return []
        found = [(node.location, node.module_path) for node in self.report.culprits]
        return [place for pair in found for place in pair if place]
