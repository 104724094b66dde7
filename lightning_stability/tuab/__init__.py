"""The included trainer: the EEGPT linear probe on the TUAB EEG corpus.

It uses the package as any project would, and nothing of the package depends on it. Its dependencies come with the
``tuab`` extra and are loaded when they are needed.
"""

from lightning_stability.tuab.building import build_cache
from lightning_stability.tuab.cache import WindowCache, WindowDataset
from lightning_stability.tuab.channels import CHANNELS, EEGPT_CHANNELS
from lightning_stability.tuab.corpus import Recording, find_recordings, read_recording, split_by_subject
from lightning_stability.tuab.data import TUABDataModule
from lightning_stability.tuab.encoder import EEGPTEncoder, load_pretrained
from lightning_stability.tuab.probe import EEGPTProbe
from lightning_stability.tuab.synthetic import SyntheticCorpus

__all__ = [
    "CHANNELS",
    "EEGPT_CHANNELS",
    "EEGPTEncoder",
    "EEGPTProbe",
    "Recording",
    "SyntheticCorpus",
    "TUABDataModule",
    "WindowCache",
    "WindowDataset",
    "build_cache",
    "find_recordings",
    "load_pretrained",
    "read_recording",
    "split_by_subject",
]
