import hashlib

import mne
import numpy as np
import pytest
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_stability.tuab import SyntheticCorpus, find_recordings, read_recording, split_by_subject
from lightning_stability.tuab.channels import electrode
from lightning_stability.tuab.synthetic import _Recording

SMALL = {"train_subjects": 12, "eval_subjects": 4, "seconds": (24, 30)}


def digests(root):
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*.edf"))
    }


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(corpus, tmp_path):
    again = SyntheticCorpus(**SMALL).write(tmp_path / "again")
    other = SyntheticCorpus(**SMALL, seed=7).write(tmp_path / "other")
    assert digests(again) == digests(corpus)
    assert not set(digests(other).values()) & set(digests(corpus).values())


def test_artefacts_change_only_the_recordings_that_have_them(corpus, tmp_path):
    damaged = digests(SyntheticCorpus(**SMALL, artefacts=2, broken=1).write(tmp_path))
    intact = digests(corpus)
    changed = [path for path in intact if intact[path] != damaged[path]]
    assert len(changed) == 3
    assert all(path.startswith("edf/train/") for path in changed)


def test_files_differ_as_a_real_corpus_does(corpus):
    raws = [mne.io.read_raw_edf(path, verbose="error") for path in sorted(corpus.rglob("*.edf"))]
    assert len({raw.info["sfreq"] for raw in raws}) >= 3
    assert len({tuple(map(electrode, raw.ch_names)) for raw in raws}) > len(raws) // 2
    labels = {label for raw in raws for label in raw.ch_names}
    assert {"EEG T3-REF", "EEG T7-REF"} & labels
    assert {"EEG T3-LE", "EEG T7-LE"} & labels
    assert any("EKG" in label for label in labels)


def test_the_default_corpus_has_20_recordings_of_both_classes_in_validation_and_test():
    recordings = SyntheticCorpus()._recordings()  # the layout alone; the demo's test writes all of it
    assert len({(r.subject, r.session) for r in recordings}) == len(recordings)
    assert sum(r.split == "eval" for r in recordings) >= 20
    assert sum(r.split == "train" for r in recordings) * 0.25 >= 20
    for split in ("train", "eval"):
        part = [r.abnormal for r in recordings if r.split == split]
        assert 0.4 < np.mean(part) < 0.6


def test_artefacts_are_a_million_microvolts_in_a_few_seconds(damaged_corpus):
    largest = {}
    for recording in find_recordings(damaged_corpus):
        try:
            signal = read_recording(damaged_corpus / recording.path)
        except ValueError:
            continue
        raw = mne.io.read_raw_edf(damaged_corpus / recording.path, verbose="error").get_data() * 1e6
        largest[recording.path] = np.abs(raw).max()
        if largest[recording.path] > 1e5:
            assert largest[recording.path] == pytest.approx(1e6, rel=1e-3)
            touched = (np.abs(signal) > 100).any(axis=0)
            assert 0 < touched.mean() < 0.6
    assert sum(value > 1e5 for value in largest.values()) == 4


def test_splits_of_a_written_corpus_share_no_subject(corpus):
    splits = split_by_subject(find_recordings(corpus), 0.25, 0)
    subjects = [{r.subject for r in part} for part in splits.values()]
    assert all(subjects)
    assert len(set.union(*subjects)) == sum(map(len, subjects))
    sessions = [r.subject for r in find_recordings(corpus)]
    assert len(sessions) > len(set(sessions)), "no subject has two recordings, so the split is not put to the test"


@pytest.mark.parametrize("name", ["artefacts", "broken", "seed", "train_subjects"])
def test_negative_numbers_are_refused(name):
    with pytest.raises(MisconfigurationException, match=f"{name} must not be negative, got -1"):
        SyntheticCorpus(**{name: -1})


def test_an_interrupted_write_leaves_no_corpus_and_nothing_of_it_stays_in_the_next(corpus, tmp_path, monkeypatch):
    written = []
    write = _Recording.write

    def interrupted(self, edf):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(self)
        write(self, edf)

    monkeypatch.setattr(_Recording, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        SyntheticCorpus(**SMALL, seed=3).write(tmp_path)
    assert not (tmp_path / "edf").exists()
    monkeypatch.undo()
    assert digests(SyntheticCorpus(**SMALL).write(tmp_path)) == digests(corpus)


def test_a_folder_that_holds_a_corpus_is_not_overwritten(corpus):
    before = digests(corpus)
    with pytest.raises(MisconfigurationException, match="exists already"):
        SyntheticCorpus(**SMALL, seed=5).write(corpus)
    assert digests(corpus) == before
