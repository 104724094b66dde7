import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_stability.tuab import TUABDataModule, WindowCache, WindowDataset, build_cache, find_recordings
from lightning_stability.tuab.corpus import read_recording


@pytest.fixture(scope="module")
def cache(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    build_cache(corpus, find_recordings(corpus), folder)
    return WindowCache(folder)


def test_the_cache_holds_each_recording_whole_in_fp16(corpus, cache):
    assert [r.path for r in cache.recordings] == [r.path for r in find_recordings(corpus)]
    for recording in cache.recordings[::5]:
        expected = read_recording(corpus / recording.path)
        rows = cache.read(cache.recordings.index(recording))
        np.testing.assert_array_equal(rows.T, expected.astype(np.float16))


@settings(deadline=None, max_examples=40)
@given(seconds=st.sampled_from([1, 2.5, 4, 8, 20, 26]), stride=st.sampled_from([0.5, 1, 4, 8, 30]), data=st.data())
def test_one_cache_serves_every_window_length_and_stride(cache, seconds, stride, data):
    indices = data.draw(st.lists(st.integers(0, len(cache.recordings) - 1), unique=True))
    dataset = WindowDataset(cache, indices, seconds, stride)
    length, step = round(seconds * 256), round(stride * 256)
    expected = [
        (number, start) for number in indices for start in range(0, cache.recordings[number].samples - length + 1, step)
    ]
    assert len(dataset) == len(expected)
    for index in {0, len(dataset) // 2, len(dataset) - 1} if expected else ():
        item, (number, start) = dataset[index], expected[index]
        recording = cache.recordings[number]
        rows = cache.read(number)[start : start + length]
        assert (int(item["recording"]), int(item["start"]), int(item["label"])) == (number, start, recording.label)
        assert item["eeg"].dtype == torch.float32
        np.testing.assert_array_equal(item["eeg"], rows.T)
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_a_dataset_goes_to_workers_without_the_array_and_its_open_file(cache):
    opened = WindowCache(cache.folder)
    dataset = WindowDataset(opened, range(len(opened.recordings)), 8, 4)
    first = dataset[0]["eeg"]
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 20_000
    del dataset, opened  # closes the file
    assert torch.equal(pickle.loads(pickled)[0]["eeg"], first)


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_the_same_windows_however_they_are_started(cache, start):
    dataset = WindowDataset(cache, range(len(cache.recordings)), 8, 4)
    dataset[0]  # the file is open when they start
    loader = torch.utils.data.DataLoader(dataset, batch_size=16, num_workers=2, multiprocessing_context=start)
    eeg = torch.cat([batch["eeg"] for batch in loader])
    assert torch.equal(eeg, torch.stack([dataset[index]["eeg"] for index in range(len(dataset))]))


def test_a_piece_beyond_a_recording_is_refused_and_so_is_a_file_that_became_shorter(corpus, tmp_path):
    build_cache(corpus, find_recordings(corpus)[:2], tmp_path)
    cache = WindowCache(tmp_path)
    samples = cache.recordings[1].samples
    assert cache.read(1, samples - 5, 5).shape == (5, 19)
    for start, length in ((samples - 5, 6), (-1, 3), (samples + 1, None)):
        with pytest.raises(IndexError, match="in edf/"):
            cache.read(1, start, length)
    os.truncate(tmp_path / "samples.f16", 1000)
    with pytest.raises(OSError, match=r"samples\.f16 is shorter than it was"):
        cache.read(1)


def test_reading_windows_adds_no_memory_to_the_process(cache):
    dataset = WindowDataset(cache, range(len(cache.recordings)), 8, 4)
    for index in range(len(dataset)):
        dataset[index]
    assert "samples.f16" not in Path("/proc/self/maps").read_text()


def test_broken_files_are_left_out_with_a_warning_and_their_reason_in_index_and_report(damaged_corpus, tmp_path):
    with pytest.warns(UserWarning, match="1 recordings were left out:\n  edf/train/.*: not readable as EDF"):
        build_cache(damaged_corpus, find_recordings(damaged_corpus), tmp_path)
    cache = WindowCache(tmp_path)
    assert next(iter(cache.skipped.values())).startswith("not readable as EDF")
    assert len(cache.recordings) + 1 == len(find_recordings(damaged_corpus))
    report = (tmp_path / "skipped.txt").read_text().splitlines()
    assert report[0] == f"1 of {len(find_recordings(damaged_corpus))} recordings were left out."
    assert report[1:] == [f"{path}: {reason}" for path, reason in cache.skipped.items()]


@pytest.mark.filterwarnings("ignore:.*left out")
@pytest.mark.filterwarnings("ignore:.*beyond the range of fp16")
def test_artefacts_arrive_at_their_full_size_and_stay_finite(damaged_corpus, tmp_path):
    build_cache(damaged_corpus, find_recordings(damaged_corpus), tmp_path)
    cache = WindowCache(tmp_path)
    samples = np.abs(np.concatenate([cache.read(number) for number in range(len(cache.recordings))]))
    assert np.isfinite(samples).all()
    assert samples.max() > 20_000


def test_values_beyond_fp16_are_cut_to_its_range_and_counted(tmp_path, corpus, monkeypatch):
    signal = np.ones((19, 512), dtype=np.float32)
    signal[0, :3] = [70_000, -1e6, 65_000]
    monkeypatch.setattr("lightning_stability.tuab.preprocessing.read_recording", lambda path: signal)
    with pytest.warns(UserWarning, match="2 of 9728 samples are beyond the range of fp16"):
        build_cache(corpus, find_recordings(corpus)[:1], tmp_path)
    assert WindowCache(tmp_path).read(0)[:3, 0].tolist() == [65504, -65504, 64992]


def test_a_build_in_which_nothing_can_be_read_fails_and_the_next_one_begins_anew(tmp_path, corpus):
    files = [tmp_path / "edf" / split / "normal" / "a_s001_t000.edf" for split in ("train", "eval")]
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_bytes(b"junk")
    with (
        pytest.warns(UserWarning, match="2 recordings were left out"),
        pytest.raises(MisconfigurationException, match=r"None of the 2 recordings .* reasons are in .*skipped\.txt"),
    ):
        build_cache(tmp_path, find_recordings(tmp_path), tmp_path / "cache")
    assert "edf/eval/normal/a_s001_t000.edf: not readable as EDF" in (tmp_path / "cache" / "skipped.txt").read_text()
    for file in files:
        shutil.copy(next(corpus.rglob("*.edf")), file)
    build_cache(tmp_path, find_recordings(tmp_path), tmp_path / "cache")
    assert len(WindowCache(tmp_path / "cache").recordings) == 2


@pytest.mark.filterwarnings("ignore:.*left out")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index, samples: index.write_text("{\n"), r"index\.jsonl cannot be read \(JSONDecodeError"),
        (lambda index, samples: index.write_text("[1]\n"), r"index\.jsonl cannot be read"),
        (lambda index, samples: index.unlink(), "holds no complete cache: 0 recordings are finished"),
        (lambda index, samples: cut_lines(index, 1), "holds no complete cache: 2 recordings are finished"),
        (lambda index, samples: cut_lines(index, 2), "holds no complete cache: 1 recordings are finished"),
        (lambda index, samples: os.truncate(samples, 1000), r"samples\.f16 has 1000 bytes, expected \d"),
        (lambda index, samples: samples.unlink(), r"samples\.f16 has 0 bytes, expected \d"),
        (lambda index, samples: samples.open("ab").write(b"x"), r"samples\.f16 has \d+ bytes, expected \d"),
        (
            lambda index, samples: edit(index, '"sampling_rate": 256', '"sampling_rate": 200'),
            "rate is 200, expected 256",
        ),
        (
            lambda index, samples: edit(index, '"band": [0.5, ', '"band": [1, '),
            r"band is \[1, 50.0\], expected \[0.5, ",
        ),
        (lambda index, samples: edit(index, '"format": 2', '"format": 3'), "format is 3, expected 2"),
        (
            lambda index, samples: index.with_name("index.json").write_text("{}"),
            r"format is 1 \(index\.json\), expected 2",
        ),
    ],
)
def test_a_cache_that_is_cut_short_or_of_other_settings_is_refused_with_the_difference(
    corpus, tmp_path, change, message
):
    recordings = find_recordings(corpus)[:2]
    build_cache(corpus, recordings, tmp_path)
    change(tmp_path / "index.jsonl", tmp_path / "samples.f16")
    with pytest.raises(MisconfigurationException, match=message):
        WindowCache(tmp_path)
    if "holds no complete cache" not in message:  # what is merely unfinished, a builder finishes
        with pytest.raises(MisconfigurationException, match=message):
            build_cache(corpus, recordings, tmp_path)


def cut_lines(index, count):
    index.write_text("".join(index.read_text().splitlines(keepends=True)[:-count]))


def edit(index, old, new):
    text = index.read_text()
    assert old in text
    index.write_text(text.replace(old, new))


def data_module(corpus, tmp_path, **options):
    module = TUABDataModule(root=str(corpus), cache_dir=str(tmp_path / "cache"), **options)
    module.prepare_data()
    module.setup("fit")
    return module


def test_training_windows_overlap_and_evaluation_windows_do_not(corpus, tmp_path):
    module = data_module(corpus, tmp_path)
    for split, stride in (("train", 4), ("val", 8), ("test", 8)):
        dataset = module.datasets[split]
        assert (dataset.length, dataset.stride) == (8 * 256, stride * 256)


def test_the_cache_is_built_once(corpus, tmp_path):
    folder = data_module(corpus, tmp_path).cache_folder
    before = [(folder / name).stat().st_mtime_ns for name in ("samples.f16", "index.jsonl", "skipped.txt")]
    data_module(corpus, tmp_path, window_seconds=4)
    assert [(folder / name).stat().st_mtime_ns for name in ("samples.f16", "index.jsonl", "skipped.txt")] == before


def test_two_corpora_of_one_name_do_not_share_a_cache(tmp_path):
    folders = {TUABDataModule(root=str(tmp_path / place / "tuab")).cache_folder for place in "ab"}
    assert len(folders) == 2


@pytest.mark.parametrize("change", ["another content", "gone", "new"])
def test_a_corpus_that_changed_since_it_was_cached_is_refused(corpus, tmp_path, change):
    copy = shutil.copytree(corpus, tmp_path / "copy")
    data_module(copy, tmp_path)
    first, second, *_ = sorted(copy.rglob("*.edf"))
    if change == "another content":
        shutil.copy(second, first)
    elif change == "gone":
        first.unlink()
    else:
        shutil.copy(first, first.with_name("new_s001_t000.edf"))
    with pytest.raises(
        MisconfigurationException, match=r"has changed since .* 1 files are new, gone or of another size"
    ):
        data_module(copy, tmp_path)


@pytest.mark.parametrize("split", ["eval", "train"])
def test_a_split_with_one_class_only_is_refused(corpus, tmp_path, split):
    copy = shutil.copytree(corpus, tmp_path / "copy")
    shutil.rmtree(copy / "edf" / split / "abnormal")
    with pytest.raises(MisconfigurationException, match="split has normal recordings only"):
        data_module(copy, tmp_path)


def test_training_batches_are_shuffled_anew_each_epoch_and_evaluation_batches_are_in_order(corpus, tmp_path):
    module = data_module(corpus, tmp_path)

    def order(loader):
        return [
            window
            for batch in loader
            for window in zip(batch["recording"].tolist(), batch["start"].tolist(), strict=True)
        ]

    train = module.train_dataloader()
    first, second = order(train), order(train)
    assert sorted(first) == sorted(second)
    assert len({tuple(first), tuple(second), tuple(sorted(first))}) == 3
    for loader in (module.val_dataloader(), module.test_dataloader(), module.predict_dataloader()):
        assert order(loader) == sorted(order(loader))


def test_workers_are_as_many_as_asked_for(corpus, tmp_path):
    module = data_module(corpus, tmp_path, num_workers=2)
    assert {module.train_dataloader().num_workers, module.val_dataloader().num_workers} == {2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_seconds": 0.2}, "window_seconds must be at least 0.25, got 0.2"),
        ({"stride_seconds": 0.001}, "stride_seconds must be at least 0.00390625, got 0.001"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"split_seed": -1}, "split_seed must be at least 0, got -1"),
        ({"val_fraction": 1.5}, "val_fraction must be between 0 and 1, got 1.5"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        TUABDataModule(**options)


def test_a_window_longer_than_the_recordings_is_refused(corpus, tmp_path):
    with pytest.raises(MisconfigurationException, match="train split has no window of 60 seconds"):
        data_module(corpus, tmp_path, window_seconds=60)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_train_loader_goes_on_where_its_state_was_taken(corpus, tmp_path, workers):
    module = data_module(corpus, tmp_path, batch_size=4, num_workers=workers)
    torch.manual_seed(0)
    loader = module.train_dataloader()
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    state = loader.state_dict()
    rest = [(batch["recording"].tolist(), batch["start"].tolist()) for batch in batches]
    resumed = module.train_dataloader()
    resumed.load_state_dict(state)
    assert [(batch["recording"].tolist(), batch["start"].tolist()) for batch in resumed] == rest
    assert len(rest) == len(loader) - 3


def test_recordings_without_a_window_are_counted_on_screen(corpus, tmp_path):
    with pytest.warns(UserWarning, match=r"of the train split are not used: they are shorter than a window of 27 sec"):
        module = data_module(corpus, tmp_path, window_seconds=27)
    dataset = module.datasets["train"]
    assert len(dataset.labels) == len(dataset) == len(list(dataset))


@pytest.mark.parametrize("balanced", [False, True])
def test_batches_are_pinned_where_there_is_a_gpu_and_balanced_when_asked(corpus, tmp_path, balanced):
    module = data_module(corpus, tmp_path, class_balanced=balanced)
    loader = module.train_dataloader()
    assert loader.pin_memory == torch.cuda.is_available()
    labels = torch.cat([batch["label"] for batch in loader])
    of_class = np.bincount(module.datasets["train"].labels)
    assert of_class[0] != of_class[1]
    expected = [len(labels) // 2, -(-len(labels) // 2)] if balanced else sorted(of_class)
    assert sorted(labels.bincount().tolist()) == expected
