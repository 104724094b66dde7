"""Two measurements of one tensor, compared."""

import torch

from lightning_stability.health.input_rules import FIELDS
from lightning_stability.health.inputs import TensorStats


def assert_same_stats(stats: TensorStats, expected: TensorStats) -> None:
    """Fails where they differ by more than fp32's rounding; that of a mean is the values', however small it is."""
    said, mean = stats.row.clone(), FIELDS.index("mean")
    if abs(stats.row[mean] - expected.row[mean]) <= 1e-7 * expected.row[FIELDS.index("abs_max")]:
        said[mean] = expected.row[mean]
    torch.testing.assert_close(said, expected.row, rtol=1e-5, atol=1e-35, equal_nan=True)
    torch.testing.assert_close(stats.samples, expected.samples, rtol=1e-4, atol=1e-35, equal_nan=True)
