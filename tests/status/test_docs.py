"""docs/events.md says what events.jsonl holds, which is an interface: it has to say all of it."""

import ast
import re
from pathlib import Path

from lightning_stability.events import read_events
from lightning_stability.status.run import find_run
from tests.command import ROOT
from tests.status.test_runs import train

COMMON = {"event", "step", "epoch", "time", "rank"}


def documented() -> dict[str, set[str]]:
    """Each event in the page's table, and the words in its last column that can be fields."""
    rows = re.findall(r"^\| `(\w+)` \|.*\|(.*)\|$", (ROOT / "docs" / "events.md").read_text(), re.MULTILINE)
    return {name: set(re.findall(r"`(\w+)`", fields)) for name, fields in rows}


def written() -> dict[str, set[str]]:
    """Each event that the package writes, and the fields that are named where it does."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "lightning_stability").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("write", "_write") and node.args:
                name = getattr(node.args[0], "value", None)
                if isinstance(name, str) and re.fullmatch(r"progress|rewound|[a-z]+(_[a-z]+)+", name):
                    found.setdefault(name, set()).update(k.arg for k in node.keywords if k.arg is not None)
    return found


def test_every_event_is_in_the_table_with_its_fields() -> None:
    table, code = documented(), written()
    assert len(code) >= 11
    assert code.keys() <= table.keys()
    by_others = {
        "progress",
        "many_skips",
        "resume_verified",
        "resume_differs",
    }  # the session's, and a name chosen before
    assert table.keys() - code.keys() <= by_others
    for name, fields in code.items():
        assert fields <= table[name], name


def test_the_events_of_a_run_have_the_fields_that_the_table_gives(tmp_path: Path) -> None:
    train(tmp_path, "nan")
    events = [event for event in read_events(find_run(tmp_path)) if event["event"] != "progress"]  # the test's own
    assert {event["event"] for event in events} == {
        *("training_started", "checkpoint_saved", "update_skipped", "training_stopped", "training_ended"),
    }
    table = documented()
    for event in events:
        assert event.keys() - COMMON - table[event["event"]] == set(), event
        if event["event"] != "training_ended":
            values = {"guard", "GradScaler", "InputCheck", "spike"}  # what a field holds, not a field
            if event["event"] == "training_stopped":
                values |= {"rewinds"}  # SpikeRecovery's own
            assert table[event["event"]] - values <= event.keys(), event
