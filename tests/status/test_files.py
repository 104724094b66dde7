"""Reading files that are being written: each line and record once, whatever the writer is in the middle of."""

import itertools
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.tensorboard import SummaryWriter

from lightning_stability.events import FILE_NAME, PREVIOUS_FILE_NAME, EventLog, read_events
from lightning_stability.status.files import TAIL_BYTES, CsvFile, EventsFile, Logs, TensorBoardFile


def steps(events: EventsFile) -> list[int]:
    return [event["step"] for event in events.read()]


def test_half_a_line_is_read_when_it_is_whole(tmp_path: Path) -> None:
    EventLog(tmp_path).write("a", step=0, epoch=0)
    line = (tmp_path / FILE_NAME).read_bytes().replace(b'"step": 0', b'"step": 1')
    events = EventsFile(tmp_path)
    assert steps(events) == [0]
    for half in (line[:20], line[20:-1]):
        with (tmp_path / FILE_NAME).open("ab") as file:
            file.write(half)
        assert steps(events) == []
    with (tmp_path / FILE_NAME).open("ab") as file:
        file.write(line[-1:])
    assert steps(events) == [1]
    assert steps(events) == []


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=8))
def test_each_event_is_read_once_over_any_number_of_new_files(
    tmp_path_factory: pytest.TempPathFactory, bursts: list[int]
) -> None:
    """With up to two new files between looks nothing is lost; with more, what is lost is gone from the disk."""
    folder = tmp_path_factory.mktemp("run")
    log, events = EventLog(folder, max_bytes=600), EventsFile(folder)  # about six lines
    counter, seen = itertools.count(), []
    for burst in bursts:
        for _ in range(burst):
            log.write("a", step=next(counter), epoch=0)
        seen += steps(events)
        kept = [event["step"] for event in read_events(folder)]
        assert seen[len(seen) - len(kept) :] == kept
    assert seen == sorted(set(seen))
    if max(bursts) <= 6:
        assert seen == list(range(sum(bursts)))


def test_the_start_of_training_is_at_the_head_of_every_new_file(tmp_path: Path) -> None:
    log = EventLog(tmp_path, max_bytes=600)
    log.write("training_started", step=3, epoch=0, pid=1)
    for step in range(50):
        log.write("a", step=step, epoch=0)
    for name in (PREVIOUS_FILE_NAME, FILE_NAME):
        first = (tmp_path / name).read_text().splitlines()[0]
        assert '"event": "training_started"' in first
        assert '"repeated": true' in first
    assert next(read_events(tmp_path))["step"] == 3
    assert (tmp_path / FILE_NAME).stat().st_size < 900


def test_a_line_that_is_no_json_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text('{"event": "a", "step": 1}\n{"event": {"event"\n[1]\n{"event": "a", "step": 2}\n')
    assert steps(EventsFile(tmp_path)) == [1, 2]


def write_board(folder: Path, count: int, tag: str = "grad_norm/total") -> Path:
    with SummaryWriter(str(folder)) as writer:
        for step in range(count):
            writer.add_scalar(tag, step / 4, step)
    [path] = folder.glob("events.out.*")
    return path


def test_a_board_that_grows_byte_by_byte_gives_each_number_once(tmp_path: Path) -> None:
    content = write_board(tmp_path / "whole", 5).read_bytes()
    path = tmp_path / "events.out.tfevents.1"
    path.write_bytes(b"")
    board, values = TensorBoardFile(path), []
    with path.open("ab", buffering=0) as file:
        for byte in content:
            file.write(bytes([byte]))
            values += [point.value for _, point in board.read()]
    assert values == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("cut", range(0, 120, 7))
def test_a_look_at_a_boards_end_may_begin_anywhere(tmp_path: Path, cut: int) -> None:
    path = write_board(tmp_path, 40)
    points = [point for _, point in TensorBoardFile(path, tail_bytes=500 + cut).read()]
    assert [point.step for point in points] == list(range(40))[-len(points) :]
    assert 5 <= len(points) < 40


def test_of_a_long_board_only_the_end_is_read_and_then_only_what_is_new(tmp_path: Path) -> None:
    tag = "x" * 1000
    path = write_board(tmp_path, 3000, tag)
    assert path.stat().st_size > 2.5 * TAIL_BYTES
    board = TensorBoardFile(path)
    assert len(list(board.read())) == pytest.approx(TAIL_BYTES / (path.stat().st_size / 3000), rel=0.05)
    before = os.lseek(board._file.fileno(), 0, os.SEEK_CUR)
    assert list(board.read()) == []
    assert os.lseek(board._file.fileno(), 0, os.SEEK_CUR) == before
    assert Logs(tmp_path).read()[tag][-1].step == 2999


def test_a_table_is_read_while_it_is_written_and_gets_a_column(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    table = CsvFile(path)
    assert table.read() == {}
    path.write_text("epoch,loss,step\n0,1.5,0\n0,,1\n0,2.5,")
    assert [(point.step, point.value) for point in table.read()["loss"]] == [(0, 1.5)]
    path.write_text("")  # it is about to be written anew
    assert [point.value for point in table.read()["loss"]] == [1.5]
    path.write_text("epoch,loss,step,val_loss\n0,1.5,0,\n0,nan,1,\n0,,2,0.25\n")
    read = table.read()
    assert read["val_loss"][0].step == 2
    assert [str(point.value) for point in read["loss"]] == ["1.5", "nan"]


def test_of_a_long_table_only_the_end_is_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,loss\n" + "".join(f"{step},{step}.5\n" for step in range(100_000)))
    points = CsvFile(tmp_path / "metrics.csv", tail_bytes=1000).read()["loss"]
    assert [point.step for point in points] == list(range(100_000 - len(points), 100_000))
    assert 50 < len(points) < 100


def test_numbers_from_before_the_start_are_an_earlier_runs(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for step, moment in ((90, 50.0), (91, 60.0), (80, 100.0)):
            writer.add_scalar("loss", 1.0, step, walltime=moment)
    assert [point.step for point in Logs(tmp_path).read(since=99.0)["loss"]] == [80]
