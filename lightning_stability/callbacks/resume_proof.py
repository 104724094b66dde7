"""Whether a resumed run is the one that was killed: the steps after each save leave fingerprints, which are compared.

After a save, the first steps' batches, losses, norms and learning rates go into a file beside the checkpoints. A run
that is resumed from that save takes the same steps again, and is told whether they were the same in every bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_stability import internals
from lightning_stability.callbacks.proof_messages import as_event, not_compared, sentence
from lightning_stability.checkpointing import orders
from lightning_stability.checkpointing.fingerprints import (
    STEPS,
    Comparison,
    Difference,
    StepFile,
    Window,
    fingerprint_file,
    other_batches,
    read_window,
    save_name,
)
from lightning_stability.checkpointing.loops import SavePoints
from lightning_stability.checkpointing.resume import SECTION
from lightning_stability.checkpointing.writing import is_local
from lightning_stability.diagnosis.environment import capture_environment
from lightning_stability.events import EventLog
from lightning_stability.health import LateReads, StepRecord
from lightning_stability.health.checksums import BatchChecksum, begin_checksum
from lightning_stability.health.loss_scale import scale_tensor
from lightning_stability.notices import warn, warn_always

Answer = tuple[Difference | None, int]
"""The first difference on a rank, and how many steps were equal there."""


class FingerprintSink(Protocol):
    """Where fingerprints go: `StepFile`, or what stands for it."""

    def begin(self, window: Window) -> None: ...

    def add(self, n: int, fields: dict[str, Any]) -> None: ...


class ResumeProof:
    """The fingerprints of one fit on one rank.

    Args:
        events: Where the outcome is written.
        drain: Has the records of all steps so far handed over.
        file: Where fingerprints are written; None to write none.
        limit: How many steps after a save leave one.
    """

    def __init__(
        self, events: EventLog, drain: Callable[[], None], file: FingerprintSink | None, limit: int = STEPS
    ) -> None:
        self._file = file
        self._limit = limit
        self._events = events
        self._drain_records = drain
        self._reads = LateReads()
        self._checksum = BatchChecksum()
        self._comparison: Comparison | None = None
        self.outcome: Answer | None = None
        """Of the comparison that has ended, the worst of all ranks."""
        self._n: int | None = None  # steps since the save; None while nothing is fingerprinted
        self._saved_at = 0
        self._has_failed = False
        self._forget_step()
        self._numbers: dict[int, int] = {}  # n by the global step

    # Called by the callback.

    def begin(self, trainer: Any, save: str, earlier: Window | None = None, steps: int = 0) -> None:
        """Steps from now on are those after a save.

        Args:
            trainer: The Trainer, between two steps.
            earlier: The same steps as an earlier run took them.
            steps: How many of them to compare, the same on all ranks; 0 for none.
        """
        self._contained(self._reads.drain)
        self._report(trainer)
        self._n, self._saved_at = 0, trainer.global_step
        self._forget_step()
        self._numbers.clear()
        window = Window(save, SavePoints.of(trainer).starts, header(trainer))
        if self._file is not None:
            file = self._file
            self._contained(lambda: file.begin(window))
        if steps:
            self._comparison = Comparison(earlier or window, window.header, steps)
            if self._is_certain(trainer):
                self._report(trainer)

    def resume(self, trainer: Any, save: str, folder: Path) -> None:
        """The run is where it was when it was saved; compare what follows with what has followed before.

        Args:
            save: The save that it was resumed from.
            folder: Of that checkpoint.
        """
        earlier = read_window(fingerprint_file(folder, trainer.global_rank), save)
        dealing = batch_dealing(trainer)
        why = None if earlier is None else other_batches(earlier.header, dealing)
        answers = _from_all_ranks(trainer, (0 if earlier is None else earlier.steps, why))
        why = next((why for _, why in answers if why is not None), None)
        if why is None:
            self.begin(trainer, save, earlier, min(steps for steps, _ in answers))
            return
        self.begin(trainer, save)
        if why.keeps_state:  # of which another number of ranks holds other parts
            self._comparison = Comparison(earlier or Window(save, 0, {}), header(trainer), 0)
            self._report(trainer)
        if self.outcome is None:
            rank_zero_info(f"FractionalCheckpoint: {not_compared(why.what)}.")

    def on_batch_start(self, trainer: Any, batch: Any) -> None:
        """A batch is about to enter `training_step`."""
        if self._n is not None:
            self._numbers[trainer.global_step] = self._n + 1
            self._rates[:] = _learning_rates(trainer)
            self._contained(lambda: self._add_batch(batch))

    def on_batch_end(self, trainer: Any, outputs: Any) -> None:
        """A batch has been trained."""
        if self._n is None:
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            loss = loss.detach().reshape(())
            self._losses.append(loss if loss.dtype in (torch.float32, torch.float64) else loss.float())
        if internals.window_is_open(trainer):
            return
        self._n += 1
        self._contained(lambda: self._send(trainer, self._n or 0))
        self._forget_step()
        self._contained(self._reads.poll)
        comparison = self._comparison
        if comparison is not None and self._n == comparison.steps:
            self._contained(self._reads.drain)
            self._drain_records()
            self._report(trainer)
        elif self._is_certain(trainer):
            self._report(trainer)
        if self._n >= self._limit:
            self._contained(self._reads.drain)
            self._n = None

    def on_record(self, record: StepRecord) -> None:
        """A step has been measured, for somebody else."""
        n = self._numbers.get(record.step)
        if n is not None and n <= self._limit and record.optimizer == 0:
            self._contained(lambda: self._note(n, {"norm": record.total_norm}))

    def finish(self, trainer: Any) -> None:
        """Training ends, on all ranks: what was compared until here is all there is."""
        self._contained(self._reads.drain)
        self._report(trainer)
        self._n = None

    # One step.

    def _forget_step(self) -> None:
        self._on_host: list[int] = []
        self._on_device: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._rates: list[float | Tensor] = []

    def _add_batch(self, batch: Any) -> None:
        on_host, on_device = self._checksum.of(batch)
        self._on_host.append(on_host)
        self._on_device += on_device

    def _send(self, trainer: Any, n: int) -> None:
        """Put a step's numbers on their way to the host."""
        scale = scale_tensor(trainer.precision_plugin)
        rates = [rate for rate in self._rates if isinstance(rate, Tensor)]
        parts = {
            "losses": self._losses,
            "sums": self._on_device,
            "rates": rates,
            "scale": [] if scale is None else [scale],
        }
        device = trainer.strategy.root_device
        sent = {name: [part.to(device) for part in found] for name, found in parts.items() if found}
        on_host, known = list(self._on_host), list(self._rates)

        def arrived(arrays: list[Any]) -> None:
            self._note(n, _fields(dict(zip(sent, arrays, strict=True)), on_host, known))

        if sent:
            self._reads.send(list(sent.values()), arrived)
        else:
            arrived([])

    def _note(self, n: int, fields: dict[str, Any]) -> None:
        if self._comparison is not None:
            self._comparison.add(n, fields)
        if self._file is not None:
            self._file.add(n, fields)

    # The outcome.

    def _is_certain(self, trainer: Any) -> bool:
        """Whether the run can be told now; a small difference is watched to the end, and all ranks are told at once."""
        found = None if self._comparison is None or trainer.world_size > 1 else self._comparison.difference()
        return found is not None and found.kind not in ("numerics", "computation")

    def _report(self, trainer: Any) -> None:
        comparison, self._comparison = self._comparison, None
        if comparison is None:
            return
        answers = _from_all_ranks(trainer, (comparison.difference(), comparison.equal, comparison.compared))
        bad = [(d.n, rank, d) for rank, (d, _, _) in enumerate(answers) if d is not None]
        compared, equal = min(n for _, _, n in answers), min(n for _, n, _ in answers)
        if not compared and not bad:
            return
        _, rank, difference = min(bad, default=(0, 0, None), key=lambda found: found[:2])
        self.outcome = (difference, equal)
        on_rank = rank if trainer.world_size > 1 else None
        said = sentence(difference, equal, compared, self._saved_at, on_rank)
        if difference is None:
            rank_zero_info(f"FractionalCheckpoint: {said}.")
        else:
            warn_always(f"FractionalCheckpoint: the resume is not exact: {said}.")
        if trainer.is_global_zero:
            name, details = as_event(difference, equal, compared, said, on_rank)
            self._events.write(name, trainer.global_step, trainer.current_epoch, **details)

    def _contained(self, action: Callable[[], object]) -> None:
        """A file that cannot be written, or a batch of a strange kind, ends the fingerprints and nothing else."""
        if self._has_failed:
            return
        try:
            action()
        except Exception as error:
            self._has_failed = True
            warn(f"FractionalCheckpoint: no more fingerprints of steps are kept in this run: {error!r}")


def header(trainer: Any) -> dict[str, Any]:
    """What is known when a window begins; waits for the device.

    Args:
        trainer: The Trainer, between two steps.
    """
    module, device = trainer.lightning_module, trainer.strategy.root_device
    # the first rank's buffers are saved for all, whatever the others' batch norms hold at that moment
    buffers = module.buffers() if trainer.is_global_zero else ()
    weights, optimizer = begin_checksum([*module.parameters(), *buffers]), begin_checksum(_optimizer_tensors(trainer))
    return {
        "weights": f"{weights():016x}",
        "optimizer": f"{optimizer():016x}",
        "dealing": batch_dealing(trainer),
        "environment": {
            **capture_environment(device),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "cudnn_tf32": torch.backends.cudnn.allow_tf32,
            "world_size": trainer.world_size,
            "precision": str(trainer.precision),
        },
        "trainer": {
            "accelerator": device.type,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "gradient_clip_val": trainer.gradient_clip_val,
            "gradient_clip_algorithm": trainer.gradient_clip_algorithm,
            "max_epochs": trainer.max_epochs,
            "max_steps": trainer.max_steps,
            "limit_train_batches": trainer.limit_train_batches,
        },
    }


def batch_dealing(trainer: Any) -> dict[str, Any]:
    """What says which samples one batch of a rank takes."""
    loaders = SavePoints.of(trainer).data.loaders
    sizes = [orders.batch_size(loader) if isinstance(loader, DataLoader) else None for loader in loaders]
    return {"batch_size": sizes, "processes": trainer.world_size}


def _optimizer_tensors(trainer: Any) -> Iterator[Tensor]:
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, {})
                yield from (torch.as_tensor(state[name]) for name in sorted(state) if _is_number(state[name]))


def _is_number(value: Any) -> bool:
    return isinstance(value, (Tensor, int, float))


def _learning_rates(trainer: Any) -> Iterator[float | Tensor]:
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            rate = group.get("lr", 0.0)
            on_device = isinstance(rate, Tensor) and rate.device.type != "cpu"
            yield rate.detach().reshape(()).clone() if on_device else float(rate)


def _fields(arrays: dict[str, Any], on_host: list[int], rates: list[float | Tensor]) -> dict[str, Any]:
    """A step's fingerprint, from what has reached the host."""
    fields: dict[str, Any] = {}
    sums = [int(number) % 2**64 for number in arrays.get("sums", ())]
    if on_host:
        fields["data"] = _digest(repr((on_host, sums)).encode())
    losses = arrays.get("losses", ())
    if len(losses):
        fields["loss"] = float(losses.sum())
    if len(losses) > 1:
        fields["bits"] = _digest(losses.tobytes())
    late = iter(arrays.get("rates", ()))
    fields["lr"] = [float(next(late)) if isinstance(rate, Tensor) else rate for rate in rates]
    if "scale" in arrays:
        fields["scale"] = float(arrays["scale"][0])
    return fields


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _from_all_ranks(trainer: Any, value: Any) -> list[Any]:
    if trainer.world_size == 1:
        return [value]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values


class ProvesResume:
    """What of a callback that saves and resumes keeps the fingerprints."""

    _proof: ResumeProof | None = None
    _resumed_from: tuple[str, Path] | None = None
    """The save that the run is resumed from, and the folder of its checkpoint."""
    _proved: Answer | None = None
    """What came of the comparison, when it has ended."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A batch is about to be trained."""
        if self._proof is not None:
            self._proof.on_batch_start(trainer, batch)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A batch is not over here: nothing is saved, as ModelCheckpoint would."""
        if self._proof is not None:
            self._proof.on_batch_end(trainer, outputs)

    def on_train_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: an epoch is not over here."""

    def on_validation_end(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the batch that a validation follows is not over here."""

    def on_record(self, record: StepRecord) -> None:
        """A step that another callback has had measured."""
        if self._proof is not None:
            self._proof.on_record(record)

    def _begin_proof(self, trainer: Any, folder: str, events: EventLog, drain: Callable[[], None]) -> None:
        file = StepFile(Path(folder), trainer.global_rank) if is_local(folder) else None
        self._proof = ResumeProof(events, drain, file)

    def _note_resume(self, trainer: Any, checkpoint: dict[str, Any]) -> None:
        path, section = str(trainer.ckpt_path or ""), checkpoint[SECTION]
        if path and is_local(path) and {"run_id", "saved_at"} <= section.keys():
            self._resumed_from = save_name(section), Path(path).parent

    def _compare_from_here(self, trainer: Any) -> None:
        resumed_from, self._resumed_from = self._resumed_from, None
        if self._proof is not None and resumed_from is not None:
            self._proof.resume(trainer, *resumed_from)

    def _fingerprint_from_here(self, trainer: Any, section: dict[str, Any] | None) -> None:
        if self._proof is not None and section is not None:
            name = save_name(section)
            self._proof.begin(trainer, name if trainer.world_size == 1 else trainer.strategy.broadcast(name))

    def _end_proof(self, trainer: Any, all_ranks: bool = True) -> None:
        proof, self._proof = self._proof, None
        if proof is not None:
            if all_ranks or trainer.world_size == 1:
                proof.finish(trainer)
            self._proved = proof.outcome
