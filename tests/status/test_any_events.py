"""Whatever a line of events.jsonl lacks or holds, `status` and `report` say what they can and never raise."""

from __future__ import annotations

import io
import json
import os
import socket
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from lightning_stability.events import FILE_NAME, read_events
from lightning_stability.status import Run, look
from lightning_stability.status.live import live_view
from lightning_stability.status.page import page_of
from tests.status.test_docs import COMMON, documented

WHOLE = st.integers() | st.sampled_from([-1, 0, 2**31, 2**63, 10**400])
NUMBERS = st.floats() | st.sampled_from(["nan", "inf", "-inf", 1e308, 5e-324, -1e308])
TEXTS = st.text() | st.sampled_from(["\ud800", "\x1b[2J", "\0", "x" * 5000, "a://b", "{why}", socket.gethostname()])
LEAVES = st.none() | st.booleans() | WHOLE | NUMBERS | TEXTS
ANY = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))
COUNTS = "pid world_size max_epochs steps_per_epoch total_steps batch_idx batches skipped of from_step to_step"
DOCUMENTED = documented()
LIKELY = {
    "event": st.sampled_from(sorted(DOCUMENTED)),
    "step": st.integers(0, 2**53),
    "epoch": st.integers(0, 9),
    "time": st.floats(0.0, 2e9) | st.floats(time.time() - 99, time.time()),
    "rank": st.integers(0, 1),
    "host": st.just(socket.gethostname()),
    "pid": st.sampled_from([os.getpid(), 2**22 - 1]),
    **{name: st.integers(0, 9) for name in COUNTS.split() if name != "pid"},
    **{name: st.floats(0.0, 2.0) for name in ("loss", "grad_norm", "loss_scale", "learning_rate")},
    "findings": st.lists(st.fixed_dictionaries({}, optional={"tensor": ANY, "reason": ANY}) | ANY, max_size=2),
    "far_from_unit_scale": st.lists(
        st.fixed_dictionaries(
            {}, optional=dict.fromkeys(("layer", "side", "deviation", "cause", "factor", "others"), ANY)
        )
        | ANY,
        max_size=2,
    ),
}
FIELDS = sorted(set().union(*DOCUMENTED.values()) | LIKELY.keys() - {"event", "step"})


@st.composite
def events(draw: Any) -> dict[str, Any]:
    """One that this package writes, with any of its fields missing or of another type."""
    name = draw(st.sampled_from(sorted(DOCUMENTED)))
    fields = sorted(DOCUMENTED[name] | COMMON - {"event", "step"} | draw(st.sets(st.sampled_from(FIELDS), max_size=2)))
    missing = draw(st.sets(st.sampled_from(fields)))
    odd = draw(st.sets(st.sampled_from(fields), max_size=3))
    said = {field: draw(ANY if field in odd else LIKELY.get(field, TEXTS)) for field in fields if field not in missing}
    return {"event": name, "step": draw(LIKELY["step"]), **said} | draw(
        st.dictionaries(st.sampled_from(["event", "step", "repeated", "ordinary"]), ANY, max_size=1)
    )


def show(lines: list[Any]) -> None:
    """`status` of a run with these lines."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (Path(folder) / FILE_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
        told = read_events(folder)
        assert len(list(told)) + told.unreadable == len(lines)
        run = Run(Path(folder))
        report = look(run)
        with live_view(Console(file=io.StringIO(), force_terminal=True, width=200)) as show_live:
            show_live(run, report)
        text = str(report)
        assert text.replace("\n", "").isprintable()
        assert text.count("\n") == len(report.lines) - 1
        text.encode()


@settings(max_examples=150)
@given(st.lists(events() | ANY, max_size=6))
def test_status_and_its_live_view_say_what_they_can_of_any_events(lines: list[Any]) -> None:
    show(lines)


@settings(max_examples=25)
@given(st.lists(events() | ANY, max_size=6))
def test_a_page_is_made_of_any_events(lines: list[Any]) -> None:
    pytest.importorskip("matplotlib")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / FILE_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert "</html>" in page_of([Path(folder)], Path(folder))
