"""`status` as somebody at a terminal sees it: a process of its own beside a run that goes on."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import lightning_stability
from lightning_stability.events import FILE_NAME, EventLog
from tests.command import ROOT, Launcher, run_python
from tests.status.test_runs import WORDS, start

# it looks ten times a second: nobody waits for these tests but the next one
OFTEN = "import sys; sys.argv[0] = 'lightning-stability'; from lightning_stability.status import command"
OFTEN += "; command._SECONDS = 0.1; from lightning_stability.__main__ import main; sys.exit(main())"
STATUS = (sys.executable, "-c", OFTEN, "status")
# (a worker of pytest-xdist sets COLUMNS, which rich believes more than the terminal)
SIZES = ("COLUMNS", "LINES")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in SIZES}
ENVIRONMENT |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
CLEAR = "\033[H\033[2J"
HANGS = 300.0
"""Seconds after which a process is given up."""


class Terminal:
    """`status` in a terminal of its own, 40 rows of 200 columns, of which Ctrl-C can be pressed.

    `shown` is all that came, and `text` the same without what moves the cursor or colours.
    """

    def __init__(self, *words: str, command: Sequence[str] = STATUS, **variables: str) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
        self._process = subprocess.Popen(
            [*command, *words], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env={**ENVIRONMENT, "TERM": "xterm-256color", **variables},
            preexec_fn=lambda: _take_as_terminal(theirs),
        )  # fmt: skip
        os.close(theirs)
        self.shown = ""

    @property
    def text(self) -> str:
        return re.sub(r" +$", "", re.sub(r"\033\[[0-9;?]*[A-Za-z]|\r", "", self.shown), flags=re.MULTILINE)

    def wait_for(self, pattern: str, seconds: float = HANGS) -> str:
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text, re.DOTALL)):
            assert time.monotonic() < end, self.shown
            self._read(0.1)
        return found[0]

    def press_ctrl_c(self) -> None:
        os.write(self._ours, b"\x03")

    def end(self, seconds: float = HANGS) -> int:
        """Wait for the process; return its exit status."""
        end = time.monotonic() + seconds
        while self._process.poll() is None:
            assert time.monotonic() < end, self.shown
            self._read(0.1)
        while self._read(0.0):
            pass
        return self._process.returncode

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._ours)

    def _read(self, seconds: float) -> bool:
        if not select.select([self._ours], [], [], seconds)[0]:
            return False
        try:
            content = os.read(self._ours, 65536).decode()
        except OSError:  # the other side is closed
            return False
        self.shown += content.replace("\r\n", "\n")
        return bool(content)


def _take_as_terminal(descriptor: int) -> None:
    import fcntl
    import termios

    # as in a terminal, even where the tests were started in the background, with a Ctrl-C that is ignored
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)


def test_the_watch_follows_a_run_on_a_terminal_until_ctrl_c_and_elsewhere_in_plain_text_until_its_end(
    command: Launcher, tmp_path: Path
) -> None:
    fit = threading.Thread(target=command, args=(*WORDS, "--model.gates=[9, 20]"), kwargs={"cwd": tmp_path})
    fit.start()
    while not list(tmp_path.rglob(FILE_NAME)):
        assert fit.is_alive()
        time.sleep(0.01)
    piped = subprocess.Popen(
        [*STATUS, str(tmp_path), "--watch"],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    terminal = Terminal(str(tmp_path), "--watch")
    try:
        assert piped.stdout is not None
        out = ""
        while "step 9 of 32" not in out:
            read = piped.stdout.readline()
            assert read, "it ends before the run does"
            out += read
        terminal.wait_for("step 9 of 32")
        (tmp_path / "go-9").touch()
        terminal.wait_for("step 20 of 32.*last written")
        assert fit.is_alive()
        terminal.press_ctrl_c()
        assert terminal.end() == 0
        assert "Traceback" not in terminal.text
        assert terminal.text.endswith("\n")

        (tmp_path / "go-20").touch()
        rest, err = piped.communicate(timeout=HANGS)
        out += rest
    finally:
        for step in (9, 20):
            (tmp_path / f"go-{step}").touch()
        terminal.close()
        piped.kill()
        fit.join()
    assert (piped.returncode, err) == (0, "")
    assert "\033" not in out
    reports = out.strip().split("\n\n")
    assert len(reports) > 1
    assert [("\n" + report).count("\nprogress ") for report in reports] == [1] * len(reports)
    assert "state                 running: process" in reports[0]
    assert "state                 finished: max_epochs=2 reached" in reports[-1]


def test_the_watch_goes_over_to_a_new_version_and_passes_half_a_line_over(tmp_path: Path) -> None:
    """Of several versions it shows the one that is written to; a line is an event once it is whole."""
    for version in (0, 1):
        start(tmp_path / f"version_{version}", pid=os.getpid())
    os.utime(tmp_path / "version_0" / FILE_NAME, (1e9, 1e9))
    terminal = Terminal(str(tmp_path), "--watch")
    try:
        terminal.wait_for(r"run +\S*version_1\n.*incidents +0\n")
        line = json.dumps({"event": "something_bad", "step": 7, "epoch": 0, "time": time.time(), "rank": 0}) + "\n"
        with (tmp_path / "version_1" / FILE_NAME).open("a") as file:
            file.write(line[:30])
            file.flush()
            terminal.wait_for(r"(version_1\n.*?incidents +0\n.*?){3}")
            file.write(line[30:])
        terminal.wait_for(r"incidents +1\n.*step 7  something_bad")
        start(tmp_path / "version_2", pid=os.getpid())
        terminal.wait_for(r"run +\S*version_2\n.*last written")
        EventLog(tmp_path / "version_2").write(
            "training_ended", 9, 0, status="exception", why="on purpose", exception="ValueError", seconds=1.0
        )
        assert terminal.end() == 1
        assert "failed: ValueError: on purpose" in terminal.shown
    finally:
        terminal.close()


WITHOUT_RICH = f"import sys; sys.modules['rich'] = None; {OFTEN}"
HIDE, SHOW, UP = "\033[?25l", "\033[?25h", "\033[1A"


def write_progress(folder: Path, step: int, loss: float) -> None:
    EventLog(folder).write("progress", step, 0, batch_idx=step, batches=100, loss=loss, grad_norm=1.0)


def test_the_live_view_draws_over_itself_and_leaves_the_terminal_as_it_was(tmp_path: Path) -> None:
    pytest.importorskip("rich")
    start(tmp_path, pid=os.getpid())
    write_progress(tmp_path, 1, 1.0)
    terminal = Terminal(str(tmp_path), "--watch")
    try:
        terminal.wait_for("running: process.*loss +1 .*last written")
        write_progress(tmp_path, 2, 8.0)
        write_progress(tmp_path, 3, float("nan"))
        terminal.wait_for("loss +nan .*last written.*loss +▁█x")
        assert CLEAR not in terminal.shown
        assert terminal.shown.count(UP) > 10, "it goes up to where the view begins"
        terminal.press_ctrl_c()
        assert terminal.end() == 0
        assert "Traceback" not in terminal.text
        assert terminal.shown.count(HIDE) == terminal.shown.count(SHOW) == 1
        assert terminal.shown.rindex(HIDE) < terminal.shown.rindex(SHOW)
        assert terminal.text.endswith("\n")
    finally:
        terminal.close()


@pytest.mark.parametrize(
    ("command", "variables", "draws"),
    [((sys.executable, "-c", WITHOUT_RICH, "status"), {}, True), (STATUS, {"TERM": "dumb"}, False)],
    ids=["without rich", "on a dumb terminal"],
)
def test_where_it_cannot_be_live_the_same_lines_are_printed(
    tmp_path: Path, command: Sequence[str], variables: dict[str, str], draws: bool
) -> None:
    start(tmp_path, pid=os.getpid())
    terminal = Terminal(str(tmp_path), "--watch", command=command, **variables)
    try:
        terminal.wait_for("running: process.*last written")
        write_progress(tmp_path, 7, 1.0)
        terminal.wait_for("step 7 .*last written")
        assert (CLEAR in terminal.shown) == draws
        assert ("\033" in terminal.shown) == draws
        terminal.press_ctrl_c()
        assert terminal.end() == 0
    finally:
        terminal.close()


def test_a_folder_that_goes_away_ends_the_watch_with_one_message(tmp_path: Path) -> None:
    start(tmp_path / "runs" / "version_0", pid=os.getpid())
    terminal = Terminal(str(tmp_path / "runs"), "--watch")
    try:
        terminal.wait_for("last written")
        (tmp_path / "runs").rename(tmp_path / "elsewhere")
        assert terminal.end() == 2
        assert "lightning-stability: error: There is no folder" in terminal.shown
        assert "Traceback" not in terminal.shown
    finally:
        terminal.close()


def test_status_needs_neither_torch_nor_lightning(tmp_path: Path) -> None:
    start(tmp_path, pid=os.getpid())
    heavy = re.compile(r"\| +(torch|pytorch_lightning|lightning|lightning_fabric|jsonargparse|mne)$", re.MULTILINE)
    done = run_python("-X", "importtime", "-m", "lightning_stability", "status", ".", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "state                 running" in done.stdout
    assert heavy.findall(done.stderr) == []
    # as the installed script does
    script = "import sys; sys.argv = ['/bin/lightning-stability', 'status', '.']"
    script += "; from lightning_stability.__main__ import main; sys.exit(main())"
    done = run_python("-X", "importtime", "-c", script, cwd=tmp_path)
    assert (done.returncode, heavy.findall(done.stderr)) == (0, [])


@pytest.mark.parametrize(
    ("called", "is_status"),
    [
        (["/usr/bin/lightning-stability", "status", "runs"], True),
        (["/usr/bin/lightning-stability", "fit"], False),
        (["/usr/bin/lightning-stability"], False),
        (["train.py", "status"], False),
        ([""], False),
        ([], False),  # an interpreter within another program
    ],
)
def test_whoever_else_imports_the_package_finds_the_callbacks_short_names_registered(
    monkeypatch: pytest.MonkeyPatch, called: list[str], is_status: bool
) -> None:
    monkeypatch.setattr(sys, "argv", called)
    assert lightning_stability._only_reads_events() == is_status


@pytest.mark.parametrize(("module", "is_status"), [("lightning_stability", True), ("mine.train", False)])
def test_of_the_modules_that_python_runs_only_ours_is_the_status_command(
    monkeypatch: pytest.MonkeyPatch, module: str, is_status: bool
) -> None:
    monkeypatch.setattr(sys, "argv", ["-m", "status", "runs"])
    for called in (["-m", module], [f"-m{module}"]):
        monkeypatch.setattr(sys, "orig_argv", ["python", *called, "status", "runs"])
        assert lightning_stability._only_reads_events() == is_status


def test_the_public_names_are_there_on_demand_too() -> None:
    for name in set(lightning_stability.__all__) - {"__version__"}:
        assert lightning_stability.__getattr__(name) is getattr(lightning_stability, name)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        lightning_stability.__getattr__("Nothing")
