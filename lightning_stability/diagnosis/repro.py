"""`repro.py`: the shortest script found that fails as a recorded step did, with torch alone; and the same mended."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from lightning_stability.atomic import replace_file
from lightning_stability.diagnosis.calls import CallRecorder
from lightning_stability.diagnosis.errors import DiagnosisError
from lightning_stability.diagnosis.origin import Origin
from lightning_stability.diagnosis.replay import Replay
from lightning_stability.diagnosis.repro_mends import mends
from lightning_stability.diagnosis.repro_optimizer import optimizer_scripts
from lightning_stability.diagnosis.repro_plan import CannotReproduceError, Plan, Slice, choose, make_plan
from lightning_stability.diagnosis.repro_shrink import fails_alike, is_mended, shrink
from lightning_stability.diagnosis.repro_text import Script, Writer, plain_line
from lightning_stability.diagnosis.step import RecordedStep

FAILING, MENDED, DATA = "repro.py", "repro_mended.py", "repro.pt"
_SECONDS = 120.0


def write_repro(folder: Path, step: RecordedStep, origin: Origin | None) -> dict[str, Any]:
    """Write the script, the mended one and their data, each checked by running it in a process of its own.

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
        part, head = Path(place), _head(origin)
        text = _text(first, head)
        (part / FAILING).write_text(text, encoding="utf-8")
        torch.save(first.saved, part / DATA)
        others = [part / f"mended_{number}.py" for number in range(len(candidates))]
        for path, (remedy, script) in zip(others, candidates, strict=True):
            path.write_text(_text(script, [*head, f"# Mended: {plain_line(remedy)}."]), encoding="utf-8")
        message, *rest = _run([part / FAILING, *others])
        if not message.startswith("AssertionError"):
            raise CannotReproduceError(
                f"the script that was made did not fail as the step did: {message or 'it passed'}"
            )
        files = {FAILING: text.encode()} | ({DATA: (part / DATA).read_bytes()} if first.saved else {})
        report: dict[str, Any] = {"path": FAILING, "lines": len(text.splitlines()), "message": message, "mended": None}
        passed = next((number for number, said in enumerate(rest) if not said), None)
        if passed is not None:
            files[MENDED] = others[passed].read_bytes()
            report |= {"mended": MENDED, "remedy": candidates[passed][0]}
    _put(folder, files)
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


_RUNNER = """
import json, runpy, sys
for path in sys.argv[1:]:
    said = ""
    try:
        runpy.run_path(path, run_name="__main__")
    except BaseException as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
    print(json.dumps(said), file=sys.stderr, flush=True)
"""


def _run(paths: list[Path]) -> list[str]:
    """Run scripts in a process of their own; what each of them fails with, empty if it passes."""
    command = [sys.executable, "-c", _RUNNER, *map(str, paths)]
    try:
        done = subprocess.run(
            command, cwd=paths[0].parent, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise CannotReproduceError(f"the script that was made runs for more than {_SECONDS:.0f} s") from error
    said = [line for line in done.stderr.splitlines() if line.startswith('"')]
    if len(said) != len(paths):
        raise CannotReproduceError(f"the process that ran the script ended with the status {done.returncode}")
    return [json.loads(line) for line in said]


def _put(folder: Path, files: dict[str, bytes]) -> None:
    for name in (FAILING, MENDED, DATA):
        (folder / name).unlink(missing_ok=True)
    for name, data in files.items():
        replace_file(folder / name, lambda file, data=data: file.write(data))  # type: ignore[misc]


__all__ = ["write_repro"]
