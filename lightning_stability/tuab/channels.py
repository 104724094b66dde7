"""Names of EEG channels: the 19 that the probe reads, the 62 that EEGPT knows, and how EDF files spell them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pytorch_lightning.utilities.exceptions import MisconfigurationException

CHANNELS = ("FP1", "FP2", "F7", "F3", "FZ", "F4", "F8", "T7", "C3", "CZ",
            "C4", "T8", "P7", "P3", "PZ", "P4", "P8", "O1", "O2")  # fmt: skip
"""The 19 electrodes of the international 10-20 system, in the order in which recordings are cached."""

EEGPT_CHANNELS = (
    "FP1", "FPZ", "FP2", "AF7", "AF3", "AF4", "AF8", "F7", "F5", "F3", "F1", "FZ", "F2", "F4", "F6", "F8",
    "FT7", "FC5", "FC3", "FC1", "FCZ", "FC2", "FC4", "FC6", "FT8", "T7", "C5", "C3", "C1", "CZ", "C2", "C4",
    "C6", "T8", "TP7", "CP5", "CP3", "CP1", "CPZ", "CP2", "CP4", "CP6", "TP8", "P7", "P5", "P3", "P1", "PZ",
    "P2", "P4", "P6", "P8", "PO7", "PO5", "PO3", "POZ", "PO4", "PO6", "PO8", "O1", "OZ", "O2",
)  # fmt: skip
"""The rows of EEGPT's channel embedding, in order."""

# The 10-20 system of 1958 called four electrodes otherwise than the 10-10 system, whose names EEGPT uses.
_OLD_NAMES = {"T3": "T7", "T4": "T8", "T5": "P7", "T6": "P8"}
# "EEG FP1-REF", "fp1-le", "Fp1": a type before the electrode, the reference after it. A trailing "-0" is what
# mne appends when a file holds the same label twice.
_LABEL = re.compile(r"^(?:EEG\s+)?([A-Z]+[0-9]*)(?:-(?:REF|LE|AR|AVG))?(?:-[0-9]+)?$")


def electrode(label: str) -> str | None:
    """Return the 10-10 name of the electrode that an EDF label names, or None if it names none.

    Args:
        label: A signal label as it stands in the file, in any case.

    Example::

        >>> electrode("EEG T3-REF"), electrode("fp1-le"), electrode("EEG EKG1-REF"), electrode("PHOTIC PH")
        ('T7', 'FP1', 'EKG1', None)
    """
    match = _LABEL.match(label.strip().upper())
    return None if match is None else _OLD_NAMES.get(match[1], match[1])


def find_channels(labels: Sequence[str]) -> dict[str, str]:
    """Map each of the 19 :data:`CHANNELS`, in their order, to the label that carries it.

    Args:
        labels: The labels of one file, in any order; labels of other signals are ignored. Where two name the
            same electrode, the first one counts.

    Raises:
        ValueError: If electrodes are missing; the message names them.

    Example::

        >>> find_channels(["EEG O1-LE"])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: 18 of 19 channels are missing: FP1, FP2, ...
    """
    found: dict[str, str] = {}
    for label in labels:
        name = electrode(label)
        if name is not None:
            found.setdefault(name, label)
    missing = [name for name in CHANNELS if name not in found]
    if missing:
        raise ValueError(f"{len(missing)} of {len(CHANNELS)} channels are missing: {', '.join(missing)}")
    return {name: found[name] for name in CHANNELS}


def embedding_rows(names: Sequence[str]) -> list[int]:
    """Return the rows of EEGPT's channel embedding that belong to ``names``.

    Raises:
        MisconfigurationException: If EEGPT does not know a name.
    """
    unknown = [name for name in names if name not in EEGPT_CHANNELS]
    if unknown:
        raise MisconfigurationException(
            f"EEGPT has no embedding for {', '.join(unknown)}; it knows {', '.join(EEGPT_CHANNELS)}."
        )
    return [EEGPT_CHANNELS.index(name) for name in names]
