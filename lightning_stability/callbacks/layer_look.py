"""The look at what flows through the layers, before the first training step of a fit."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_stability.health.layer_scales import LayerScale, LayerScales, Scale, scale_of
from lightning_stability.health.scale_report import ScaleReport
from lightning_stability.health.values import named_tensors
from lightning_stability.recovery.rehearsal import Rehearsal, why_not

_TWICE = ("MixedPrecision", "HalfPrecision")  # in fp32 too


class LayerLook:
    """Looks at the input of every layer, once in a fit, and leaves the run as it was.

    The first batch is run through `training_step` without gradients before it is trained, in the precision that is
    trained in and, if that has 16 bits, in fp32. Where that cannot be (manual optimization, say), the first training
    step itself is watched, and the report comes after it.

    Args:
        max_scale_ratio: A deviation above this, or below one over this, is far from unit scale.
    """

    def __init__(self, max_scale_ratio: float) -> None:
        self._max_ratio = max_scale_ratio
        self._watched: LayerScales | None = None
        self._batch: dict[str, Scale] = {}

    def before_step(self, trainer: Any, batch: Any, batch_idx: int, uncast: Any = None) -> ScaleReport | None:
        """The first batch of the fit is about to be trained.

        Args:
            trainer: The Trainer.
            batch: As `training_step` will get it.
            batch_idx: Its index.
            uncast: The batch before a 16-true precision converted it, if it was kept.

        Returns:
            What was seen; None if the step itself has to be watched.
        """
        why = why_not(trainer)
        self._batch = _scales(batch if uncast is None else uncast)
        if why is None:
            try:
                trained, exact = self._rehearse(trainer, batch, batch_idx, uncast)
                return self._report(trainer, trained, exact)
            except Exception as error:  # whatever the user's code raises, and what it raises there is raised again
                lines = str(error).splitlines() or [""]
                why = f"`training_step` could not be run beforehand ({type(error).__name__}: {lines[0]})"
        rank_zero_info(f"InputCheck: the first training step itself is watched, in {trainer.precision}: {why}.")
        self._watched = LayerScales(trainer.lightning_module)
        self._watched.__enter__()
        return None

    def after_step(self, trainer: Any) -> ScaleReport | None:
        """The first batch has been trained.

        Args:
            trainer: The Trainer.

        Returns:
            What was seen, if the step was watched.
        """
        if self._watched is None:
            return None
        watched, self._watched = self._watched, None
        watched.__exit__(None, None, None)
        return self._report(trainer, watched.read(), None)

    def close(self) -> None:
        """The fit has ended, perhaps within its first step."""
        if self._watched is not None:
            self._watched.__exit__(None, None, None)
            self._watched = None

    def _rehearse(
        self, trainer: Any, batch: Any, batch_idx: int, uncast: Any
    ) -> tuple[list[LayerScale], list[LayerScale] | None]:
        module = trainer.lightning_module
        with Rehearsal(trainer) as rehearsal:
            with LayerScales(module, compiled=rehearsal.runs_uncompiled) as scales:
                rehearsal.run(batch, batch_idx)
            trained = scales.read()
            if type(trainer.precision_plugin).__name__ not in _TWICE:
                return trained, trained if str(trainer.precision) in ("32-true", "64-true") else None
            try:
                with LayerScales(module, compiled=rehearsal.runs_uncompiled) as scales:
                    rehearsal.run_in_fp32(batch, batch_idx, uncast)
                return trained, scales.read()
            except Exception as error:
                lines = str(error).splitlines() or [""]
                rank_zero_info(
                    f"InputCheck: the first batch could not be run in fp32 ({type(error).__name__}: {lines[0]}): the"
                    f" figures are those of {trainer.precision}."
                )
                return trained, None

    def _report(self, trainer: Any, trained: list[LayerScale], exact: list[LayerScale] | None) -> ScaleReport:
        return ScaleReport(trained, exact, self._batch, self._max_ratio, str(trainer.precision), _limit(trainer))


def _limit(trainer: Any) -> float | None:
    """The largest number of the 16-bit format that is trained in."""
    precision = str(trainer.precision)
    if precision.startswith("bf16"):
        return torch.finfo(torch.bfloat16).max
    return torch.finfo(torch.float16).max if precision.startswith("16") else None


def _scales(batch: Any) -> dict[str, Scale]:
    floating = {n: t for n, t in named_tensors(batch) if t.is_floating_point() and t.numel() and _is_plain(t)}
    return {name: scale_of(tensor) for name, tensor in floating.items()}


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested
