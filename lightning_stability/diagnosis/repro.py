"""`repro.py`: the shortest script found that fails as a recorded step did, with torch alone; and the same mended."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from lightning_stability.diagnosis.calls import CallRecorder
from lightning_stability.diagnosis.errors import DiagnosisError
from lightning_stability.diagnosis.origin import Origin
from lightning_stability.diagnosis.replay import Replay
from lightning_stability.diagnosis.repro_mends import mends
from lightning_stability.diagnosis.repro_optimizer import optimizer_scripts
from lightning_stability.diagnosis.repro_plan import CannotReproduceError, Plan, Slice, choose, make_plan
from lightning_stability.diagnosis.repro_shrink import fails_alike, is_mended, shrink
from lightning_stability.diagnosis.repro_text import Mend, Script, Writer, plain_line
from lightning_stability.diagnosis.step import RecordedStep

FAILING, MENDED, DATA = "repro.py", "repro_mended.py", "repro.pt"
_SECONDS = 120.0


def write_repro(folder: Path, step: RecordedStep, origin: Origin | None) -> dict[str, Any]:
    """Write the script, the mended one and their data, each checked by running it in a process of its own.

    Args:
        folder: The incident's.
        step: The recorded step.
        origin: What the trace found.

    Returns:
        What `report.json` says of it: `path`, `lines`, `message`, `mended`, `remedy`, or `why_not`.
    """
    try:
        if origin is None:
            raise CannotReproduceError("the origin is not known")
        return _write(folder, step, origin)
    except DiagnosisError as error:
        return {"path": None, "why_not": str(error)}
    except Exception as error:  # a script is a help; the diagnosis goes before it
        return {"path": None, "why_not": f"{type(error).__name__}: {error}"}


def _write(folder: Path, step: RecordedStep, origin: Origin) -> dict[str, Any]:
    if origin.phase == "optimizer":
        failing, *mended = optimizer_scripts(step, origin)
        candidates = [(mend.remedy, script) for mend, script in mended]
        first = failing
    else:
        plan = _find_plan(step, origin)
        first = Writer(plan).write()
        found = next((mend for mend in mends(plan) if is_mended(plan, mend)), None)
        candidates = [] if found is None else [(found.remedy, Writer(plan, found).write())]
    with tempfile.TemporaryDirectory() as place:
        part = Path(place)
        head = _head(origin)
        text = _text(first, head)
        (part / FAILING).write_text(text, encoding="utf-8")
        if first.saved:
            torch.save(first.saved, part / DATA)
        status, message = _run(part / FAILING)
        if status != 1 or not message.startswith("AssertionError"):
            raise CannotReproduceError(f"the script that was made did not fail as the step did: {message}")
        report: dict[str, Any] = {"path": FAILING, "lines": len(text.splitlines()), "message": message, "mended": None}
        for remedy, script in candidates:
            (part / MENDED).write_text(_text(script, [*head, f"# Mended: {plain_line(remedy)}."]), encoding="utf-8")
            if _run(part / MENDED)[0] == 0:
                report |= {"mended": MENDED, "remedy": remedy}
                break
            (part / MENDED).unlink()
        _move(part, folder)
    return report


def _find_plan(step: RecordedStep, origin: Origin) -> Plan:
    """The plan of the most telling slice that fails in the same way, with as few values as do."""
    recorder = _record(step)
    for chosen in choose(recorder, origin):
        try:
            plan = make_plan(_record(step, chosen), chosen)
            if fails_alike(plan):
                return shrink(plan, origin.samples)
        except CannotReproduceError as error:
            reason: str = str(error)
            continue
        reason = "its calls, made again one by one, do not fail"
    raise CannotReproduceError(reason)


def _record(step: RecordedStep, chosen: Slice | None = None) -> CallRecorder:
    replay = Replay(step)
    recorder = CallRecorder(replay.module, frozenset(chosen.indices if chosen else ()))
    replay.run(recorder)
    return recorder


def _head(origin: Origin) -> list[str]:
    place = f" at {Path(origin.file).name}:{origin.line}" if origin.file else ""
    module = f", in the module `{origin.module}`" if origin.module else ""
    return [
        f"# Fails as the recorded training step did: its {origin.failed} was not finite. Needs torch alone.",
        f"# The calls are those of the step{plain_line(f'{place}{module}')}; the values are as few as fail alike.",
    ]


def _text(script: Script, head: list[str]) -> str:
    imports = [line for line in script.imports if line == "import math"]
    imports += ["from pathlib import Path"] if script.saved else []
    definitions = [line for line in script.imports if line != "import math"]
    load = [f'saved = torch.load(Path(__file__).with_name("{DATA}"), weights_only=True)'] if script.saved else []
    parts = [head, imports, ["import torch"], *([d, ""] for d in definitions), load, script.body, script.check]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _run(path: Path) -> tuple[int, str]:
    """The status of a script in a process of its own, and the last line of what it says."""
    try:
        done = subprocess.run(
            [sys.executable, path.name], cwd=path.parent, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return -1, f"it ran for more than {_SECONDS:.0f} s"
    return done.returncode, (done.stderr.strip().splitlines() or [""])[-1]


def _move(part: Path, folder: Path) -> None:
    for name in (FAILING, MENDED, DATA):
        (folder / name).unlink(missing_ok=True)
        if (part / name).is_file():
            data = (part / name).read_bytes()
            temporary = folder / f".{name}.part"
            temporary.write_bytes(data)
            os.replace(temporary, folder / name)  # noqa: PTH105


__all__ = ["Mend", "write_repro"]
