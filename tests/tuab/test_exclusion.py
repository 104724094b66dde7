"""What a run's InputCheck flagged is left out of the next run's training set."""

import csv

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_stability.tuab import TUABDataModule, WindowCache, WindowDataset
from lightning_stability.tuab.exclusion import RemainingWindows, describe_window, parse_window

COLUMNS = ["epoch", "batch_idx", "rank", "sample", "dataset_index", "description", "tensor", "reason", "value"]


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("caches"))


def data_module(corpus, cache_dir, **options):
    module = TUABDataModule(root=str(corpus), cache_dir=cache_dir, batch_size=4, **options)
    module.prepare_data()
    module.setup("fit")
    return module


def write_flagged(path, descriptions, columns=COLUMNS):
    with path.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(columns)
        rows.writerows(
            [0, 7, 0, "" if d is None else 3, "", d or "", "batch['eeg']", "scale", 2e4] for d in descriptions
        )
    return str(path)


def windows_of(dataset):
    return [(int(item["recording"]), int(item["start"])) for item in map(dataset.__getitem__, range(len(dataset)))]


@settings(max_examples=50)
@given(path=st.from_regex(r"[ -~]+", fullmatch=True), start=st.integers(0, 2**31))
def test_a_window_is_described_in_a_form_that_can_be_parsed_back(path, start):
    assert parse_window(describe_window(path, start)) == (path, start)


def test_a_sample_of_a_batch_is_described_by_its_recording_and_start(corpus, cache_dir):
    module = data_module(corpus, cache_dir)
    batch = next(iter(module.train_dataloader()))
    for index in range(4):
        path, start = parse_window(module.describe_sample(batch, index))
        assert path == module.cache.recordings[batch["recording"][index]].path
        assert start == batch["start"][index]


def test_only_the_windows_that_the_file_names_are_left_out_of_training_and_of_nothing_else(
    corpus, cache_dir, tmp_path, caplog
):
    whole = data_module(corpus, cache_dir)
    train, validated = windows_of(whole.datasets["train"]), windows_of(whole.datasets["val"])
    chosen = [train[0], train[5], train[6], train[-1], train[5], validated[0]]
    described = [describe_window(whole.cache.recordings[number].path, start) for number, start in chosen]
    file = write_flagged(tmp_path / "flagged_inputs.csv", [*described, None])
    rest = data_module(corpus, cache_dir, exclude=file)
    assert windows_of(rest.datasets["train"]) == [w for w in train if w not in chosen]
    assert windows_of(rest.datasets["val"]) == validated
    seen = [
        tuple(w)
        for b in rest.train_dataloader()
        for w in zip(b["recording"].tolist(), b["start"].tolist(), strict=True)
    ]
    assert sorted(seen) == sorted(windows_of(rest.datasets["train"]))
    numbers = len({chosen[i][0] for i in range(4)})
    assert f"4 windows of {numbers} recordings are left out of the training set" in caplog.text


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_what_remains_is_the_whole_without_the_excluded_in_the_same_order(corpus, cache_dir, data):
    cache = WindowCache(data_module(corpus, cache_dir).cache_folder)
    whole = WindowDataset(cache, data.draw(st.lists(st.integers(0, 5), unique=True, min_size=1)), 8, 4)
    excluded = data.draw(st.lists(st.integers(0, len(whole) - 1)))
    rest = RemainingWindows(whole, excluded)
    kept = [number for number in range(len(whole)) if number not in excluded]
    assert len(rest) == len(kept)
    for index, number in enumerate(kept):
        assert torch.equal(rest[index]["eeg"], whole[number]["eeg"])
        assert torch.equal(rest[index - len(kept)]["start"], whole[number]["start"])
    assert np.array_equal(rest.labels, [int(whole[number]["label"]) for number in kept])
    with pytest.raises(IndexError):
        rest[len(kept)]


class TestRefusals:
    def refusal(self, corpus, cache_dir, file):
        with pytest.raises(MisconfigurationException) as caught:
            data_module(corpus, cache_dir, exclude=str(file))
        assert str(file) in str(caught.value)
        return str(caught.value)

    def test_a_file_that_is_not_there(self, corpus, cache_dir, tmp_path):
        assert "FileNotFoundError" in self.refusal(corpus, cache_dir, tmp_path / "nothing.csv")

    def test_another_table(self, corpus, cache_dir, tmp_path):
        (tmp_path / "metrics.csv").write_text("epoch,train_loss\n0,1.0\n")
        assert "has no column batch_idx, rank" in self.refusal(corpus, cache_dir, tmp_path / "metrics.csv")

    def test_a_file_that_is_no_table(self, corpus, cache_dir, tmp_path):
        (tmp_path / "weights.ckpt").write_bytes(b"PK\x03\x04\xff\xfe\x00")
        self.refusal(corpus, cache_dir, tmp_path / "weights.ckpt")

    def test_a_file_of_a_run_on_other_data(self, corpus, cache_dir, tmp_path):
        file = write_flagged(tmp_path / "flagged.csv", ["subject 12, 96 s"])
        assert "'subject 12, 96 s', which is no window" in self.refusal(corpus, cache_dir, file)

    def test_recordings_that_are_not_there(self, corpus, cache_dir, tmp_path):
        file = write_flagged(tmp_path / "flagged.csv", ["edf/train/normal/01_tcp_ar/zz_s001_t000.edf, window at 4 s"])
        assert "1 recordings that are not in this corpus (edf/train/normal/" in self.refusal(corpus, cache_dir, file)

    def test_windows_of_another_stride(self, corpus, cache_dir, tmp_path):
        module = data_module(corpus, cache_dir)
        recording = module.cache.recordings[module.datasets["train"].indices[0]]
        for start in (2 * 256, 4000 * 256):
            file = write_flagged(tmp_path / "flagged.csv", [describe_window(recording.path, start)])
            assert "none of this run's windows" in self.refusal(corpus, cache_dir, file)

    def test_every_window(self, corpus, cache_dir, tmp_path):
        module = data_module(corpus, cache_dir)
        recordings = module.cache.recordings
        named = [describe_window(recordings[n].path, start) for n, start in windows_of(module.datasets["train"])]
        file = write_flagged(tmp_path / "flagged.csv", named)
        assert "every window of the training set" in self.refusal(corpus, cache_dir, file)
