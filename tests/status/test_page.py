"""The page of a run, from its events alone: real runs that finished, go on, were killed; and events of others."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_stability.events import FILE_NAME, EventLog
from lightning_stability.status import leave_page, show_report
from lightning_stability.status.page import page_of
from lightning_stability.status.totals import count
from tests.browser import CHROMIUM, browser
from tests.command import Launcher, run_python
from tests.status.test_runs import WORDS

EVIL = "<script>console.log('ran')</script><img src=http://example.invalid/x onerror=console.log(1)>"
NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
FOLDER = Path("lightning_logs/version_0")


def write(folder: Path, rows: list[tuple[str, int, dict[str, Any]]]) -> Path:
    """Events, a second apart."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"event": name, "step": step, "epoch": 0, "time": 1.7e9 + number, "rank": 0, **details}
        for number, (name, step, details) in enumerate(rows)
    ]
    (folder / FILE_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def progress(step: int, loss: Any = 0.5) -> tuple[str, int, dict[str, Any]]:
    return ("progress", step, {"loss": loss, "grad_norm": 1.0, "loss_scale": None, "learning_rate": 1e-3, "skipped": 0})


def start(step: int, **details: Any) -> tuple[str, int, dict[str, Any]]:
    known = {"pid": 1, "host": "elsewhere", "world_size": 1, "precision": "32-true", "max_epochs": 1}
    return ("training_started", step, {**known, "total_steps": 100, "callbacks": ["NaNEarlyStop"], **details})


EVENTFUL = [
    start(0),
    *(progress(step) for step in range(10, 50, 10)),
    ("update_skipped", 42, {"by": "NaNEarlyStop", "ordinary": False, "why": EVIL}),
    ("update_skipped", 43, {"by": "GradScaler", "ordinary": True}),
    ("rewound", 30, {"from_step": 50, "to_step": 30, "why": "the loss rose"}),
    progress(40, "nan"),
    ("checkpoint_saved", 60, {"path": EVIL}),
    progress(70),  # killed here
    start(60, resumed_from="step=60.ckpt"),
    ("resume_verified", 65, {"why": "10 steps are the same bits", "steps": 10, "equal": 10}),
    progress(80),
    ("training_ended", 100, {"status": "finished", "why": "max_steps=100 reached", "seconds": 1.0}),
]


def test_totals_count_what_a_kill_and_a_rewind_undid():
    rows = [{"event": name, "step": step, "time": float(i), **more} for i, (name, step, more) in enumerate(EVENTFUL)]
    found = count(rows)
    assert (found.skipped, found.ordinary, found.rewinds, found.resumes, found.exact) == (2, 1, 1, 1, 1)
    assert (found.first, found.last, found.executed) == (0, 100, 50 + 40 + 40)  # to 50, from 30 to 70, from 60 to 100
    assert found.kept == pytest.approx(100 / 130)


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<svg.*?</svg>|<[^>]*>", " ", page, flags=re.DOTALL))


@NEEDS_CHROMIUM
def test_the_page_asks_for_nothing_and_all_of_a_run_is_text(tmp_path, capsys):
    run = write(tmp_path / "version_0", EVENTFUL)
    incident = run / "incidents" / "1-step42"
    incident.mkdir(parents=True)
    (incident / "report.html").write_text("<p>found</p>")
    EventLog(run).write("incident_recorded", 42, 0, path="/moved/since/1-step42", what="loss", origin=EVIL)
    page = tmp_path / "pages" / "run.html"
    assert show_report(["report", str(run), "-o", str(page)]) == 0
    assert capsys.readouterr().out.strip() == str(page)
    link = "document.querySelector('td a').href"
    with browser() as opened:
        for width in (390, 1280):
            for dark in (False, True):
                seen = opened.look(page, width, dark, "document.body.innerText", link, "document.scripts.length")
                assert seen.messages == []
                assert [url for url in seen.requests if not url.startswith("data:")] == [page.as_uri()]
                assert seen.overflow == 0
                text, target, scripts = seen.values
                assert EVIL in text
                assert scripts == 0
                assert "2 updates of 130 skipped (1 by GradScaler, which is ordinary), 1 rewind" in text
                assert "1 resume (exact)" in text
                assert target == (incident / "report.html").as_uri()


def test_a_real_run_is_shown_while_it_goes_on_killed_and_finished(tmp_path, command: Launcher):
    killed = command(*WORDS, "--model.at=20", "--model.happens=kill", cwd=tmp_path)
    assert killed.returncode != 0
    said = text_of(page_of([tmp_path / FOLDER], tmp_path))
    assert "Dead: process" in said
    assert "of 32" in said
    done = command(*WORDS, cwd=tmp_path)
    assert done.returncode == 0
    both = text_of(page_of([tmp_path / FOLDER, tmp_path / "lightning_logs" / "version_1"], tmp_path))
    assert "2 runs" in both
    assert re.search(r"state dead finished", both), both[:500]
    assert re.search(r"version_1 Finished: max_epochs=2 reached", both)
    started = write(tmp_path / "going", [start(0), progress(5)])
    assert "Running: process" in text_of(page_of([_as_if_here(started)], tmp_path))


def _as_if_here(folder: Path) -> Path:
    """The start of a run in this process."""
    import os
    import socket
    import time

    lines = [json.loads(line) for line in (folder / FILE_NAME).read_text().splitlines()]
    lines[0] |= {"pid": os.getpid(), "host": socket.gethostname()}
    lines = [line | {"time": time.time()} for line in lines]
    (folder / FILE_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_foreign_and_broken_events_give_a_page_too(tmp_path):
    run = write(tmp_path / "version_0", [("a_new_kind", 3, {"why": "of a later version"}), progress(4, [1]), start(0)])
    with (run / FILE_NAME).open("a") as file:  # cut short, and without what every event has
        file.write('{"event": "progress", "step": 5, "ep\n{"event": "rewound", "step": 6}\n')
    assert "a_new_kind: of a later version" in text_of(page_of([run], tmp_path))


def test_a_page_is_left_in_the_folder_of_a_run_that_has_events(tmp_path):
    run = write(tmp_path / "version_0", EVENTFUL)
    assert leave_page(str(run)) == f"A page about this run, to open in a browser: {run / 'run.html'}"
    assert "</html>" in (run / "run.html").read_text()
    assert "no events.jsonl" in leave_page(str(tmp_path))
    assert "no events.jsonl" in leave_page(None)


def test_a_folder_without_a_run_is_an_error(tmp_path, capsys):
    assert show_report(["report", str(tmp_path)]) == 2
    assert "There is no events.jsonl" in capsys.readouterr().err


def test_without_the_extra_the_command_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert show_report(["report", str(tmp_path)]) == 2
    assert "pip install 'lightning-stability[report]'" in capsys.readouterr().err
    assert "pip install 'lightning-stability[report]'" in leave_page(str(write(tmp_path / "version_0", EVENTFUL)))


def test_the_command_loads_neither_torch_nor_lightning(tmp_path):
    write(tmp_path / "version_0", EVENTFUL)
    program = (
        "import sys; sys.argv = ['lightning-stability', 'report', 'version_0'];"
        "from lightning_stability.__main__ import main; main();"
        "print([m for m in ('torch', 'pytorch_lightning', 'lightning') if m in sys.modules])"
    )
    done = run_python("-c", program, cwd=tmp_path)
    assert (done.returncode, done.stdout.split()) == (0, ["run.html", "[]"]), done.stderr
