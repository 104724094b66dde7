"""events.jsonl."""

import contextlib
import json
import multiprocessing
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lightning_stability.events import FILE_NAME, PREVIOUS_FILE_NAME, EventLog, read_events


def test_each_line_says_what_when_where_and_who(tmp_path: Path) -> None:
    EventLog(tmp_path, rank=3).write("gradient_norm_rising", step=7, epoch=1, group="net", ratio=4.5)
    [line] = (tmp_path / FILE_NAME).read_text().splitlines()
    event = json.loads(line)
    assert event.pop("time") > 1.7e9
    assert event == {
        "event": "gradient_norm_rising",
        "step": 7,
        "epoch": 1,
        "rank": 3,
        "group": "net",
        "ratio": 4.5,
    }


def test_is_on_disk_as_it_happens(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "not" / "there" / "yet")
    for step in range(3):
        log.write("x", step=step, epoch=0)
        assert [event["step"] for event in read_events(tmp_path / "not" / "there" / "yet")] == list(range(step + 1))


def test_numbers_that_json_lacks_become_words(tmp_path: Path) -> None:
    EventLog(tmp_path).write("x", step=0, epoch=0, values=[float("nan"), {"a": -float("inf")}])
    [event] = read_events(tmp_path)
    assert event["values"] == ["nan", {"a": "-inf"}]


def test_keeps_the_newest_within_twice_its_size(tmp_path: Path) -> None:
    log = EventLog(tmp_path, max_bytes=1000)
    for step in range(200):
        log.write("x", step=step, epoch=0)
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2000
    steps = [event["step"] for event in read_events(tmp_path)]
    assert steps == list(range(steps[0], 200))
    assert (tmp_path / PREVIOUS_FILE_NAME).exists()


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    EventLog(None).write("x", step=0, epoch=0)
    assert list(tmp_path.iterdir()) == []


HALF_LINES = ['{"event": "x", "st', '\n{"event": "x", "step": "1"}', "[" * 100_000, "{}", '{"event": "x"}', "\xff"]


@pytest.mark.parametrize("half", HALF_LINES, ids=range(6))
def test_half_lines_are_passed_over_and_counted(tmp_path: Path, half: str) -> None:
    log = EventLog(tmp_path)
    log.write("x", step=0, epoch=0)
    with (tmp_path / FILE_NAME).open("a", encoding="latin-1") as file:
        file.write(half)
    log.write("x", step=1, epoch=0)
    with pytest.warns(UserWarning, match="unreadable lines of events.jsonl, passed over: 1"):
        events = read_events(tmp_path)
    assert events.unreadable == 1
    assert [event["step"] for event in events] == [0, 1]


def test_a_half_line_does_not_spoil_the_start_of_a_new_file(tmp_path: Path) -> None:
    log = EventLog(tmp_path, max_bytes=500)
    log.write("training_started", step=3, epoch=0)
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('{"event": "training_started", "st\n')
    for step in range(9):
        log.write("x", step=step, epoch=0)
    assert json.loads((tmp_path / FILE_NAME).read_text().splitlines()[0])["step"] == 3


def make_folder(path: Path) -> None:
    path.mkdir()


def make_file_in_place_of_the_folder(path: Path) -> None:
    path.parent.rmdir()
    path.parent.touch()


@pytest.mark.parametrize("spoil", [make_folder, os.mkfifo, make_file_in_place_of_the_folder])
def test_a_log_that_cannot_be_written_costs_one_warning(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    path = tmp_path / "run" / FILE_NAME
    path.parent.mkdir()
    spoil(path)
    logs = EventLog(path.parent), EventLog(path.parent)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("error")
        for step in range(3):
            for log in logs:
                log.write("x", step=step, epoch=0)
    assert [str(path) in str(warning.message) for warning in caught] == [True]
    path.rmdir() if path.is_dir() else path.unlink() if path.exists() else path.parent.unlink()
    for log in logs:
        log.write("x", step=3, epoch=0)
        log.write("x", step=4, epoch=0)
    assert [(event["step"], event.get("lost")) for event in read_events(path.parent)] == [(3, 3), (4, None)] * 2


def test_what_was_lost_on_a_full_disk_is_counted_in_the_next_line(small_disk: Path) -> None:
    log, other = EventLog(small_disk), small_disk / "other"
    log.write("x", step=0, epoch=0)
    with contextlib.suppress(OSError), other.open("wb", 0) as file:
        while file.write(b"x" * 512):
            pass
    with pytest.warns(UserWarning, match="cannot be written"):  # noqa: PT031
        for step in range(1, 2000):
            log.write("x", step=step, epoch=0)
    other.unlink()
    log.write("x", step=2000, epoch=0)
    events = read_events(small_disk)
    assert events.unreadable == 0, "what the disk cut short is taken back"
    steps = {event["step"]: event.get("lost", 0) for event in events}
    assert 2000 - len(steps) + 1 == steps[2000] > 0


def test_what_json_cannot_hold_is_written_in_words(tmp_path: Path) -> None:
    EventLog(tmp_path).write("x", step=0, epoch=0, path=Path("a"), odd={(1, 2): {3}}, number=np.float32("nan"))
    [event] = read_events(tmp_path)
    assert (event["path"], event["odd"], event["number"]) == ("a", {"(1, 2)": "{3}"}, "nan")


def write_many(folder: Path, rank: int) -> None:
    for step in range(200):
        EventLog(folder, rank).write("x", step=step, epoch=0, filler="y" * 500)


def test_processes_share_the_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=write_many, args=(tmp_path, rank)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    events = list(read_events(tmp_path))
    for rank in range(2):
        assert [event["step"] for event in events if event["rank"] == rank] == list(range(200))
