"""The look at what flows through the layers, before the first training step of a fit."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info

from lightning_stability.callbacks.base import warn_always
from lightning_stability.events import EventLog
from lightning_stability.health.layer_scales import LayerScale, LayerScales, Scale, scale_of
from lightning_stability.health.scale_report import ScaleReport
from lightning_stability.health.values import named_tensors
from lightning_stability.recovery.rehearsal import Rehearsal, why_not

FILE_NAME = "input_scales.csv"
_TWICE = ("MixedPrecision", "HalfPrecision")  # in fp32 too


class LayerLook:
    """Looks at the input of every layer, once in a fit, says what it has seen, and leaves the run as it was.

    The first batch is run through `training_step` without gradients before it is trained, in the precision that is
    trained in and, if that has 16 bits, in fp32. Where that cannot be (manual optimization, say), the first training
    step itself is watched, and the report comes after it. All ranks look, the first one says.

    Args:
        max_scale_ratio: A deviation above this, or below one over this, is far from unit scale.
        only_warnings: Whether to say and write nothing where nothing is far from it.
    """

    def __init__(self, max_scale_ratio: float, only_warnings: bool = False) -> None:
        self._max_ratio = max_scale_ratio
        self._only_warnings = only_warnings
        self._watched: LayerScales | None = None
        self._batch: dict[str, Scale] = {}

    def before_step(self, trainer: Any, batch: Any, batch_idx: int, uncast: Any, events: EventLog) -> None:
        """The first batch of the fit is about to be trained.

        Args:
            trainer: The Trainer.
            batch: As `training_step` will get it.
            batch_idx: Its index.
            uncast: The batch before a 16-true precision converted it; None if none did.
            events: Of the run.
        """
        self._batch = _scales(batch if uncast is None else uncast)
        why = why_not(trainer)
        if why is None:
            try:
                trained, exact = self._rehearse(trainer, batch, batch_idx, uncast)
                self._say(trainer, trained, exact, events)
                return
            except Exception as error:  # whatever the user's code raises; if it always does, it will again
                why = f"the batch could not be run beforehand ({_short(error)})"
        if not self._only_warnings:
            rank_zero_info(f"InputCheck: the first training step itself is watched, in {trainer.precision}: {why}.")
        self._watched = LayerScales(trainer.lightning_module)
        self._watched.__enter__()

    def after_step(self, trainer: Any, events: EventLog) -> None:
        """The first batch has been trained; if that was watched, say what was seen.

        Args:
            trainer: The Trainer.
            events: Of the run.
        """
        if self._watched is None:
            return
        watched = self._watched
        self.close()
        try:
            trained = watched.read()
            self._say(trainer, trained, trained if _is_exact(trainer) else None, events)
        except RuntimeError as error:  # of figures that cannot be read, such as those made within `vmap`
            rank_zero_info(f"InputCheck: what reaches the layers could not be seen ({_short(error)}).")

    def close(self) -> None:
        """The fit has ended, perhaps within its first step."""
        if self._watched is not None:
            self._watched.__exit__(None, None, None)
            self._watched = None

    def _say(self, trainer: Any, trained: list[LayerScale], exact: list[LayerScale] | None, events: EventLog) -> None:
        if not trainer.is_global_zero:
            return
        report = ScaleReport(trained, exact, self._batch, self._max_ratio, str(trainer.precision), _limit(trainer))
        warnings = report.warnings()
        if self._only_warnings and not warnings:
            return
        where = ""
        if events.path is not None:
            path = events.path.with_name(FILE_NAME)
            report.write_csv(path)
            where = f"; all of them: {path}"
        if report.rows:
            rank_zero_info(
                f"InputCheck: what the first batch is at {len(report.rows)} layers, in {report.precision}: the first"
                f" and those farthest from unit scale{where}\n{report.table()}"
            )
        else:
            rank_zero_info("InputCheck: no layer was seen in the first batch: they are compiled, or not modules.")
        for sentence in warnings:
            warn_always(f"InputCheck: {sentence}.")
        events.write("input_scales", trainer.global_step, trainer.current_epoch, **report.event())

    def _rehearse(
        self, trainer: Any, batch: Any, batch_idx: int, uncast: Any
    ) -> tuple[list[LayerScale], list[LayerScale] | None]:
        module = trainer.lightning_module
        with Rehearsal(trainer) as rehearsal:
            with LayerScales(module, compiled=rehearsal.runs_uncompiled) as scales:
                rehearsal.run(batch, batch_idx)
            trained = scales.read()
            if type(trainer.precision_plugin).__name__ not in _TWICE:
                return trained, trained if _is_exact(trainer) else None
            try:
                with LayerScales(module, compiled=rehearsal.runs_uncompiled) as scales:
                    rehearsal.run_in_fp32(batch, batch_idx, uncast)
                return trained, scales.read()
            except Exception as error:
                rank_zero_info(
                    f"InputCheck: the first batch could not be run in fp32 ({_short(error)}): the figures are those of"
                    f" {trainer.precision}."
                )
                return trained, None


def _limit(trainer: Any) -> float | None:
    """The largest number of the 16-bit format that is trained in."""
    precision = str(trainer.precision)
    if precision.startswith("bf16"):
        return torch.finfo(torch.bfloat16).max
    return torch.finfo(torch.float16).max if precision.startswith("16") else None


def _is_exact(trainer: Any) -> bool:
    """Whether what is trained in is fp32 or better."""
    return str(trainer.precision) in ("32-true", "64-true")


def _scales(batch: Any) -> dict[str, Scale]:
    scales = {}
    for name, tensor in named_tensors(batch):
        if tensor.is_floating_point() and tensor.numel() and tensor.layout == torch.strided and not tensor.is_nested:
            scales[name] = scale_of(tensor)
    return scales


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
