"""The TUAB corpus as a LightningDataModule."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_stability.tuab._extra import need
from lightning_stability.tuab._options import require
from lightning_stability.tuab.building import build_cache
from lightning_stability.tuab.cache import WindowCache, WindowDataset
from lightning_stability.tuab.corpus import CLASSES, SAMPLING_RATE, Split, find_recordings, split_by_subject
from lightning_stability.tuab.encoder import PATCH_SAMPLES
from lightning_stability.tuab.exclusion import describe_window, leave_out
from lightning_stability.tuab.index import file_stamps, refuse_changes
from lightning_stability.tuab.sampling import BalancedSampler
from lightning_stability.tuab.synthetic import SyntheticCorpus

SYNTHETIC_ROOT = Path("tuab_synthetic")


class TUABDataModule(pl.LightningDataModule):
    """Windows of the Temple University Abnormal EEG Corpus, from EDF files to batches.

    Validation is cut from the official train set by subject, the official eval set is the test set. Recordings are
    preprocessed once, into a cache. Training windows overlap as ``stride_seconds`` says, evaluation windows do not.
    Batches are dictionaries; :class:`~lightning_stability.tuab.WindowDataset` tells what is in them.

    Args:
        root: The folder that holds TUAB's ``edf`` folder. None uses a synthetic corpus in ``tuab_synthetic``, which is
            written there on first use.
        cache_dir: Where preprocessed recordings are kept: about 10 kB for each second of recording. Every corpus has a
            folder of its own in it.
        window_seconds: Length of a window; the probe must be told the same.
        stride_seconds: Distance between the starts of training windows.
        batch_size: Windows in a batch.
        val_fraction: Part of the train set's subjects that is used for validation.
        num_workers: Processes that load batches.
        split_seed: Seed of the division into train and validation.
        class_balanced: Whether each class is drawn equally often in training; an epoch is as long as without. Ranks
            share out one order where `FractionalCheckpoint` is used, or all draw with the same seed.
        exclude: A ``flagged_inputs.csv`` of an earlier run's InputCheck; the windows that it names are not trained on.

    Raises:
        MisconfigurationException: If the folder is missing or has another layout, if a package of the ``tuab`` extra is
            missing, if a split ends up without windows, or if ``exclude`` is no such file or one of another corpus.

    Example::

        >>> import tempfile
        >>> from lightning_stability.tuab import SyntheticCorpus, TUABDataModule
        >>> corpus = SyntheticCorpus(train_subjects=4, eval_subjects=2, seconds=(20, 20))
        >>> root = corpus.write(tempfile.mkdtemp())
        >>> data = TUABDataModule(root=str(root), cache_dir=f"{root}/cache", batch_size=2, val_fraction=0.5)
        >>> data.prepare_data()
        >>> data.setup("fit")
        >>> next(iter(data.train_dataloader()))["eeg"].shape
        torch.Size([2, 19, 2048])
    """

    def __init__(
        self,
        root: str | None = None,
        cache_dir: str = "tuab_cache",
        window_seconds: float = 8.0,
        stride_seconds: float = 4.0,
        batch_size: int = 32,
        val_fraction: float = 0.25,
        num_workers: int = 0,
        split_seed: int = 0,
        class_balanced: bool = False,
        exclude: str | None = None,
    ) -> None:
        super().__init__()
        for module in ("mne", "edfio", "torchdata"):
            need(module)
        require("window_seconds", window_seconds, at_least=PATCH_SAMPLES / SAMPLING_RATE)
        require("stride_seconds", stride_seconds, at_least=1 / SAMPLING_RATE)
        require("batch_size", batch_size, at_least=1)
        require("num_workers", num_workers, at_least=0)
        require("split_seed", split_seed, at_least=0)
        if not 0 < val_fraction < 1:
            raise MisconfigurationException(f"val_fraction must be between 0 and 1, got {val_fraction}.")
        self.root = SYNTHETIC_ROOT if root is None else Path(root)
        self._synthetic = root is None
        # two corpora of the same name must not share a cache
        place = hashlib.sha256(str(self.root.resolve()).encode()).hexdigest()[:8]
        self.cache_folder = Path(cache_dir) / f"{self.root.resolve().name}-{place}"
        self.window_seconds = window_seconds
        self.stride_seconds = stride_seconds
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.num_workers = num_workers
        self.split_seed = split_seed
        self.class_balanced = class_balanced
        self.exclude = exclude
        self.datasets: dict[Split, WindowDataset] = {}

    def prepare_data(self) -> None:
        if self._synthetic and not (self.root / "edf").exists():
            rank_zero_info(f"No --data.root was given: writing a synthetic corpus to {self.root}.")
            SyntheticCorpus().write(self.root)
        build_cache(self.root, find_recordings(self.root), self.cache_folder)

    def setup(self, stage: str) -> None:
        if self.datasets:
            return
        self.cache = WindowCache(self.cache_folder)
        found = find_recordings(self.root)
        refuse_changes(self.cache_folder, self.root, file_stamps(self.root, found), self.cache.index)
        places = {recording.path: index for index, recording in enumerate(self.cache.recordings)}
        for split, recordings in split_by_subject(found, self.val_fraction, self.split_seed).items():
            stride = self.stride_seconds if split == "train" else self.window_seconds
            indices = [places[r.path] for r in recordings if r.path in places]
            self.datasets[split] = WindowDataset(self.cache, indices, self.window_seconds, stride)
            labels = {self.cache.recordings[index].label for index in indices}
            if len(labels) < len(CLASSES):
                only = ", ".join(CLASSES[label] for label in labels) or "no"
                raise MisconfigurationException(
                    f"The {split} split has {only} recordings only, {len(indices)} of them; it needs both classes. "
                    "More recordings, or another --data.val_fraction or --data.split_seed, may help."
                )
            if len(self.datasets[split]) == 0:
                raise MisconfigurationException(
                    f"The {split} split has no window of {self.window_seconds:g} seconds in its {len(indices)} "
                    "readable recordings."
                )
            short = sum(self.cache.recordings[index].samples < self.datasets[split].length for index in indices)
            if short:
                rank_zero_warn(
                    f"{short} of {len(indices)} recordings of the {split} split are not used: they are shorter than a "
                    f"window of {self.window_seconds:g} seconds."
                )
        if self.exclude is not None:
            self.datasets["train"], left_out = leave_out(self.exclude, self.datasets["train"], places)
            recordings_named = len({path for path, _ in left_out})
            rank_zero_info(
                f"{len(left_out)} windows of {recordings_named} recordings are left out of the training set,"
                f" as {self.exclude} says."
            )

    def train_dataloader(self) -> DataLoader[Any]:
        if self.class_balanced:
            return self._loader("train", sampler=BalancedSampler(self.datasets["train"].labels))
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")

    def describe_sample(self, batch: dict[str, Tensor], index: int) -> str:
        """Return the path of a sample's recording and where in it the window starts.

        Args:
            batch: A batch of this data module.
            index: The sample's place in it.
        """
        recording = self.cache.recordings[int(batch["recording"][index])]
        return describe_window(recording.path, int(batch["start"][index]))

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")

    def _loader(self, split: Split, **order: Any) -> DataLoader[Any]:
        # its position within an epoch can be saved, a plain DataLoader's cannot
        if split != "train":
            # Persistent workers draw a seed at the first use only, from the global generator if from no other: a run
            # that was resumed between two validations would draw once more than one that was not.
            order["generator"] = torch.Generator()
        loader: DataLoader[Any] = need("torchdata.stateful_dataloader").StatefulDataLoader(
            self.datasets[split],
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            **order,
        )
        return loader
