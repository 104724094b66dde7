"""The TUAB corpus on disk: which recordings there are, who may see which, and what one of them holds.

Layout of the Temple University Abnormal EEG Corpus, v3.0.1::

    ROOT/edf/{train,eval}/{normal,abnormal}/01_tcp_ar/SUBJECT_sSSS_tTTT.edf
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_stability.tuab._extra import need
from lightning_stability.tuab.channels import find_channels

SAMPLING_RATE = 256  # Hz, what EEGPT was trained on
BAND = (0.5, 50.0)  # Hz
CLASSES = ("normal", "abnormal")  # the index is the label

_LEAST_DEVIATION = 1e-3  # microvolts; filters leave this little of a flat line, and no amplifier resolves it
_DUPLICATE = re.compile(r"-[0-9]+$")  # what mne appends to the names of signals that share one

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Recording:
    """One EDF file.

    Args:
        path: Relative to the corpus' root, with forward slashes.
        subject: The text before the file name's first underscore.
        label: Index into :data:`CLASSES`.
        official_split: The folder that it lies in, ``"train"`` or ``"eval"``.
    """

    path: str
    subject: str
    label: int
    official_split: str


def window_samples(seconds: float) -> int:
    """Return how many samples a window of ``seconds`` has."""
    return round(seconds * SAMPLING_RATE)


def find_recordings(root: str | Path) -> list[Recording]:
    """List the recordings under ``root``, sorted by path.

    Raises:
        MisconfigurationException: If there is no such folder, or it does not have TUAB's layout.
    """
    root = Path(root)
    if not root.is_dir():
        raise MisconfigurationException(
            f"There is no folder {root}. Give --data.root the folder that holds TUAB's `edf` folder, or leave it out "
            "to use the synthetic corpus."
        )
    recordings = [
        Recording(path.relative_to(root).as_posix(), path.name.partition("_")[0], label, split)
        for split in ("train", "eval")
        for label, name in enumerate(CLASSES)
        for path in sorted((root / "edf" / split / name).rglob("*.edf"))
    ]
    for split in ("train", "eval"):
        if not any(r.official_split == split for r in recordings):
            raise MisconfigurationException(
                f"{root} holds no recordings under edf/{split}. Expected TUAB's layout, "
                f"{root}/edf/{{train,eval}}/{{normal,abnormal}}/01_tcp_ar/*.edf"
                + (f"; did you mean {root.parent}?" if root.name == "edf" else ".")
            )
    return recordings


def split_by_subject(recordings: Sequence[Recording], val_fraction: float, seed: int) -> dict[Split, list[Recording]]:
    """Cut validation from the official train set so that no subject is in two splits.

    The official eval set is the test set. A subject of it that also has recordings under ``train`` is left out there,
    with a warning. Subjects with an abnormal recording and those without are divided in the same proportion.

    Args:
        recordings: All recordings of the corpus.
        val_fraction: Part of the train set's subjects that goes to validation, above 0 and below 1.
        seed: Of the division; it does not depend on the order of ``recordings``.
    """
    test = [r for r in recordings if r.official_split == "eval"]
    rest = [r for r in recordings if r.official_split == "train"]
    shared = {r.subject for r in test} & {r.subject for r in rest}
    if shared:
        warnings.warn(
            f"{len(shared)} subjects are in both edf/train and edf/eval ({', '.join(sorted(shared)[:5])}, ...): "
            "their recordings under edf/train are left out, so that the test set stays unseen.",
            stacklevel=2,
        )
        rest = [r for r in rest if r.subject not in shared]

    rng = np.random.default_rng(seed)
    abnormal = {r.subject for r in rest if CLASSES[r.label] == "abnormal"}
    val_subjects: set[str] = set()
    for group in (abnormal, {r.subject for r in rest} - abnormal):
        subjects = rng.permutation(sorted(group))
        val_subjects.update(subjects[: max(1, round(val_fraction * len(subjects)))].tolist())
    return {
        "train": [r for r in rest if r.subject not in val_subjects],
        "val": [r for r in rest if r.subject in val_subjects],
        "test": test,
    }


def read_recording(path: str | Path) -> npt.NDArray[np.float32]:
    """Read one EDF file as the probe wants it.

    The 19 channels in the order of :data:`~lightning_stability.tuab.channels.CHANNELS`, band-pass filtered to 0.5-50 Hz
    (mne's zero-phase FIR), resampled to 256 Hz, then z-scored by :func:`robust_z_score`.

    Returns:
        Array of shape (channels, samples).

    Raises:
        ValueError: If the file cannot be read, lacks a channel, is sampled too slowly or holds no signal.
    """
    mne = need("mne")
    try:
        raw = mne.io.read_raw_edf(path, preload=False, verbose="error")
    except Exception as error:  # mne raises whatever its parser stumbles over
        raise ValueError(f"not readable as EDF: {error or type(error).__name__}") from error
    labels = [_DUPLICATE.sub("", label) for label in find_channels(raw.ch_names).values()]
    # read again without the other signals: mne samples all of a file's signals as often as the fastest one
    raw = mne.io.read_raw_edf(path, preload=False, include=labels, verbose="error")
    raw.pick(list(find_channels(raw.ch_names).values()))
    if raw.info["sfreq"] <= 2 * BAND[1]:
        raise ValueError(f"sampled at {raw.info['sfreq']:g} Hz, too slowly for a band up to {BAND[1]:g} Hz")
    raw.load_data(verbose="error")
    raw.filter(*BAND, verbose="error")
    raw.resample(SAMPLING_RATE, method="polyphase", verbose="error")
    return robust_z_score(1e6 * raw.get_data())  # mne gives volts


def robust_z_score(microvolts: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    r"""Centre each channel on its median and divide by its interquartile range over 1.349.

    For a normal distribution that is the ordinary z-score. Mean and standard deviation would let one loose electrode,
    at 20,000 times the size of the EEG, shrink the rest of its recording to nothing. A channel that is flat for more
    than half of the time is divided by its standard deviation, and one that is flat all the time becomes zero.

    Source: the interquartile range of the standard normal distribution is :math:`2\,\Phi^{-1}(0.75) \approx 1.349`.

    Args:
        microvolts: Shape (channels, samples).

    Raises:
        ValueError: If a value is not finite or all channels are constant.

    Example::

        >>> z = robust_z_score(np.random.default_rng(0).normal(20, 50, (1, 10_000)))
        >>> bool(abs(z.mean()) < 0.05), bool(abs(z.std() - 1) < 0.05)
        (True, True)
    """
    if not np.isfinite(microvolts).all():
        raise ValueError("holds values that are not finite")
    low, middle, high = np.percentile(microvolts, (25, 50, 75), axis=1, keepdims=True)
    deviation = microvolts.std(axis=1, keepdims=True)
    constant = deviation < _LEAST_DEVIATION
    if constant.all():
        raise ValueError("all channels are constant")
    scale = (high - low) / 1.349
    scale = np.where(scale < _LEAST_DEVIATION, deviation, scale)
    return np.asarray(np.where(constant, 0.0, (microvolts - middle) / np.where(constant, 1.0, scale)), dtype=np.float32)
