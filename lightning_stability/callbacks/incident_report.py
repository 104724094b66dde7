"""IncidentReport writes down a step that went wrong, so that it can be run again anywhere, and why it did."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_stability._compat import MisconfigurationException
from lightning_stability.callbacks.base import StabilityCallback, is_number, warn_always
from lightning_stability.checkpointing.loaders import training_iterator
from lightning_stability.checkpointing.sample_indices import SampleIndices
from lightning_stability.health import StepRecord
from lightning_stability.runtime import BadStep, Outcome

if TYPE_CHECKING:
    from lightning_stability.callbacks.validation_watch import ValidationBatch, ValidationWatch

_HISTORY = 500


class IncidentReport(StabilityCallback):
    """Records steps that go wrong, and finds where their first non-finite value was made, and why.

    Each becomes a folder `incidents/<n>-step<k>`. It holds the batches, the state and the random state from before
    the step, the steps before it, and a report. `lightning-stability diagnose FOLDER` runs the step again on any
    machine. If something cannot be saved, for example on a full disk, it is named, and the run continues.

    Recorded is a step whose loss, gradient or buffer is not finite, also if `PrecisionFallback` then trains it in
    fp32. So are the first one that `InputCheck(action="skip")` rejected, and the first validation batch whose output
    is not finite. The update of such a step is skipped, as with `NaNEarlyStop`. Alone, this callback never ends the
    run.

    It logs no numbers. TensorBoard, W&B and MLflow get the first-named cause under `lightning_stability/incident`.

    Args:
        dirpath: Where the folder `incidents` is made; the run's log folder by default.
        max_incidents: How many a run may write.
        save_state: Whether weights and optimizer states are kept. Without them the step can be run again only with
            the weights that the module is made with.
        budget_seconds: How long the search for origin and causes may take, in the run; 0 leaves it to the command.

    Raises:
        MisconfigurationException: If a number is out of its range; when training starts, if the optimizer cannot be
            guarded (LBFGS), and under DeepSpeed and XLA, which hide the gradients.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[IncidentReport(max_incidents=1)], logger=False, enable_checkpointing=False)
    """

    guards = True

    def __init__(
        self,
        dirpath: str | Path | None = None,
        max_incidents: int = 2,
        save_state: bool = True,
        budget_seconds: float = 60.0,
    ) -> None:
        super().__init__()
        if isinstance(max_incidents, bool) or not isinstance(max_incidents, int) or max_incidents < 1:
            raise MisconfigurationException(
                f"IncidentReport(max_incidents={max_incidents!r}): expected a whole number of at least 1."
            )
        if not (is_number(budget_seconds) and budget_seconds >= 0):
            raise MisconfigurationException(
                f"IncidentReport(budget_seconds={budget_seconds!r}): expected a number of at least 0."
            )
        self._require_path(dirpath=dirpath)
        self._require_flag(save_state=save_state)
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.max_incidents = max_incidents
        self.save_state = save_state
        self.budget_seconds = budget_seconds
        self._clear()

    def _clear(self) -> None:
        self._seen = 0
        self._has_seen_rejected = False
        self._has_seen_validation = False
        self._validation: ValidationWatch | None = None
        self._history: deque[StepRecord] = deque(maxlen=_HISTORY)
        self._indices = SampleIndices()
        self._indices_known = False
        self._samples: deque[tuple[int, list[int] | None]] = deque()

    def is_needed(self, trainer: Any) -> bool:
        """Not where it came with the environment and the run has no folder to write to."""
        return not self.automatic or self.dirpath is not None or bool(trainer.loggers)

    # A fit.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Be shown bad steps whole. What an earlier fit wrote was that fit's."""
        if stage != "fit" or self.session is None:
            return
        self._clear()  # a checkpoint's state is loaded after this
        self.session.subscribe(self.on_bad_step, copies=True)
        self._indices.start()  # before the data loaders' iterators are made
        if self._folder() is None and not self.automatic and not trainer.fast_dev_run:
            warn_always("IncidentReport writes nothing: the run has no log folder. Give it one, or a `dirpath`.")

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """The sampler begins anew."""
        self._samples = deque(maxlen=4 * trainer.accumulate_grad_batches + 4)
        self._indices_known = False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note which samples of the dataset it is made of; unknown in the rest of an epoch that was resumed."""
        self._indices_known |= batch_idx == 0
        indices = self._indices.take(training_iterator(trainer))
        self._samples.append((id(batch), indices if self._indices_known else None))

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Look at its batches, until one of the run was bad."""
        wanted = self._folder() is not None and not self._has_seen_validation and self._seen < self.max_incidents
        if wanted and trainer.state.fn == "fit" and not trainer.sanity_checking:
            from lightning_stability.callbacks.validation_watch import ValidationWatch  # (it loads what few runs need)

            self._validation = ValidationWatch(trainer)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note what it starts from."""
        if self._validation is not None:
            self._validation.begin(batch, batch_idx, dataloader_idx)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write an incident of the first one that is bad."""
        if self._validation is not None:
            self._on_bad_validation(trainer, self._validation.end(outputs))

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Read the last verdict."""
        if self._validation is not None:
            self._on_bad_validation(trainer, self._validation.settle())
            self._validation = None

    def on_record(self, record: StepRecord) -> None:
        """Keep what history.jsonl will say of the step."""
        self._history.append(record)

    def on_session_end(self, exception: BaseException | None) -> None:
        """Listen to samplers no more."""
        self._indices.stop()

    def state_dict(self) -> dict[str, Any]:
        """How many incidents the run has seen."""
        return {
            "seen": self._seen,
            "has_seen_rejected": self._has_seen_rejected,
            "has_seen_validation": self._has_seen_validation,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting."""
        self._seen, self._has_seen_rejected = state_dict["seen"], state_dict["has_seen_rejected"]
        self._has_seen_validation = state_dict["has_seen_validation"]

    # A bad step.

    def on_bad_step(self, bad: BadStep) -> None:
        """Write an incident. Whatever fails in it, the run continues."""
        record, folder = bad.record, self._folder()
        is_rejected = record.outcome == Outcome.REJECTED
        if _is_finite(record) and not is_rejected:
            return
        if folder is None or self._seen >= self.max_incidents or (is_rejected and self._has_seen_rejected):
            return
        self._seen += 1  # on all ranks alike
        self._has_seen_rejected |= is_rejected
        from lightning_stability.callbacks.incident_writing import IncidentWriter  # (it loads what few runs need)

        assert self.session is not None
        writer = IncidentWriter(folder, self._seen, self.save_state, self.budget_seconds, self.session.events)
        with bad.before():
            writer.write(bad, list(self._history), self._dataset_indices(bad))

    def _on_bad_validation(self, trainer: Any, bad: ValidationBatch | None) -> None:
        folder = self._folder()
        if bad is None or folder is None or self.session is None:
            return
        self._seen += 1
        self._has_seen_validation, self._validation = True, None
        from lightning_stability.callbacks.incident_writing import IncidentWriter  # (it loads what few runs need)

        writer = IncidentWriter(folder, self._seen, self.save_state, self.budget_seconds, self.session.events)
        writer.write_validation(trainer, bad, list(self._history))

    def _folder(self) -> Path | None:
        if self.dirpath is not None:
            return self.dirpath / "incidents"
        events = None if self.session is None else self.session.events.path
        return None if events is None else events.parent / "incidents"

    def _dataset_indices(self, bad: BadStep) -> list[list[int] | None]:
        if bad.window is None:
            return []
        known = dict(self._samples)  # (of two with one id the newer one: the window still holds its batches)
        return [known.get(id(batch.batch)) for batch in bad.window.batches]

    def __getstate__(self) -> dict[str, Any]:
        # Who listens to samplers belongs to this process's fit.
        return {**super().__getstate__(), "_indices": SampleIndices(), "_validation": None}


def _is_finite(record: StepRecord) -> bool:
    """Whether the update was skipped because the squares of its gradients overflow, and nothing is non-finite."""
    fine = record.loss_finite and not record.bad_loss_ranks and record.nonfinite_buffer is None
    return record.gradients == "overflow" and fine and record.bad_option is None and record.exception is None


def explain(bad: BadStep, budget_seconds: float = 10.0) -> str:
    """Where the first non-finite value of a step was made, in a sentence, for the message of a stop."""
    from lightning_stability.callbacks import incident_writing  # (it loads what few runs need)

    return incident_writing.explain(bad, budget_seconds)


__all__ = ["IncidentReport", "explain"]
