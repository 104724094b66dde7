"""One table against everyone: what each way costs, what becomes of each fault, and who names the right place.

Each way has a process of its own for the faults of `rivals/faults.py` and, if it names places, for the open programs
of tests/zoo; two run side by side, and the faults of checkpoints beside them. Then, with nothing beside it, comes what
each way costs: blocks of steps between blocks of a bare Trainer, as many as fit into what is left of --minutes.
Nothing is installed here: `make bench-compare` makes an environment with the packages of requirements-compare.txt and
calls this there; a package that is not there is named.

usage: python benchmarks/compare.py [--quick] [--minutes M] [--rounds N] [--device cpu|gpu] [--ways a,b] [--parts a,b]
                                    [--json FILE] [--page FILE]

With --json, the figures are written there. Some --ways or --parts replace those of the file; all make it anew. With
--page, the tables of that page are rewritten from the file.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ["LIGHTNING_STABILITY_CALLBACKS"] = "none"  # a bare Trainer shall be bare where the package is installed

import torch  # noqa: E402
from common import machine, quiet, save  # noqa: E402
from rivals import chaos, cost, faults, naming, ranks, rows, saves, table  # noqa: E402

PARTS = ("cost", "faults", "zoo", "saves")
QUICK = ("bare", "SpikeDetection", "NaNEarlyStop")
SIDE_BY_SIDE = 2
"""Processes at a time, of those that are not timed."""
LIMIT = 400
"""Seconds after which a process is given up."""
GRACE = 180
"""Seconds beyond --minutes after which the step times end with what they have."""


def main() -> None:
    options = arguments()
    quiet()
    torch.set_num_threads(1)
    if options.one:
        options.json.write_text(json.dumps(of_one(options)))
        return
    report = started(options)
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        of_saves = pool.submit(in_a_process, "saves", options) if "saves" in options.parts else None
        wanted = to_measure(report, options)
        for row, found in zip(wanted, pool.map(partial(of_row, options=options), wanted), strict=True):
            known = report["rows"].get(row.name, {})
            known.pop("missing", None)
            report["rows"][row.name] = found if "missing" in found else {**known, **found}
            judge(report["rows"])
            save(report, options.json)
            told(row.name, report["rows"][row.name])
        if of_saves:
            report["saves"] = of_saves.result()
            save(report, options.json)
            for way, found in report["saves"].items():
                print(f"\n{way}", *(f"\n  {kind}: {seen['outcome']}" for kind, seen in found.items()))
    if "cost" in options.parts:
        found = in_a_process("cost", options)
        for way, figures in found.items() if "missing" not in found else ():
            report["rows"].setdefault(way, {})["cost"] = figures
            print(f"{way}: {figures}", flush=True)
    report["minutes"] = round((time.monotonic() - options.began) / 60, 1)
    save(report, options.json)
    if options.page:
        table.write(report, options.page)
    print(f"\n{report['minutes']} minutes")


def started(options: argparse.Namespace) -> dict[str, Any]:
    """A new report, or that of the file if only parts of it are measured; its rows in the order of the table."""
    known: dict[str, Any] = {"rows": {}}
    is_whole = options.ways is None and {*options.parts} == {*PARTS}
    if options.json and options.json.exists() and not is_whole:
        known = json.loads(options.json.read_text())
    device = torch.device(options.device)
    ordered = {row.name: known["rows"].get(row.name, {}) for row in rows.ROWS}
    measured = ordered if is_whole else {name: row for name, row in ordered.items() if row}
    today = datetime.date.today().isoformat()
    load = {"cores": os.cpu_count(), "average": round(os.getloadavg()[0], 1)}
    return {**known, "machine": machine(device), "date": today, "load": load, "absent": rows.ABSENT, "rows": measured}


def to_measure(report: dict[str, Any], options: argparse.Namespace) -> list[rows.Row]:
    """The ways whose faults or places are asked for; the bare one comes first, as the others are judged beside it."""
    in_steps = {"faults", "zoo"} & {*options.parts}
    bare = report["rows"].get(rows.BARE, {})
    has_bare = options.ways and "faults" in bare
    return [row for row in rows.rows(options.ways) if in_steps and not (row.name == rows.BARE and has_bare)]


def of_row(row: rows.Row, options: argparse.Namespace) -> dict[str, Any]:
    missing = row.missing()
    return {"missing": missing} if missing else in_a_process(row.name, options)


def in_a_process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of a way, or of a part. What a rival leaves behind in its process disturbs no other."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        words = ["--one", name, "--json", str(path), "--device", options.device, "--rounds", str(options.rounds)]
        words += ["--until", str(options.until), "--parts", ",".join(options.parts)]
        words += ["--ways", ",".join(options.ways)] if options.ways else []
        words += ["--quick"] if options.quick else []
        command = [sys.executable, str(Path(__file__).resolve()), *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "INF_CHECK": "1"}
        limit = max(60.0, options.until - time.monotonic() + GRACE) if name == "cost" else LIMIT
        try:
            done = subprocess.run(
                command, env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=limit
            )
        except subprocess.TimeoutExpired:
            if not path.exists():
                return {"missing": f"its process took longer than {limit:.0f} seconds"}
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text())
            return found
        return {"missing": f"its process ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"}


def of_one(options: argparse.Namespace) -> dict[str, Any]:
    """What this process was started for."""
    if options.one == "saves":
        return of_checkpoints(options)
    if options.one == "cost":
        ways = {row.name: row.make for row in rows.rows(options.ways) if not row.missing()}
        keep = partial(save, path=options.json)
        return cost.measure(ways, torch.device(options.device), options.rounds, options.until, keep)
    [row] = [row for row in rows.ROWS if row.name == options.one]
    return measured(row, options)


def of_checkpoints(options: argparse.Namespace) -> dict[str, Any]:
    """What becomes of checkpoints, for the ways whose package is there."""
    judges = {kind: partial(saves.judged, kind=kind) for kind in saves.FAULTS}
    judges |= {"fewer_ranks": ranks.judged, "chaos": chaos.judged if chaos.is_there() else _no_tool}
    kinds = list(judges)[: 1 if options.quick else None]
    ways = {name: way for name, way in saves.WAYS.items() if "arc" not in name or importlib.util.find_spec("arc")}
    return {name: {kind: judges[kind](way) for kind in kinds} for name, way in ways.items()}


def _no_tool(way: saves.Way) -> dict[str, Any]:
    return {"outcome": "not measured: ckpt-chaos is not installed"}


def measured(row: rows.Row, options: argparse.Namespace) -> dict[str, Any]:
    """What becomes of the faults with a way, and the places that it names, in this process."""
    found: dict[str, Any] = {"version": row.version()}
    if "faults" in options.parts:
        keys = list(faults.FAULTS)[:2] if options.quick else list(faults.FAULTS)
        healthy = faults.run(row.make(False), "none")
        found["healthy"] = {**shortened(healthy), "alarms": faults.alarms(healthy["text"])[:3]}
        found["faults"] = {}
        for key in keys:
            seen = faults.run(row.make(False), key)
            seen["alarms"] = faults.alarms(seen["text"], healthy["text"])[:2]
            found["faults"][key] = shortened(seen)
    if "zoo" in options.parts and row.make(True).places is not None:
        found["zoo"] = naming.judged(row.make, programs(options))
    elif "zoo" in options.parts and row.name == rows.ALL_OURS:
        found["zoo"] = naming.ours(programs(options))
    return found


def programs(options: argparse.Namespace) -> list[str]:
    """Those of the zoo that go wrong, and that are not held out."""
    found = [name for name in naming.catalogue.FAILURES if not naming.catalogue.held_out(name)]
    return found[:2] if options.quick else found


def shortened(seen: dict[str, Any]) -> dict[str, Any]:
    """Without what is long; the weights as a sum, to be compared."""
    kept = {key: value for key, value in seen.items() if key not in ("text", "last_weights")}
    return {**kept, "weights_sum": repr(sum(seen["last_weights"]))}


def judge(all_rows: dict[str, Any]) -> None:
    """The word for each outcome, beside what the same fault does to a bare Trainer."""
    bare = all_rows[rows.BARE]
    for row in all_rows.values():
        for key, seen in row.get("faults", {}).items():
            seen["outcome"] = faults.outcome(seen, bare["faults"][key], key)
        if "healthy" in row:
            row["healthy"]["same_weights"] = row["healthy"]["weights_sum"] == bare["healthy"]["weights_sum"]


def told(name: str, row: dict[str, Any]) -> None:
    """A few lines on the screen."""
    print(f"\n{name}", row.get("missing", ""), flush=True)
    for key, seen in row.get("faults", {}).items():
        print(f"  {faults.FAULTS[key]}: {seen['outcome']} {seen['harm'] or ''}")
    if "zoo" in row:
        print(
            f"  place named: {row['zoo']['right']} right, {row['zoo']['wrong']} wrong of {row['zoo']['of']}", flush=True
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three ways, two faults, one round")
    parser.add_argument("--minutes", type=float, default=9, help="for all; one round of step times in any case")
    parser.add_argument("--rounds", type=int, default=15, help="of step times, at most")
    parser.add_argument("--device", default="cpu", help="cpu, or gpu for the step times")
    parser.add_argument("--ways", help="names of ways or parts of them, with commas")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path, help="whose tables are rewritten")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.began = time.monotonic()
    options.until = options.until or options.began + 60 * options.minutes
    options.device = "cuda" if options.device == "gpu" else options.device
    options.parts = options.parts.split(",")
    options.ways = options.ways.split(",") if options.ways else list(QUICK) if options.quick else None
    options.rounds = 1 if options.quick else options.rounds
    return options


if __name__ == "__main__":
    main()
