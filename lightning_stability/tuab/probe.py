"""A linear probe on the frozen EEGPT encoder, to tell normal from abnormal EEG."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, OneCycleLR, SequentialLR

from lightning_stability.atomic import replace_file
from lightning_stability.tuab._options import require
from lightning_stability.tuab.cache import WindowCache
from lightning_stability.tuab.channels import CHANNELS
from lightning_stability.tuab.configs import packaged_file
from lightning_stability.tuab.corpus import CLASSES, SAMPLING_RATE, window_samples
from lightning_stability.tuab.encoder import PATCH_SAMPLES, EEGPTEncoder, load_pretrained
from lightning_stability.tuab.metrics import RecordingAverage, binary_metrics

_MIN_LEARNING_RATE = 1e-6  # where the warm-up starts and the cosine ends
_RANDOM_ENCODER_SEED = 0
_WINDOWS_LOOKED_AT = 32  # at the start of fit

Batch = dict[str, Tensor]


class EEGPTProbe(pl.LightningModule):
    """Trains a channel adapter and a two-layer classifier around the frozen EEGPT encoder.

    The adapter is a 1x1 convolution over channels (max-norm 1) that starts as the identity; the classifier maps the
    four summary vectors of each quarter of a second to ``hidden`` numbers (max-norm 1), and those of the whole window
    to the two classes (max-norm 0.25). The encoder stays in evaluation mode and without gradients of its own, but
    gradients go through it to the adapter.

    Logged: ``train_loss``, ``val_loss``, and ``{val,test}_`` and ``{val,test}_recording_`` followed by ``auroc``,
    ``auprc``, ``balanced_accuracy``, ``accuracy``, ``kappa`` and ``f1``, per window and per recording (the mean
    probability of its windows).

    Source: the linear probe of the EEGPT paper (Wang et al., NeurIPS 2024).

    Args:
        checkpoint: The published EEGPT checkpoint. Without one the encoder has random weights, and says so.
        encoder: ``"large"``, 25 million parameters, is EEGPT's; ``"small"`` has 0.1 million and the same architecture.
            None takes the large one when there is a checkpoint.
        learning_rate: The highest one, after warm-up.
        weight_decay: Of AdamW.
        scheduler: ``"cosine"`` or ``"onecycle"``, stepped at every optimizer step over the whole of training.
        warmup_fraction: Part of the optimizer steps in which the learning rate rises.
        label_smoothing: Of the cross entropy.
        input_stats: A JSON file with ``mean`` and ``std`` that windows are normalised with before they reach the
            adapter. They already have unit variance, so the right value is none.
        hidden: Numbers that the first layer of the classifier makes of a quarter of a second.
        dropout: Before the classifier.
        window_seconds: Length of a window; the data module must be told the same.

    Raises:
        MisconfigurationException: If a file is missing or wrong, or an option is out of range.
        ValueError: From the end of a validation, test or prediction in which outputs were not finite.

    Example::

        >>> import torch
        >>> from lightning_stability.tuab import EEGPTProbe
        >>> EEGPTProbe()(torch.randn(2, 19, 2048)).shape
        torch.Size([2, 2])
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        encoder: Literal["small", "large"] | None = None,
        learning_rate: float = 2e-4,
        weight_decay: float = 0.05,
        scheduler: Literal["cosine", "onecycle"] = "cosine",
        warmup_fraction: float = 0.1,
        label_smoothing: float = 0.0,
        input_stats: str | None = None,
        hidden: int = 16,
        dropout: float = 0.5,
        window_seconds: float = 8.0,
    ) -> None:
        super().__init__()
        require("learning_rate", learning_rate, at_least=_MIN_LEARNING_RATE)
        require("weight_decay", weight_decay, at_least=0)
        require("warmup_fraction", warmup_fraction, at_least=0, below=1)
        require("label_smoothing", label_smoothing, at_least=0, below=1)
        require("hidden", hidden, at_least=1)
        require("dropout", dropout, at_least=0, below=1)
        require("window_seconds", window_seconds, at_least=PATCH_SAMPLES / SAMPLING_RATE)
        if scheduler not in ("cosine", "onecycle"):
            raise MisconfigurationException(f"scheduler must be 'cosine' or 'onecycle', got {scheduler!r}.")
        self.save_hyperparameters()
        self.input_stats = InputStats.load(input_stats) if input_stats else None
        self.adapter = _MaxNormConv1d(len(CHANNELS), len(CHANNELS), kernel_size=1, max_norm=1.0)
        with torch.no_grad():
            nn.init.dirac_(self.adapter.weight)
            self.adapter.bias.zero_()  # type: ignore[union-attr]
        self.encoder = _make_encoder(encoder, checkpoint)
        patches = window_samples(window_seconds) // PATCH_SAMPLES
        features = self.encoder.summary_tokens * self.encoder.embed_dim
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            _MaxNormLinear(features, hidden, max_norm=1.0),
            nn.Flatten(),
            _MaxNormLinear(hidden * patches, len(CLASSES), max_norm=0.25),
        )
        self.val_metrics, self.test_metrics = binary_metrics().clone("val_"), binary_metrics().clone("test_")
        # how many evaluation windows had outputs that are not finite, kept on the device until the epoch ends
        self._nonfinite: Tensor | None = None
        self._average: RecordingAverage | None = None

    def forward(self, eeg: Tensor) -> Tensor:
        """Return logits, (batch, 2), of windows, (batch, 19, samples)."""
        expected = (len(CHANNELS), window_samples(self.hparams["window_seconds"]))
        if tuple(eeg.shape[1:]) != expected:
            raise ValueError(
                f"Expected windows of shape (batch, {expected[0]}, {expected[1]}), got {tuple(eeg.shape)}. "
                "Give --model.window_seconds and --data.window_seconds the same value."
            )
        summaries = self.encoder(self._encoder_input(eeg))
        logits: Tensor = self.classifier(summaries.flatten(2))
        return logits

    def _encoder_input(self, eeg: Tensor) -> Tensor:
        adapted: Tensor = self.adapter(eeg if self.input_stats is None else self.input_stats(eeg))
        return adapted

    def train(self, mode: bool = True) -> EEGPTProbe:
        """Set the mode of everything but the encoder, which stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits = self(batch["eeg"])
        loss = F.cross_entropy(logits, batch["label"], label_smoothing=self.hparams["label_smoothing"])
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(logits))
        return loss

    @torch.no_grad()
    def on_fit_start(self) -> None:
        """Say what reaches the encoder: had its owners seen that, the crash report would not have been written."""
        datasets = getattr(self.trainer.datamodule, "datasets", {})  # type: ignore[attr-defined]
        if "train" not in datasets:
            return
        train, weight = datasets["train"], self.adapter.weight
        chosen = torch.linspace(0, len(train) - 1, _WINDOWS_LOOKED_AT).long().tolist()
        # in full precision, so that the figures are those of the numbers and not of the format
        eeg = torch.stack([train[index]["eeg"] for index in chosen]).to(weight.device, weight.dtype)
        before = weight.clone()
        seen = self._encoder_input(eeg).float()
        weight.copy_(
            before
        )  # max-norm writes at each use, and a resumed run has to use it as often as one that was not
        rank_zero_info(
            f"Encoder input: mean {seen.mean():.4g}, std {seen.std():.4g}, range {seen.min():.4g} to "
            f"{seen.max():.4g}, in {len(eeg)} windows of the train set. EEGPT expects an std of about 1."
        )

    def on_validation_epoch_start(self) -> None:
        self.val_metrics.reset()
        self._start_evaluation()

    def on_test_epoch_start(self) -> None:
        self.test_metrics.reset()
        self._start_evaluation()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        logits, abnormal = self._evaluate(batch)
        self.val_metrics.update(abnormal, batch["label"])
        self.log("val_loss", F.cross_entropy(logits, batch["label"]), prog_bar=True, batch_size=len(logits))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        _, abnormal = self._evaluate(batch)
        self.test_metrics.update(abnormal, batch["label"])

    def on_validation_epoch_end(self) -> None:
        self._log_scores(self.val_metrics)

    def on_test_epoch_end(self) -> None:
        self._log_scores(self.test_metrics)

    def _start_evaluation(self) -> None:
        if not hasattr(self.trainer.datamodule, "cache"):  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "EEGPTProbe is evaluated per recording, so it needs a TUABDataModule; it was given bare data loaders."
            )
        self._average = RecordingAverage(len(self._cache.recordings)).to(self.device)
        self._nonfinite = torch.zeros((), dtype=torch.int64, device=self.device)

    @property
    def _cache(self) -> WindowCache:
        cache: WindowCache = self.trainer.datamodule.cache  # type: ignore[attr-defined]
        return cache

    def _evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return logits and the probability of "abnormal", and note what has to be known at the end."""
        assert self._average is not None
        assert self._nonfinite is not None
        logits: Tensor = self(batch["eeg"]).float()
        self._nonfinite += (~torch.isfinite(logits).all(dim=1)).sum()
        abnormal = logits.softmax(dim=1)[:, 1]
        self._average.update(abnormal, batch["label"], batch["recording"])
        return logits, abnormal

    def _recording_scores(self) -> Tensor:
        """Return index, mean probability and label of each recording, unless an output was not finite."""
        assert self._average is not None
        assert self._nonfinite is not None
        # torchmetrics' AUROC answers NaN with an ordinary number (0.375 if all are), so it has to be asked before
        nonfinite = int(self.trainer.strategy.reduce(self._nonfinite, reduce_op="sum"))
        if nonfinite:
            raise ValueError(
                f"Input contains NaN: the outputs for {nonfinite} windows of this evaluation are not finite."
            )
        scores: Tensor = self._average.compute()
        return scores

    def _log_scores(self, metrics: Any) -> None:
        _, probabilities, labels = self._recording_scores().unbind(dim=1)
        if self.trainer.sanity_checking:
            return  # two batches may hold one class only, of which no score can be made
        per_recording = binary_metrics().clone(f"{metrics.prefix}recording_").to(self.device)
        per_recording.update(probabilities, labels.long())
        self.log_dict({**metrics.compute(), **per_recording.compute()})

    def on_predict_epoch_start(self) -> None:
        self._start_evaluation()

    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        """Return the probability that each window is abnormal, with its recording and start."""
        _, abnormal = self._evaluate(batch)
        return {"abnormal": abnormal, "recording": batch["recording"], "start": batch["start"]}

    def on_predict_epoch_end(self) -> None:
        """Write the mean probability of each recording to ``predictions.csv``."""
        scores = self._recording_scores().tolist()
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)  # asked on all ranks: it is broadcast
        if not self.trainer.is_global_zero:
            return
        text = io.StringIO(newline="")
        rows = csv.writer(text)
        rows.writerow(["recording", "abnormal_probability"])
        for number, probability, _ in scores:
            rows.writerow([self._cache.recordings[int(number)].path, f"{probability:.4f}"])
        replace_file(folder / "predictions.csv", lambda file: file.write(text.getvalue().encode()))
        rank_zero_info(f"Probabilities of {len(scores)} recordings: {folder / 'predictions.csv'}")

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=self.hparams["learning_rate"], weight_decay=self.hparams["weight_decay"]
        )
        scheduler = self._scheduler(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _scheduler(self, optimizer: torch.optim.Optimizer, steps: float) -> LRScheduler:
        if math.isinf(steps):
            raise MisconfigurationException("The learning rate's schedule needs an end: set max_epochs or max_steps.")
        learning_rate, steps = self.hparams["learning_rate"], int(steps)
        warmup = round(self.hparams["warmup_fraction"] * steps)
        if self.hparams["scheduler"] == "onecycle":
            # OneCycleLR peaks at step pct_start * total_steps - 1 and divides by that and by what is left
            warmup, total = max(1, warmup), max(3, steps)
            return OneCycleLR(optimizer, max_lr=learning_rate, total_steps=total, pct_start=(warmup + 1) / total)
        cosine = CosineAnnealingLR(optimizer, T_max=max(1, steps - warmup), eta_min=_MIN_LEARNING_RATE)
        if warmup == 0:
            return cosine
        rise = LinearLR(optimizer, start_factor=_MIN_LEARNING_RATE / learning_rate, total_iters=warmup)
        return SequentialLR(optimizer, [rise, cosine], milestones=[warmup])


class InputStats(nn.Module):
    """Normalises with given statistics: subtracts ``mean``, divides by ``std``.

    Args:
        mean: Of the data that the statistics were taken from.
        std: Its standard deviation, above 0.
        source: Where they come from, for ``print``.
    """

    def __init__(self, mean: float, std: float, source: str = "") -> None:
        super().__init__()
        self.source = source
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    @classmethod
    def load(cls, file: str) -> InputStats:
        """Read ``{"mean": ..., "std": ...}`` from a JSON file, by path or by the name of a packaged one.

        Raises:
            MisconfigurationException: If the file is missing or holds something else.
        """
        path = packaged_file(file) or Path(file)
        try:
            stats = json.loads(path.read_text())
            mean, std = float(stats["mean"]), float(stats["std"])
            if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
                raise ValueError(f"mean is {mean}, std is {std}")
            return cls(mean, std, source=file)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MisconfigurationException(
                f"input_stats {file} could not be used ({type(error).__name__}: {error}); expected a JSON file like "
                '{"mean": 0.0, "std": 1.0}, with std above 0.'
            ) from error

    def forward(self, eeg: Tensor) -> Tensor:
        """Return (eeg - mean) / std."""
        normalised: Tensor = (eeg - self.mean) / self.std
        return normalised

    def extra_repr(self) -> str:
        return self.source


class _MaxNorm(nn.Module):
    """Cuts the L2 norm of each output's weights to ``max_norm`` before each use."""

    weight: Tensor

    def __init__(self, *args: Any, max_norm: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.max_norm = max_norm

    def forward(self, input: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.copy_(torch.renorm(self.weight, p=2, dim=0, maxnorm=self.max_norm))
        output: Tensor = super().forward(input)
        return output


class _MaxNormConv1d(_MaxNorm, nn.Conv1d):
    """A convolution whose filters have a largest norm."""


class _MaxNormLinear(_MaxNorm, nn.Linear):
    """A linear layer whose rows have a largest norm."""


def _make_encoder(size: Literal["small", "large"] | None, checkpoint: str | None) -> EEGPTEncoder:
    size = size or ("large" if checkpoint else "small")
    with torch.random.fork_rng(devices=[]):  # the same random encoder in every run, whatever the run's seed
        torch.manual_seed(_RANDOM_ENCODER_SEED)
        encoder = EEGPTEncoder() if size == "large" else EEGPTEncoder(embed_dim=64, depth=2, num_heads=4)
    if checkpoint:
        load_pretrained(encoder, checkpoint)
    else:
        rank_zero_warn(
            f"No EEGPT checkpoint was given: the {size} encoder has random weights and is no EEGPT. For real results "
            "give --model.checkpoint=eegpt_mcae_58chs_4s_large4E.ckpt."
        )
    return encoder.requires_grad_(False).eval()
