import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_stability.tuab.channels import CHANNELS, EEGPT_CHANNELS, electrode, embedding_rows, find_channels

OLD = {"T7": "T3", "T8": "T4", "P7": "T5", "P8": "T6"}
OTHERS = [
    "EEG EKG1-REF",
    "EEG A1-REF",
    "EEG T1-REF",
    "EEG T2-REF",
    "PHOTIC PH",
    "IBI",
    "BURSTS",
    "EEG 26-REF",
    "EMG-REF",
]


@given(
    order=st.permutations(CHANNELS),
    spelling=st.sampled_from(["EEG {}-REF", "EEG {}-LE", "{}", "{}-LE", "eeg {}-ref", "EEG {}-REF-0", " EEG {}-REF "]),
    old=st.booleans(),
    lower=st.booleans(),
    others=st.lists(st.sampled_from(OTHERS), unique=True),
)
def test_the_19_channels_are_found_whatever_their_order_case_suffix_and_old_names(order, spelling, old, lower, others):
    def label(name: str) -> str:
        written = spelling.format(OLD.get(name, name) if old else name)
        return written.lower() if lower else written

    found = find_channels([*others, *(label(name) for name in order)])
    assert found == {name: label(name) for name in CHANNELS}
    assert list(found) == list(CHANNELS)


def test_missing_channels_are_named():
    labels = [f"EEG {name}-REF" for name in CHANNELS if name not in ("CZ", "O2")]
    with pytest.raises(ValueError, match=re.escape("2 of 19 channels are missing: CZ, O2")):
        find_channels(labels)


def test_the_first_of_two_labels_for_one_electrode_counts():
    labels = [f"EEG {name}-REF" for name in CHANNELS]
    assert find_channels([*labels, "EEG T3-REF"])["T7"] == "EEG T7-REF"


@pytest.mark.parametrize("label", ["PHOTIC PH", "", "EEG -REF", "IBI 1 2", "EEG 26-REF"])
def test_labels_that_name_no_electrode_are_not_taken_for_one(label):
    assert electrode(label) is None


def test_eegpt_knows_62_channels_and_all_of_ours():
    assert len(EEGPT_CHANNELS) == len(set(EEGPT_CHANNELS)) == 62
    assert [EEGPT_CHANNELS[row] for row in embedding_rows(CHANNELS)] == list(CHANNELS)
    with pytest.raises(MisconfigurationException, match="no embedding for A1"):
        embedding_rows(["FP1", "A1"])
