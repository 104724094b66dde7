"""events.jsonl."""

import json
import multiprocessing
from pathlib import Path

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


def test_a_line_cut_short_by_a_kill_is_passed_over(tmp_path: Path) -> None:
    EventLog(tmp_path).write("x", step=0, epoch=0)
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('{"event": "x", "st')
    assert [event["step"] for event in read_events(tmp_path)] == [0]


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
