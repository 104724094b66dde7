"""What the probe is measured by: per window, and per recording after averaging its windows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryAUROC,
    BinaryAveragePrecision,
    BinaryCohenKappa,
    BinaryF1Score,
    BinaryStatScores,
)


class BinaryBalancedAccuracy(BinaryStatScores):
    r"""Mean of sensitivity and specificity, :math:`\frac{1}{2}(\frac{TP}{TP+FN} + \frac{TN}{TN+FP})`, in [0, 1].

    Source: Brodersen et al., "The balanced accuracy and its posterior distribution", ICPR 2010. A class that does not
    occur is left out of the mean, as scikit-learn does.

    Shape:
        - ``preds``: (windows,), probabilities of the positive class; ``target``: (windows,), 0 or 1.

    Example::

        >>> BinaryBalancedAccuracy()(torch.tensor([0.9, 0.8, 0.2, 0.7]), torch.tensor([1, 1, 0, 0]))
        tensor(0.7500)
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        tp, fp, tn, fn, _ = super().compute().float()
        return torch.stack([tp / (tp + fn), tn / (tn + fp)]).nanmean()


def binary_metrics() -> MetricCollection:
    """AUROC, AUPRC, balanced accuracy, accuracy, Cohen's kappa and F1 of probabilities, at a threshold of 0.5."""
    return MetricCollection(
        {
            "auroc": BinaryAUROC(),
            "auprc": BinaryAveragePrecision(),
            "balanced_accuracy": BinaryBalancedAccuracy(),
            "accuracy": BinaryAccuracy(),
            "kappa": BinaryCohenKappa(),
            "f1": BinaryF1Score(),
        }
    )


class RecordingAverage(Metric):
    """Mean probability of each recording over its windows.

    The state is three numbers for each recording, whatever the number of windows.

    Args:
        recordings: How many recordings there may be.
        kwargs: Of :class:`torchmetrics.Metric`.

    Example::

        >>> average = RecordingAverage(3)
        >>> average.update(torch.tensor([0.2, 0.4, 0.9]), torch.tensor([0, 0, 1]), torch.tensor([2, 2, 0]))
        >>> average.compute()
        tensor([[0.0000, 0.9000, 1.0000],
                [2.0000, 0.3000, 0.0000]])
    """

    full_state_update = False
    total: Tensor
    windows: Tensor
    positive: Tensor

    def __init__(self, recordings: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("total", "windows", "positive"):
            self.add_state(name, torch.zeros(recordings), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, recording: Tensor) -> None:
        """Add windows.

        Args:
            preds: Probabilities, (windows,).
            target: 0 or 1, (windows,).
            recording: Indices below ``recordings``, (windows,).
        """
        self.total.index_add_(0, recording, preds.float())
        self.windows.index_add_(0, recording, torch.ones_like(preds, dtype=torch.float32))
        self.positive.index_add_(0, recording, target.float())

    def compute(self) -> Tensor:
        """Return a row for each recording seen: its index, its mean probability and its label, float32."""
        seen = self.windows.nonzero().flatten()
        windows = self.windows[seen]
        # one tensor of rows: torchmetrics would squeeze three results of a single recording to scalars
        return torch.stack([seen.float(), self.total[seen] / windows, (self.positive[seen] / windows).round()], dim=1)
