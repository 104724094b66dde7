"""The record of one optimizer step, as the host reads it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Verdict = Literal["finite", "nan", "inf", "overflow"]

FP32_LARGEST_NORM = math.sqrt(float(np.finfo(np.float32).max))
"""Above this norm the sum of squares overflows fp32, and Adam's second moment with it."""

FP64_LARGEST_NORM = math.sqrt(float(np.finfo(np.float64).max))
"""The same in float64."""


@dataclass(slots=True, eq=False)
class StepRecord:
    """What one optimizer step's tensors said. Gradients are the true ones: unscaled, accumulated, unclipped.

    Attributes:
        step: Optimizer steps completed before this one (`trainer.global_step`).
        logger_step: The step under which Lightning logs this step's metrics.
        epoch: The epoch in which it was taken.
        optimizer: The optimizer's index in `trainer.optimizers`.
        batches: Batches whose gradients it accumulated.
        parameter_names: The trained parameters.
        grad_norms: The L2 norm of each one's gradient; 0 where it got none.
        gradients: `"finite"`; `"nan"`; `"inf"`; or `"overflow"` when every element is finite but the fp32 sum
            of squares is not.
        loss: The mean loss of the batches; None without a backward pass.
        loss_scale: The GradScaler's scale during the step; None without one.
        learning_rates: One for each of the optimizer's parameter groups.
        clip_coefficient: What clipping by norm multiplied the gradients with; None where Lightning's was not
            used.
        skipped_by: Who skipped the update: `"GradScaler"`, `"guard"`, `"held"` (an earlier step waits for an answer),
            `"rejected"`, `"spike"`, `"no loss"`; None if it was applied.
        outcome: `"applied"`; `"ordinary_skip"`, which GradScaler answers by halving; `"bad"`; `"rejected"`, whose input
            was flagged, whatever the step came to; `"spike"`, above a limit; `"held"`, skipped because of an earlier
            step; `"no_loss"`.
        bad_option: An option of the optimizer that was not finite, such as `lr=nan`.
        exception: What raised what on a batch that was skipped for it.
        batch_losses: The loss of each batch, 0-dimensional tensors where they were made.
        restored: Parameters and buffers that were found non-finite after a bad step, and restored from a copy.
        not_restored: Those that are non-finite, and of which there is no copy.
        batch_idx: The batch, counted in its epoch: the first whose loss is not finite, else the step's last.
        batch_number: The same batch, counted over the whole run, from 1.
        nonfinite_buffer: A buffer that the forward pass made non-finite; it has been restored.
        bad_loss_ranks: The ranks whose loss was not finite.
        culprit: The parameter whose gradient went bad first, if it is known: the last one in forward order, for
            what is behind it was finite.
        buffer_index: Where the guard keeps the non-finite buffer.
        largest_norm: Above it the sum of squares overflows: in fp32, or in float64 where all gradients are.
        weight_norms: The L2 norm of each parameter before the update, if a policy asked for it.
        update_norms: The L2 norm of each parameter's change, if a policy asked for it.

    Example:
        >>> import numpy as np
        >>> record = StepRecord(3, 3, 0, 0, 1, ("weight", "bias"), np.array([3.0, 4.0]), loss=0.5)
        >>> record.total_norm, record.outcome
        (5.0, 'applied')
    """

    step: int
    logger_step: int
    epoch: int
    optimizer: int
    batches: int
    parameter_names: tuple[str, ...]
    grad_norms: Floats
    gradients: Verdict = "finite"
    loss: float | None = None
    loss_scale: float | None = None
    learning_rates: tuple[float, ...] = ()
    clip_coefficient: float | None = None
    skipped_by: str | None = None
    weight_norms: Floats | None = None
    update_norms: Floats | None = None
    outcome: str = "applied"
    batch_idx: int = 0
    batch_number: int = 0
    nonfinite_buffer: str | None = None
    bad_loss_ranks: tuple[int, ...] = ()
    culprit: str | None = None
    buffer_index: int | None = None
    bad_option: str | None = None
    exception: str | None = None
    batch_losses: tuple[Any, ...] = ()
    restored: list[str] = field(default_factory=list)
    not_restored: list[str] = field(default_factory=list)
    largest_norm: float = FP32_LARGEST_NORM
    total_norm: float = field(init=False)

    def __post_init__(self) -> None:
        # hypot-like scaling is not needed: a float64 square of anything below 1e150 is finite.
        self.total_norm = math.sqrt(float(np.dot(self.grad_norms, self.grad_norms)))
        if self.gradients == "finite":
            self.gradients = _verdict(self.total_norm, self.largest_norm)

    @property
    def gradients_finite(self) -> bool:
        """Whether the gradients, and the sum of their squares in fp32, are finite."""
        return self.gradients == "finite"

    @property
    def loss_finite(self) -> bool:
        """Whether every loss that went into the step was finite. True if there was none."""
        return self.loss is None or math.isfinite(self.loss)


class ParameterGroups:
    """Which parameters belong together, by the leading components of their names.

    `group_depth` counts the components of the module's path: with depth 2, `encoder.blocks.0.attn.weight`
    belongs to `encoder.blocks` and `head.weight` to `head`. A parameter of the root module is its own group.

    Args:
        parameter_names: The names, as in a `StepRecord`.
        group_depth: Components of the module's path that make a group's name; at least 1.

    Example:
        >>> import numpy as np
        >>> groups = ParameterGroups(("enc.a.weight", "enc.a.bias", "head.weight"), group_depth=1)
        >>> groups.names
        ('enc', 'head')
        >>> groups.norms(np.array([3.0, 4.0, 2.0])).tolist()
        [5.0, 2.0]
    """

    def __init__(self, parameter_names: tuple[str, ...], group_depth: int) -> None:
        group_of = [group_name(name, group_depth) for name in parameter_names]
        self.parameter_names = parameter_names
        self.names = tuple(dict.fromkeys(group_of))
        place = {name: i for i, name in enumerate(self.names)}
        index = np.array([place[name] for name in group_of], dtype=np.intp)
        self._order = np.argsort(index, kind="stable")  # group by group
        self._starts = np.searchsorted(index[self._order], np.arange(len(self.names)))

    def norms(self, parameter_norms: Floats) -> Floats:
        """The L2 norm of each group, from the norms of its parameters.

        Args:
            parameter_norms: Float64, one per parameter, or a row of them per step.
        """
        ordered = parameter_norms[..., self._order]
        squares: Floats = np.add.reduceat(ordered * ordered, self._starts, axis=-1)
        return np.sqrt(squares)


def group_name(parameter_name: str, group_depth: int) -> str:
    """The group of one parameter; what `torch.compile` and FSDP1 add to its path is left out."""
    path = [part for part in parameter_name.split(".") if part not in ("_orig_mod", "_fsdp_wrapped_module")]
    return ".".join((path[:-1] or path)[:group_depth])


def _verdict(total_norm: float, largest_norm: float) -> Verdict:
    if math.isnan(total_norm):
        return "nan"
    if math.isinf(total_norm):
        return "inf"
    return "finite" if total_norm <= largest_norm else "overflow"
