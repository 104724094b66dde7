"""The TUAB corpus on disk: which recordings there are, who may see which, and what one of them holds.

Layout of the Temple University Abnormal EEG Corpus, v3.0.1::

    ROOT/edf/{train,eval}/{normal,abnormal}/01_tcp_ar/SUBJECT_sSSS_tTTT.edf
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_stability.tuab._extra import need
from lightning_stability.tuab.channels import find_channels

SAMPLING_RATE = 256  # Hz, what EEGPT was trained on
BAND = (0.5, 50.0)  # Hz
FILTER_SECONDS = 3.3 / BAND[0]  # length of mne's FIR filter: 3.3 over the width of its lower transition band
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

    Example:
        >>> recording = Recording("edf/eval/normal/01_tcp_ar/aaaa_s001_t000.edf", "aaaa", 0, "eval")
        >>> recording.subject, CLASSES[recording.label]
        ('aaaa', 'normal')
    """

    path: str
    subject: str
    label: int
    official_split: str


def window_samples(seconds: float) -> int:
    """Return how many samples a window of ``seconds`` has."""
    return round(seconds * SAMPLING_RATE)


def find_recordings(root: str | Path) -> list[Recording]:
    """List the recordings under ``root``: train before eval, normal before abnormal, by path within these.

    Args:
        root: The folder that holds TUAB's ``edf`` folder.

    Raises:
        MisconfigurationException: If there is no such folder, it does not have TUAB's layout, or a folder in it cannot
            be listed.

    Example:
        >>> import tempfile
        >>> from lightning_stability.tuab import SyntheticCorpus, find_recordings
        >>> corpus = SyntheticCorpus(train_subjects=2, eval_subjects=1, seconds=(20, 20))
        >>> root = corpus.write(tempfile.mkdtemp())
        >>> [(recording.official_split, recording.label) for recording in find_recordings(root)]
        [('train', 0), ('train', 1), ('eval', 0)]
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
        for path in _edf_files(root / "edf" / split / name)
    ]
    for split in ("train", "eval"):
        if not any(r.official_split == split for r in recordings):
            raise MisconfigurationException(
                f"{root} holds no recordings under edf/{split}. Expected TUAB's layout, "
                f"{root}/edf/{{train,eval}}/{{normal,abnormal}}/01_tcp_ar/*.edf"
                + (f"; did you mean {root.parent}?" if root.name == "edf" else ".")
            )
    return recordings


def _edf_files(folder: Path) -> list[Path]:
    """What is called .edf or .EDF in a folder and all below it, behind links too, by path."""

    def cannot_list(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # of a class without recordings, which its own check is for
            raise MisconfigurationException(
                f"The folder {error.filename} cannot be listed ({error.strerror}): what is in it would be missing "
                "without a word. Make it readable, or move it out of the corpus."
            ) from error

    found, seen = [], set()
    for parent, folders, files in os.walk(folder, onerror=cannot_list, followlinks=True):
        if os.path.realpath(parent) in seen:  # a link to a folder above itself
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        folders.sort()  # of a folder that two links lead to, the same is always the one that is listed
        found += [Path(parent, name) for name in (*folders, *files) if name.lower().endswith(".edf")]
    return sorted(found)


def split_by_subject(recordings: Sequence[Recording], val_fraction: float, seed: int) -> dict[Split, list[Recording]]:
    """Cut validation from the official train set so that no subject is in two splits.

    The official eval set is the test set. A subject of it that also has recordings under ``train`` is left out there,
    with a warning. Subjects with an abnormal recording and those without are divided in the same proportion.

    Args:
        recordings: All recordings of the corpus.
        val_fraction: Part of the train set's subjects that goes to validation, above 0 and below 1.
        seed: Of the division; it does not depend on the order of ``recordings``.

    Example:
        >>> recordings = [Recording(f"{n}.edf", f"subject {n}", n % 2, "train") for n in range(8)]
        >>> splits = split_by_subject(recordings, val_fraction=0.25, seed=0)
        >>> {name: len(split) for name, split in splits.items()}
        {'train': 6, 'val': 2, 'test': 0}
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

    Args:
        path: The EDF file.

    Returns:
        Array of shape (channels, samples), without a unit.

    Raises:
        ValueError: If the file cannot be read, is cut short, lacks a channel, is sampled too slowly, is too short for
            the filter or holds no signal.

    Example:
        >>> import tempfile
        >>> from lightning_stability.tuab import SyntheticCorpus, find_recordings, read_recording
        >>> corpus = SyntheticCorpus(train_subjects=2, eval_subjects=1, seconds=(20, 20))
        >>> root = corpus.write(tempfile.mkdtemp())
        >>> read_recording(root / find_recordings(root)[0].path).shape  # 20 seconds
        (19, 5120)
    """
    raw = _open_recording(Path(path))
    try:
        raw.load_data(verbose="error")
        raw.filter(*BAND, verbose="error")
        raw.resample(SAMPLING_RATE, method="polyphase", verbose="error")
        microvolts = raw.get_data(units="uV")
    except MemoryError:
        raise  # says nothing about the file
    except Exception as error:  # one odd file must not end the build of a whole cache
        raise ValueError(f"cannot be preprocessed: {error or type(error).__name__}") from error
    return robust_z_score(microvolts)


def _open_recording(path: Path) -> Any:
    """Open the 19 channels of one EDF file with mne, without loading them, and refuse what is of no use."""
    mne = need("mne")
    try:
        raw = mne.io.read_raw_edf(path, preload=False, verbose="error")
        promised, held = _data_records(path)
    except MemoryError:
        raise
    except Exception as error:  # mne raises whatever its parser stumbles over
        raise ValueError(f"not readable as EDF: {error or type(error).__name__}") from error
    if held < promised:  # mne would take what there is
        raise ValueError(f"cut short: its header promises {promised} data records, the file holds {held}")
    labels = [_DUPLICATE.sub("", label) for label in find_channels(raw.ch_names).values()]
    # read again without the other signals: mne samples all of a file's signals as often as the fastest one
    raw = mne.io.read_raw_edf(path, preload=False, include=labels, verbose="error")
    raw.pick(list(find_channels(raw.ch_names).values()))
    rate = raw.info["sfreq"]
    if rate <= 2 * BAND[1]:
        raise ValueError(f"sampled at {rate:g} Hz, too slowly for a band up to {BAND[1]:g} Hz")
    if raw.n_times / rate < FILTER_SECONDS:
        raise ValueError(f"{raw.n_times / rate:.1f} s long, shorter than the {FILTER_SECONDS:.1f} s of the filter")
    return raw


def _data_records(path: Path) -> tuple[int, int]:
    """Return how many data records an EDF file's header promises and how many whole ones the file holds.

    A header that promises none (-1 means that the recorder was not stopped) promises too little to be broken.
    """
    with path.open("rb") as file:
        header = file.read(256)
        length, promised, signals = int(header[184:192]), int(header[236:244]), int(header[252:256])
        file.seek(256 + 216 * signals)  # after the signals' labels, units, ranges and filters
        samples = [int(file.read(8)) for _ in range(signals)]
    return promised, (path.stat().st_size - length) // (2 * sum(samples))


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
    scaled = np.zeros(microvolts.shape, dtype=np.float32)
    constant = 0
    for channel, z in zip(microvolts, scaled, strict=True):  # one at a time, so that what is in between stays small
        low, middle, high = np.percentile(channel, (25, 50, 75))
        deviation = channel.std()
        if deviation < _LEAST_DEVIATION:
            constant += 1
            continue
        scale = (high - low) / 1.349
        z[:] = (channel - middle) / (deviation if scale < _LEAST_DEVIATION else scale)
    if constant == len(scaled):
        raise ValueError("all channels are constant")
    return scaled
