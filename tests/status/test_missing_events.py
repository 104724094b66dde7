"""A report says what its figures do not count."""

from pathlib import Path

from lightning_stability.events import FILE_NAME, EventLog
from lightning_stability.status import Run, look


def lines(folder: Path) -> dict[str, str]:
    return dict(look(Run(folder)).lines)


def test_lines_that_cannot_be_read_and_events_that_were_lost_are_counted(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "run")
    (tmp_path / "run").touch()  # where the folder should be
    log.write("update_skipped", step=0, epoch=0)
    log.write("update_skipped", step=1, epoch=0)
    (tmp_path / "run").unlink()
    log.write("update_skipped", step=2, epoch=0)
    assert lines(tmp_path / "run")["missing events"] == "events that could not be written: 2"
    with (tmp_path / "run" / FILE_NAME).open("a") as file:
        file.write('{"event": "update_sk')
    log.write("update_skipped", step=3, epoch=0)
    told = lines(tmp_path / "run")
    assert told["missing events"] == "unreadable lines of events.jsonl: 1; events that could not be written: 2"
    assert told["skipped updates"].startswith("2")


def test_a_log_that_is_whole_says_nothing_of_it(tmp_path: Path) -> None:
    EventLog(tmp_path).write("update_skipped", step=0, epoch=0)
    assert "missing events" not in lines(tmp_path)
