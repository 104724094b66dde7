import os
import shutil

import numpy as np
import pytest
from edfio import Edf, EdfSignal
from hypothesis import given
from hypothesis import strategies as st
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_stability.tuab.channels import CHANNELS
from lightning_stability.tuab.corpus import (
    SAMPLING_RATE,
    Recording,
    find_recordings,
    read_recording,
    robust_z_score,
    split_by_subject,
)

recordings_of_some_subjects = st.lists(
    st.builds(
        lambda subject, label, split, session: Recording(
            f"edf/{split}/{label}/{subject}_s{session:03d}_t000.edf", f"subject{subject}", label, split
        ),
        st.integers(0, 15),
        st.integers(0, 1),
        st.sampled_from(["train", "train", "train", "eval"]),
        st.integers(1, 3),
    ),
    unique_by=lambda recording: recording.path,
    min_size=1,
)


@pytest.mark.filterwarnings("ignore:.*are in both edf/train and edf/eval")
@given(recordings=recordings_of_some_subjects, fraction=st.floats(0.05, 0.95), seed=st.integers(0, 99), data=st.data())
def test_no_subject_is_in_two_splits(recordings, fraction, seed, data):
    splits = split_by_subject(recordings, fraction, seed)
    subjects = {split: {recording.subject for recording in part} for split, part in splits.items()}
    assert not subjects["train"] & subjects["val"]
    assert not subjects["train"] & subjects["test"]
    assert not subjects["val"] & subjects["test"]
    assert splits["test"] == [recording for recording in recordings if recording.official_split == "eval"]
    # who is where does not depend on the order in which the file system lists the files
    shuffled = split_by_subject(data.draw(st.permutations(recordings)), fraction, seed)
    assert {s: sorted(r.path for r in part) for s, part in splits.items()} == {
        s: sorted(r.path for r in part) for s, part in shuffled.items()
    }


def test_a_subject_of_the_test_set_is_left_out_of_training_with_a_warning():
    train = [Recording(f"{name}.edf", name, 0, "train") for name in ("a", "b", "c", "d")]
    with pytest.warns(UserWarning, match=r"1 subjects are in both .* \(b"):
        splits = split_by_subject([*train, Recording("e/b.edf", "b", 0, "eval")], 0.3, 0)
    assert {r.subject for r in splits["train"] + splits["val"]} == {"a", "c", "d"}


def test_validation_has_both_classes_in_the_proportion_of_the_train_set():
    train = [Recording(f"{n}.edf", f"s{n}", int(n < 20), "train") for n in range(100)]
    val = split_by_subject(train, 0.25, 0)["val"]
    assert (len(val), sum(r.label for r in val)) == (25, 5)


def test_recordings_are_found_with_subject_label_and_official_split(corpus):
    recordings = find_recordings(corpus)
    assert {(r.official_split, r.label) for r in recordings} == {("train", 0), ("train", 1), ("eval", 0), ("eval", 1)}
    for recording in recordings:
        assert (corpus / recording.path).is_file()
        assert f"/{('normal', 'abnormal')[recording.label]}/" in recording.path
        assert recording.path.rsplit("/", 1)[1].startswith(recording.subject + "_s")


def test_a_missing_folder_and_another_layout_are_refused_with_what_was_expected(tmp_path, corpus):
    with pytest.raises(MisconfigurationException, match=r"no folder .*nowhere"):
        find_recordings(tmp_path / "nowhere")
    with pytest.raises(MisconfigurationException, match=r"no recordings under edf/train\. Expected TUAB's layout"):
        find_recordings(tmp_path)
    with pytest.raises(MisconfigurationException, match=r"did you mean .*small"):
        find_recordings(corpus / "edf")


def test_recordings_behind_links_and_in_capitals_are_found(tmp_path, corpus):
    root = tmp_path / "corpus"
    shutil.copytree(corpus, root)
    before = find_recordings(root)
    folder = root / "edf" / "train" / "normal" / "01_tcp_ar"
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "again").symlink_to(folder.parent)  # which leads back to itself
    assert find_recordings(root) == before
    first = next((tmp_path / "elsewhere").glob("*.edf"))
    first.rename(first.with_suffix(".EDF"))
    assert len(find_recordings(root)) == len(before)


def test_of_many_links_to_one_folder_the_first_by_name_is_listed(tmp_path, corpus):
    root = tmp_path / "root"
    shutil.copytree(corpus, root)
    folder = root / "edf" / "train" / "normal"
    found = len(find_recordings(root))
    [linked] = [path for path in folder.iterdir() if path.is_dir()]
    linked.rename(tmp_path / "elsewhere")
    for name in ("f", "c", "h", "a", "e", "b", "g", "d"):
        (folder / name).symlink_to(tmp_path / "elsewhere")
    names = [recording.path for recording in find_recordings(root)]
    assert len(names) == found
    assert {name.split("/")[3] for name in names if name.startswith("edf/train/normal/")} == {"a"}


def test_a_folder_that_cannot_be_listed_is_an_error_and_not_a_smaller_corpus(tmp_path, corpus):
    root = tmp_path / "corpus"
    shutil.copytree(corpus, root)
    closed = root / "edf" / "train" / "abnormal" / "02_tcp_le"
    closed.mkdir(mode=0)
    for folder in (tmp_path, *tmp_path.parents):
        if "pytest" in str(folder):
            folder.chmod(0o755)  # pytest's are its user's own
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:  # who may list everything
                os.setuid(65534)
            find_recordings(root)
        except MisconfigurationException as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader) as said:
        assert "02_tcp_le cannot be listed (Permission denied)" in said.read()
    closed.chmod(0o755)


def write_edf(path, signals, rate=250, unit="uV", suffix="-REF"):
    Edf(
        [
            EdfSignal(x, rate, label=f"EEG {n}{suffix}", physical_dimension=unit, physical_range=(-4000, 4000))
            for n, x in signals.items()
        ]
    ).write(path)
    return path


def sines(rate, seconds=20, hertz=10.0):
    time = np.arange(rate * seconds) / rate
    return {name: (20 + index) * np.sin(2 * np.pi * hertz * time + index) for index, name in enumerate(CHANNELS)}


@pytest.mark.parametrize("rate", [200, 250, 256, 400, 512, 1000])
def test_whatever_the_sampling_rate_a_recording_comes_out_at_256_hz_with_its_rhythm_in_place(tmp_path, rate):
    signal = read_recording(write_edf(tmp_path / "a.edf", sines(rate), rate))
    assert signal.dtype == np.float32
    assert signal.shape == (19, 20 * SAMPLING_RATE)
    time = np.arange(20 * SAMPLING_RATE) / SAMPLING_RATE
    middle = slice(5 * SAMPLING_RATE, 15 * SAMPLING_RATE)
    for index in range(19):
        expected = np.sin(2 * np.pi * 10 * time + index)
        assert np.corrcoef(signal[index, middle], expected[middle])[0, 1] > 0.999


def test_channels_come_in_our_order_whatever_the_files(tmp_path):
    signals = sines(256)
    signals["CZ"] = np.random.default_rng(0).normal(0, 50, signals["CZ"].size)
    forwards = read_recording(write_edf(tmp_path / "a.edf", signals, 256))
    backwards = read_recording(write_edf(tmp_path / "b.edf", dict(reversed(signals.items())), 256, suffix="-LE"))
    np.testing.assert_array_equal(forwards, backwards)
    assert np.corrcoef(forwards[CHANNELS.index("CZ")], forwards[0])[0, 1] < 0.2


@pytest.mark.parametrize("unit", ["uV", "mV"])
def test_the_unit_of_the_file_makes_no_difference_to_the_scaled_signal(tmp_path, unit):
    reference = read_recording(write_edf(tmp_path / "a.edf", sines(256), 256))
    np.testing.assert_allclose(
        read_recording(write_edf(tmp_path / "b.edf", sines(256), 256, unit)), reference, atol=1e-4
    )


@pytest.mark.parametrize(("hertz", "kept"), [(0.1, False), (2, True), (30, True), (60, False), (100, False)])
def test_only_the_band_from_half_a_hertz_to_50_is_kept(tmp_path, hertz, kept):
    signals = sines(512, seconds=40, hertz=10)
    rhythm = np.abs(signals["CZ"]).max()
    signals["CZ"] = signals["CZ"] + 200 * np.sin(2 * np.pi * hertz * np.arange(512 * 40) / 512)
    signal = read_recording(write_edf(tmp_path / "a.edf", signals, 512))[CHANNELS.index("CZ")]
    spectrum = np.abs(np.fft.rfft(signal[10 * 256 : 30 * 256]))
    # the wave's size relative to the rhythm's, which is in the middle of the band, after and before
    gain = spectrum[round(hertz * 20)] / spectrum[10 * 20] / (200 / rhythm)
    assert 0.9 < gain < 1.1 if kept else gain < 0.1


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:300]), "not readable as EDF"),
        (lambda path: path.write_text("no EDF at all"), "not readable as EDF"),
        (lambda path: path.write_bytes(b""), "not readable as EDF"),
        (lambda path: write_edf(path, {"FP1": np.zeros(2500)}), "18 of 19 channels are missing"),
        (lambda path: write_edf(path, sines(100), 100), "sampled at 100 Hz, too slowly"),
        (lambda path: write_edf(path, {name: np.zeros(5000) for name in CHANNELS}), "all channels are constant"),
        (
            lambda path: os.truncate(path, path.stat().st_size - 1),
            "cut short: its header promises 20 data records, the f",
        ),
        (lambda path: os.truncate(path, path.stat().st_size // 2), "promises 20 data records, the file holds 9"),
        (
            lambda path: write_edf(path, sines(256, seconds=6), 256),
            r"6\.0 s long, shorter than the 6\.6 s of the filter",
        ),
        (lambda path: path.unlink(), "not readable as EDF: .*(No such file|does not exist)"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_its_reason(tmp_path, damage, reason):
    damage(write_edf(tmp_path / "a.edf", sines(250)))
    with pytest.raises(ValueError, match=reason):
        read_recording(tmp_path / "a.edf")


@given(scale=st.floats(1e-2, 1e4), offset=st.floats(-1e3, 1e3), seed=st.integers(0, 99))
def test_robust_z_scores_of_a_normal_signal_are_ordinary_z_scores(scale, offset, seed):
    noise = np.random.default_rng(seed).standard_normal((2, 20_000))
    z = robust_z_score(scale * noise + offset)
    np.testing.assert_allclose(z, noise, atol=0.15)


def test_an_artefact_does_not_shrink_the_rest_of_its_recording():
    noise = np.random.default_rng(0).normal(0, 20, (1, 20_000))
    noise[0, 5000:5250] = 1e6
    z = robust_z_score(noise)
    assert 0.9 < z[0, 6000:].std() < 1.1
    assert z[0, 5100] > 40_000


def test_a_flat_channel_becomes_zero_and_one_with_rare_jumps_stays_finite():
    rng = np.random.default_rng(0)
    signals = np.stack([rng.standard_normal(1000), np.full(1000, 3.3), np.where(np.arange(1000) == 500, 7.0, 0.0)])
    z = robust_z_score(signals)
    assert np.isfinite(z).all()
    assert (z[1] == 0).all()
    assert z[2].max() == pytest.approx(1 / signals[2].std() * 7, rel=1e-5)


def test_a_channel_that_is_dead_for_most_of_a_recording_does_not_explode(tmp_path):
    signals = sines(256, seconds=100)
    signals["CZ"][: 80 * 256] = 0
    signal = read_recording(write_edf(tmp_path / "a.edf", signals, 256))[CHANNELS.index("CZ")]
    assert 0.5 < np.abs(signal).max() < 20


def test_signals_that_are_left_out_do_not_change_the_others(tmp_path):
    rng = np.random.default_rng(0)
    eeg = {name: rng.normal(0, 30, 250 * 20) for name in CHANNELS}
    alone = read_recording(write_edf(tmp_path / "a.edf", eeg, 250))
    faster = EdfSignal(rng.normal(0, 30, 1000 * 20), 1000, label="EEG EKG1-REF", physical_range=(-4000, 4000))
    slow = [
        EdfSignal(x, 250, label=f"EEG {n}-REF", physical_dimension="uV", physical_range=(-4000, 4000))
        for n, x in eeg.items()
    ]
    Edf([faster, *slow]).write(tmp_path / "b.edf")
    np.testing.assert_array_equal(read_recording(tmp_path / "b.edf"), alone)


def test_a_slow_eeg_is_refused_also_beside_a_fast_signal(tmp_path):
    fast = EdfSignal(np.zeros(512 * 10), 512, label="EEG EKG1-REF", physical_range=(-1, 1))
    slow = [EdfSignal(np.arange(640.0), 64, label=f"EEG {n}-REF", physical_range=(0, 640)) for n in CHANNELS]
    Edf([fast, *slow]).write(tmp_path / "a.edf")
    with pytest.raises(ValueError, match="sampled at 64 Hz, too slowly"):
        read_recording(tmp_path / "a.edf")


def test_a_label_that_stands_twice_is_read_once(tmp_path):
    eeg = sines(256)
    signals = [
        EdfSignal(x, 256, label=f"EEG {n}-REF", physical_dimension="uV", physical_range=(-4000, 4000))
        for n, x in eeg.items()
    ]
    Edf([*signals, signals[3]]).write(tmp_path / "a.edf")
    np.testing.assert_array_equal(
        read_recording(tmp_path / "a.edf"), read_recording(write_edf(tmp_path / "b.edf", eeg, 256))
    )


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        robust_z_score(np.array([[1.0, np.nan, 2.0]]))


def test_a_recorder_that_was_not_stopped_leaves_a_file_that_is_read(tmp_path):
    path = write_edf(tmp_path / "a.edf", sines(256), 256)
    whole = read_recording(path)
    content = bytearray(path.read_bytes())
    content[236:244] = b"-1      "
    path.write_bytes(content)
    np.testing.assert_array_equal(read_recording(path), whole)


@given(seed=st.integers(0, 99), samples=st.integers(700, 5000))
def test_scaling_channel_by_channel_is_bit_equal_to_scaling_them_together(seed, samples):
    rng = np.random.default_rng(seed)
    signals = rng.normal(0, 1, (4, samples)) * 10.0 ** rng.integers(-3, 5, (4, 1))
    signals[1, : samples * 4 // 5] = 3
    signals[2] = 7
    low, middle, high = np.percentile(signals, (25, 50, 75), axis=1, keepdims=True)
    deviation = signals.std(axis=1, keepdims=True)
    scale = np.where((high - low) / 1.349 < 1e-3, deviation, (high - low) / 1.349)
    scaled = np.where(deviation < 1e-3, 0, (signals - middle) / np.where(deviation < 1e-3, 1, scale))
    np.testing.assert_array_equal(robust_z_score(signals), scaled.astype(np.float32))
