"""One table against everyone: what each way costs, what becomes of each fault, and who names the right place.

Step times are those of blocks between blocks of a bare Trainer, all ways in one process. Then each way has a process of
its own for the faults of `rivals/faults.py` and, if it names places, for the open programs of tests/zoo. Last come the
faults of checkpoints. Nothing is installed here:
`make bench-compare` makes an environment with the packages of requirements-compare.txt and calls this there; a package
that is not there is named.

usage: python benchmarks/compare.py [--quick] [--rounds N] [--device cpu|gpu] [--ways a,b] [--parts a,b]
                                    [--json FILE] [--page FILE]

With --json, ways that are measured again replace those of the file. With --page, the tables of that page are rewritten
from the file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ["LIGHTNING_STABILITY_CALLBACKS"] = "none"  # a bare Trainer shall be bare where the package is installed

import torch  # noqa: E402
from common import machine, quiet, save  # noqa: E402
from rivals import cost, faults, naming, rows, saves, table  # noqa: E402

PARTS = ("cost", "faults", "zoo", "saves")
QUICK = ("bare", "SpikeDetection", "NaNEarlyStop")


def main() -> None:
    options = arguments()
    quiet()
    torch.set_num_threads(1)
    if options.one in ("saves", "cost"):
        options.json.write_text(json.dumps(saves.measure(options.quick) if options.one == "saves" else costs(options)))
        return
    if options.one:
        [row] = [row for row in rows.ROWS if row.name == options.one]
        options.json.write_text(json.dumps(measured(row, options)))
        return
    report = started(options)
    bare = report["rows"].get(rows.BARE, {})
    has_bare = options.ways and all(part in bare or part in ("zoo", "saves") for part in options.parts)
    for row in rows.rows(options.ways) if {"faults", "zoo"} & {*options.parts} else []:
        if row.name == rows.BARE and has_bare:
            continue
        began = time.monotonic()
        known = report["rows"].get(row.name, {})
        missing = row.missing()
        known.pop("missing", None)
        report["rows"][row.name] = {"missing": missing} if missing else {**known, **in_a_process(row.name, options)}
        judge(report["rows"])
        save(report, options.json)
        told(row.name, report["rows"][row.name], time.monotonic() - began)
    if "cost" in options.parts:
        for workload, found in in_a_process("cost", options).items():
            for way, figures in found.items():
                report["rows"].setdefault(way, {}).setdefault("cost", {})[workload] = figures
                print(f"{way}, {workload}: {figures}", flush=True)
        save(report, options.json)
    if "saves" in options.parts:
        report["saves"] = in_a_process("saves", options)
        save(report, options.json)
        for way, found in report["saves"].items():
            print(f"\n{way}", *(f"\n  {saves.FAULTS[kind]}: {seen['outcome']}" for kind, seen in found.items()))
    if options.page:
        table.write(report, options.page)


def started(options: argparse.Namespace) -> dict[str, Any]:
    """The report of the file, or a new one; its rows in the order of the table."""
    known: dict[str, Any] = {"rows": {}}
    if options.json and options.json.exists():
        known = json.loads(options.json.read_text())
    device = torch.device(options.device)
    ordered = {row.name: known["rows"].get(row.name) for row in rows.ROWS}
    measured = {name: row for name, row in ordered.items() if row}
    today = datetime.date.today().isoformat()
    return {**known, "machine": machine(device), "date": today, "absent": rows.ABSENT, "rows": measured}


def in_a_process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of a way. What a rival leaves behind in its process disturbs no other."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        words = ["--one", name, "--json", str(path), "--device", options.device, "--rounds", str(options.rounds)]
        words += [
            "--parts",
            ",".join(options.parts),
            "--ways",
            ",".join(options.ways or []),
            *(["--quick"] if options.quick else []),
        ]
        command = [sys.executable, str(Path(__file__).resolve()), *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "INF_CHECK": "1"}
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text())
            return found
        return {"missing": f"its process ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"}


def measured(row: rows.Row, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of a way, in this process."""
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


def costs(options: argparse.Namespace) -> dict[str, Any]:
    """What the ways cost that are here, on each workload."""
    device = torch.device(options.device)
    ways = {row.name: row.make for row in rows.rows(options.ways) if not row.missing()}
    return {name: cost.measure(ways, name, device, options.rounds) for name in cost.workloads(device)}


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


def told(name: str, row: dict[str, Any], seconds: float) -> None:
    """A few lines on the screen."""
    print(f"\n{name} ({seconds:.0f} s)", row.get("missing", ""), flush=True)
    for workload, found in row.get("cost", {}).items():
        print(f"  {workload}: {found}")
    for key, seen in row.get("faults", {}).items():
        print(f"  {faults.FAULTS[key]}: {seen['outcome']} {seen['harm'] or ''}")
    if "zoo" in row:
        print(
            f"  place named: {row['zoo']['right']} right, {row['zoo']['wrong']} wrong of {row['zoo']['of']}", flush=True
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three ways, two faults, one round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="cpu, or gpu for the step times")
    parser.add_argument("--ways", help="names of ways or parts of them, with commas")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path, help="whose tables are rewritten")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.device = "cuda" if options.device == "gpu" else options.device
    options.parts = options.parts.split(",")
    options.ways = options.ways.split(",") if options.ways else list(QUICK) if options.quick else None
    options.rounds = 1 if options.quick else options.rounds
    return options


if __name__ == "__main__":
    main()
