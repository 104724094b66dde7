"""The tables of the comparison, as Markdown, from the JSON and from nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rivals import saves
from rivals.faults import FAULTS, OF_ARC
from rivals.rows import ALL_OURS, BARE, NAN_EARLY_STOP

OURS = (NAN_EARLY_STOP, ALL_OURS)
BEGIN, END = "<!-- compare: from here -->", "<!-- compare: to here -->"
GOOD = ("skipped", "repaired", "rolled back", "no harm")
RANK = {"crashed": 0, "unnoticed": 0, "landed": 1, "stopped after": 2, "stopped before": 3, **dict.fromkeys(GOOD, 4)}

Report = dict[str, Any]


def render(report: Report) -> str:
    """All tables.

    Args:
        report: What `compare.py` wrote.
    """
    rows = {name: row for name, row in report["rows"].items() if "missing" not in row}
    machine = report["machine"]
    parts = [
        f"{machine['device']}, {machine['threads']} thread, torch {machine['torch']}, pytorch-lightning "
        f"{machine['pytorch_lightning']}, Python {machine['python']}, {report['date']}. {len(FAULTS)} faults, "
        f"{_programs(rows)} programs of the zoo.{_of_run(report)} **Bold**: better than ours.",
        cost(rows),
        "What becomes of a fault of one step, or of more where it says so:",
        faults(rows, [key for key in FAULTS if key not in OF_ARC]),
        "The faults that arc-training publishes to recover from, made again (NaN loss and NaN gradient are above):",
        faults(rows, OF_ARC),
    ]
    if "saves" in report:
        parts += ["What becomes of checkpoints, with a save every ten steps:", checkpoints(report["saves"])]
    absent = [f"- {name}: {why}" for name, why in {**report["absent"], **_missing(report)}.items()]
    return "\n\n".join([*parts, "Not in the table:", "\n".join(absent)])


def _of_run(report: Report) -> str:
    """How long it took, and what else the machine did."""
    if "load" not in report or "minutes" not in report:
        return ""
    load = report["load"]
    return f" Made in {report['minutes']} minutes on {load['cores']} cores, load average {load['average']} before it."


def _missing(report: Report) -> dict[str, str]:
    return {name: row["missing"] for name, row in report["rows"].items() if "missing" in row}


def _programs(rows: Report) -> int:
    return max((row["zoo"]["of"] for row in rows.values() if "zoo" in row), default=0)


def cost(rows: Report) -> str:
    """What each way costs, what it does to a healthy run, and two sums."""
    workloads = list(dict.fromkeys(workload for row in rows.values() for workload in row.get("cost", {})))
    titles = [f"step, {name}" for name in workloads]
    added = {"added_waits": "added waits", "added_mb": "added MB"} if workloads else {}
    heads = ["", *titles, *added.values(), "healthy run", "harm kept out", "place named"]
    lines = [_line(heads), _line(["---"] * len(heads))]
    ours = rows.get(NAN_EARLY_STOP, {})
    for name, row in rows.items():
        version = f" {row['version']}" if row.get("version") else ""
        cells = [name + version]
        for workload in workloads:
            cells.append(_ratio(row, ours, workload, name))
        for key in added:
            cells.append(_added(row, ours, key, name, workloads))
        cells += [_healthy(row), _kept_out(name, row, rows), _named(name, row, rows)]
        lines.append(_line(cells))
    return "\n".join(lines)


def _ratio(row: Report, ours: Report, workload: str, name: str) -> str:
    found = row.get("cost", {}).get(workload)
    if found is None:
        return "-"
    if "error" in found:
        return found["error"].partition(":")[0]
    ratio = found["ratio"]
    text = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
    reference = ours.get("cost", {}).get(workload, {}).get("ratio")
    return _bold(text, name not in (*OURS, BARE) and bool(reference) and ratio["max"] < reference["min"])


def _added(row: Report, ours: Report, key: str, name: str, workloads: list[str]) -> str:
    values = [row.get("cost", {}).get(workload, {}).get(key) for workload in workloads]
    if not values or None in values:
        return "-"
    references = [ours.get("cost", {}).get(workload, {}).get(key) for workload in workloads]
    better = None not in references and all(v < r for v, r in zip(values, references, strict=True))
    shown = " / ".join(f"{value + 0.0:.1f}" for value in values)
    return _bold(shown.replace("-0.0", "0.0"), name not in (*OURS, BARE) and better)


def _healthy(row: Report) -> str:
    healthy = row.get("healthy")
    if healthy is None:
        return "-"
    said = "false alarm" if healthy["alarms"] else ""
    ended = healthy["raised"] or ""
    changed = "" if healthy["same_weights"] else "other weights"
    return ", ".join(text for text in (ended, said, changed) if text) or "untouched"


def _kept_out(name: str, row: Report, rows: Report) -> str:
    count = kept_out(row)
    if count is None:
        return "-"
    best = max((kept_out(rows[ours]) or 0 for ours in OURS if ours in rows), default=99)
    return _bold(f"{count} of {len(row['faults'])}", name not in OURS and count > best)


def kept_out(row: Report) -> int | None:
    """Of how many faults weights, optimizer state and buffers are free at the end."""
    if "faults" not in row:
        return None
    return sum(RANK[found["outcome"]] >= RANK["stopped before"] for found in row["faults"].values())


def _named(name: str, row: Report, rows: Report) -> str:
    zoo = row.get("zoo")
    if zoo is None or zoo["silent"] == zoo["of"]:
        return "none"
    best = max((rows[ours]["zoo"]["right"] for ours in OURS if "zoo" in rows.get(ours, {})), default=10**9)
    return _bold(f"{zoo['right']} right, {zoo['wrong']} wrong", name not in OURS and zoo["right"] > best)


def faults(rows: Report, keys: list[str]) -> str:
    """What each way makes of some faults."""
    heads = ["", *(FAULTS[key] for key in keys)]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for name, row in rows.items():
        if "faults" in row:
            lines.append(_line([name, *(_outcome(name, row, rows, key) for key in keys)]))
    return "\n".join(lines)


def _outcome(name: str, row: Report, rows: Report, key: str) -> str:
    found = row["faults"][key]
    best = max(
        (_score(rows[ours]["faults"][key]) for ours in OURS if key in rows.get(ours, {}).get("faults", {})), default=9
    )
    text = found["outcome"]
    if text == "rolled back":
        text += f" {found['rolled_back']}"
    mark = "†" if "epoch metrics" in found["harm"] and text not in ("unnoticed", "landed", "crashed") else ""
    return _bold(text, name not in OURS and _score(found) > best) + mark


def checkpoints(found: Report) -> str:
    """What each way of saving makes of each fault of a save."""
    lines = [_line(["", *saves.FAULTS.values()]), _line(["---"] * (len(saves.FAULTS) + 1))]
    for name, of_way in found.items():
        cells = []
        for kind in saves.FAULTS:
            if kind not in of_way:
                cells.append("-")
                continue
            best = max(saves.step_of(found[ours][kind]) for ours in found if ours.startswith("**ours"))
            better = not name.startswith("**ours") and saves.step_of(of_way[kind]) > best
            cells.append(_bold(of_way[kind]["outcome"], better))
        lines.append(_line([name, *cells]))
    return "\n".join(lines)


def _score(found: Report) -> float:
    """By outcome, and among those that go back by how far."""
    rank = RANK[found["outcome"]]
    return rank - (min(found["rolled_back"], 900) / 1000 if found["outcome"] == "rolled back" else 0.0)


def _bold(text: str, is_bold: bool) -> str:
    return f"**{text}**" if is_bold else text


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write(report: Report, page: Path) -> None:
    """Put the tables between the marks of a page."""
    text = page.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{render(report)}\n{END}{after}")


def written(page: Path) -> str:
    """The tables that a page has."""
    return page.read_text().partition(BEGIN)[2].partition(END)[0].strip("\n")
