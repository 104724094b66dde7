"""A corpus of made-up recordings in TUAB's layout, written as real EDF files.

The real corpus needs a licence, so the demo, the tests and the story of the crash run on this one. Both classes share
a background of 1/f noise and an occipital alpha rhythm; in abnormal recordings the rhythm is slower and weaker and one
hemisphere carries bouts of delta waves. Each of these overlaps between the classes, so no single one decides.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_stability.tuab._extra import need
from lightning_stability.tuab.channels import CHANNELS

Signals = npt.NDArray[np.float64]

_OLD_NAMES = {"T7": "T3", "T8": "T4", "P7": "T5", "P8": "T6"}
_EXTRA_LABELS = ("EEG EKG1-REF", "EEG A1-REF", "EEG A2-REF", "EEG T1-REF", "PHOTIC PH")
_SAMPLING_RATES = (250, 256, 400, 512)  # Hz; TUAB's files differ in theirs
_LEFT = ("F7", "F3", "T7", "C3", "P7", "P3")
_RIGHT = ("F8", "F4", "T8", "C4", "P8", "P4")
# How strongly the alpha rhythm is seen at an electrode: it comes from the back of the head.
_ALPHA_GAIN = {
    "O1": 1.0,
    "O2": 1.0,
    "PZ": 0.8,
    "P3": 0.8,
    "P4": 0.8,
    "P7": 0.6,
    "P8": 0.6,
    "CZ": 0.3,
    "C3": 0.3,
    "C4": 0.3,
}
_ARTEFACT_UV = 1e6  # an electrode that comes off, as amplifiers record it
_MAX_UV = 3_276.7  # the range of an ordinary file, in steps of 0.1 microvolts


@dataclass(frozen=True)
class SyntheticCorpus:
    """What to write, and how to tell one corpus from another.

    Args:
        train_subjects: Subjects under ``edf/train``; about every third has two recordings.
        eval_subjects: Subjects under ``edf/eval``, one recording each.
        seconds: Length of the shortest and the longest recording.
        artefacts: Number of recordings under ``edf/train`` in which electrodes come off: bursts of 1e6 microvolts.
        broken: Number of files that are cut off in the middle of their header.
        seed: The same seed gives the same bytes.

    Example::

        >>> import tempfile
        >>> from lightning_stability.tuab import SyntheticCorpus
        >>> root = SyntheticCorpus(train_subjects=2, eval_subjects=1, seconds=(20, 20)).write(tempfile.mkdtemp())
        >>> len(list(root.rglob("*.edf")))
        3
    """

    train_subjects: int = 72
    eval_subjects: int = 24
    seconds: tuple[int, int] = (60, 100)
    artefacts: int = 0
    broken: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("train_subjects", "eval_subjects", "artefacts", "broken", "seed"):
            if getattr(self, name) < 0:
                raise MisconfigurationException(f"{name} must not be negative, got {getattr(self, name)}.")

    def write(self, root: str | Path) -> Path:
        """Write the corpus under ``root`` and return it.

        The files appear under their final names only when all are written, so that a run that was interrupted leaves
        nothing that looks like a corpus.

        Raises:
            MisconfigurationException: If ``root`` holds a corpus already, or edfio is not installed.
        """
        root = Path(root)
        edf, partial = root / "edf", root / "edf.partial"
        if edf.exists():
            raise MisconfigurationException(
                f"{edf} exists already: choose an empty folder, or delete that one to write it anew."
            )
        shutil.rmtree(partial, ignore_errors=True)  # left by a run that was interrupted
        for recording in self._recordings():
            recording.write(partial)
        partial.rename(edf)
        return root

    def _recordings(self) -> list[_Recording]:
        """Lay out who is recorded how often; half of the subjects of either split are abnormal."""
        rng = np.random.default_rng([self.seed, 0])
        recordings: list[_Recording] = []
        for split, first, subjects in (
            ("train", 0, self.train_subjects),
            ("eval", self.train_subjects, self.eval_subjects),
        ):
            for number in range(subjects):
                abnormal = number % 2 == 1
                sessions = 2 if split == "train" and number % 6 >= 4 else 1
                for session in range(1, sessions + 1):
                    recordings.append(
                        _Recording(
                            split=split,
                            subject=f"aaaa{_letters(first + number)}",
                            session=session,
                            abnormal=abnormal,
                            seconds=int(rng.integers(self.seconds[0], self.seconds[1], endpoint=True)),
                            seed=(self.seed, 1, len(recordings)),
                        )
                    )
        train = [r for r in recordings if r.split == "train"]
        damaged = rng.permutation(len(train))
        for index in damaged[: self.artefacts]:
            train[index].artefact = True
        for index in damaged[self.artefacts : self.artefacts + self.broken]:
            train[index].broken = True
        return recordings


@dataclass
class _Recording:
    split: str
    subject: str
    session: int
    abnormal: bool
    seconds: int
    seed: tuple[int, ...]
    artefact: bool = False
    broken: bool = False

    def write(self, edf: Path) -> None:
        edfio = need("edfio")
        rng = np.random.default_rng(self.seed)
        rate = int(rng.choice(_SAMPLING_RATES))
        signals = dict(zip(CHANNELS, _brain(rng, rate, self.seconds, self.abnormal), strict=True))
        if self.artefact:
            _electrodes_come_off(rng, rate, signals)
        path = edf / self.split / ("abnormal" if self.abnormal else "normal") / "01_tcp_ar"
        path.mkdir(parents=True, exist_ok=True)
        path = path / f"{self.subject}_s{self.session:03d}_t000.edf"
        edfio.Edf([self._signal(label, rate, data) for label, data in _as_in_files(rng, rate, signals)]).write(path)
        if self.broken:
            path.write_bytes(path.read_bytes()[:300])

    def _signal(self, label: str, rate: int, data: Signals) -> object:
        limit = _MAX_UV if np.abs(data).max() <= _MAX_UV else 1.1 * _ARTEFACT_UV
        return need("edfio").EdfSignal(data, rate, label=label, physical_dimension="uV", physical_range=(-limit, limit))


def _brain(rng: np.random.Generator, rate: int, seconds: int, abnormal: bool) -> Signals:
    """Return the 19 channels of one recording in microvolts, (channels, samples)."""
    time = np.arange(rate * seconds) / rate
    shared, own = _pink_noise(rng, rate, len(time), 1), _pink_noise(rng, rate, len(time), len(CHANNELS))
    signals = 10.0 * (0.6 * shared + 0.8 * own) + rng.normal(0, rng.uniform(1, 4), (len(CHANNELS), len(time)))

    frequency = rng.normal(8.0, 0.8) if abnormal else rng.normal(9.8, 0.8)
    amplitude = rng.uniform(5, 14) if abnormal else rng.uniform(8, 20)
    phase = 2 * np.pi * np.cumsum(frequency + 0.4 * _pink_noise(rng, rate, len(time), 1)[0]) / rate
    waxing = np.clip(1 + 0.5 * _bouts(rng, time), 0.1, None)
    gains = np.array([_ALPHA_GAIN.get(name, 0.15) for name in CHANNELS])
    signals += amplitude * gains[:, None] * waxing * np.sin(phase)

    # Drowsy normal subjects have some slow waves too, on both sides and less of them.
    slow = rng.uniform(6, 18) if abnormal else rng.uniform(0, 8)
    wave = slow * np.clip(_bouts(rng, time), 0, None) * np.sin(2 * np.pi * rng.uniform(1.2, 3.0) * time)
    side = (_LEFT, _RIGHT)[int(rng.integers(2))] if abnormal else _LEFT + _RIGHT
    for index, name in enumerate(CHANNELS):
        signals[index] += wave * (1.0 if name in side else 0.2)
    return signals


def _pink_noise(rng: np.random.Generator, rate: int, samples: int, channels: int) -> Signals:
    """Return noise of unit variance whose power falls with 1/f above 1 Hz, (channels, samples)."""
    spectrum = np.fft.rfft(rng.standard_normal((channels, samples)))
    spectrum /= np.sqrt(np.maximum(np.fft.rfftfreq(samples, 1 / rate), 1.0))
    noise = np.fft.irfft(spectrum, samples)
    return np.asarray(noise / noise.std(axis=1, keepdims=True))


def _bouts(rng: np.random.Generator, time: Signals) -> Signals:
    """Return a slow envelope of about unit size: rhythms come and go within seconds."""
    periods, phases = rng.uniform(3, 15, 4), rng.uniform(0, 2 * np.pi, 4)
    return np.asarray(sum(np.sin(2 * np.pi * time / p + f) for p, f in zip(periods, phases, strict=True)) / np.sqrt(2))


def _electrodes_come_off(rng: np.random.Generator, rate: int, signals: dict[str, Signals]) -> None:
    """Put a second of ``_ARTEFACT_UV`` into four channels, in place."""
    seconds = signals["CZ"].size // rate
    start = int(rng.integers(seconds // 6, seconds - seconds // 6)) * rate
    for name in rng.choice(CHANNELS, size=4, replace=False):
        # a loose electrode jumps between the ends of the amplifier's range
        swing = np.sin(2 * np.pi * rng.uniform(2, 8) * np.arange(rate) / rate)
        signals[name][start : start + rate] = _ARTEFACT_UV * np.sign(swing)


def _as_in_files(rng: np.random.Generator, rate: int, signals: dict[str, Signals]) -> list[tuple[str, Signals]]:
    """Return the signals as labs store them: any order, old or new names, mixed case, other signals between them."""
    suffix = ("-REF", "-LE")[int(rng.integers(2))]
    old, lower = bool(rng.integers(2)), rng.random() < 0.2
    named = []
    for name, data in signals.items():
        label = f"EEG {_OLD_NAMES.get(name, name) if old else name}{suffix}"
        named.append((label.replace("FP", "Fp").replace("Z", "z") if lower else label, data))
    for label in rng.permutation(_EXTRA_LABELS)[: int(rng.integers(2, 5))]:
        named.append((str(label), 100 * _pink_noise(rng, rate, signals["CZ"].size, 1)[0]))
    return [named[index] for index in rng.permutation(len(named))]


def _letters(number: int) -> str:
    """Spell a number below 26**4 as four letters, as TUAB names its subjects."""
    return "".join(chr(ord("a") + number // 26**place % 26) for place in (3, 2, 1, 0))
