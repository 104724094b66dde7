"""Runs Lightning's own tests in an environment with the package and in one without, and compares the outcomes.

usage: python -m tests.lightning_suite FOLDER [PATH ...]

FOLDER is `tests` of a checkout of Lightning at the installed version. PATHs are below it; by default those of
callbacks, loops, checkpointing and connectors. They need pytest-rerunfailures (their `flaky` mark).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.plugin.environments import Environment, build, environment_variables

PATHS = (
    "tests_pytorch/callbacks",
    "tests_pytorch/checkpointing",
    "tests_pytorch/loops",
    "tests_pytorch/trainer/connectors",
)
EXPECTED = {
    "test_checkpoint_callbacks_are_last": "asserts the exact list of callbacks",
    "test_attach_model_callbacks": "asserts the exact list of callbacks",
    "test_callbacks_state_fit_ckpt_path": "asserts that there are as many callbacks during a fit as after it",
}
"""Tests whose outcome differs, and why.

The entry point's one callback is in every list of callbacks, and during a fit the automatic ones are too.
"""


def outcomes(environment: Environment, folder: Path, paths: list[str], report: Path) -> dict[str, str]:
    """Each test's outcome, by its name."""
    pytest = [environment.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *paths]
    # as it comes: the variable of this process, if any, is not handed on
    done = subprocess.run(pytest, cwd=folder, env=environment_variables(None), check=False)
    if done.returncode not in (0, 1):  # neither "all passed" nor "some failed": then nothing was compared
        sys.exit(f"Lightning's tests did not run (pytest's exit code {done.returncode}); install what they need")
    found = {}
    for case in ET.parse(report).iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        found[f"{case.get('classname')}::{case.get('name')}"] = min(kinds, default="passed")
    return found


def main() -> int:
    """Print every test with another outcome; 1 if one is not expected."""
    folder, paths = Path(sys.argv[1]).resolve(), sys.argv[2:] or list(PATHS)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        (work / "wheel").mkdir()
        installed = Environment(work / "installed", build(work / "wheel")[1])
        bare = Environment(work / "bare")
        with ThreadPoolExecutor() as side_by_side:
            ours, without = side_by_side.map(
                lambda environment, report: outcomes(environment, folder, paths, work / report),
                (installed, bare),
                ("installed.xml", "bare.xml"),
            )
    different = {name for name in {*ours, *without} if ours.get(name) != without.get(name)}
    unexpected = 0
    for name in sorted(different):
        reason = EXPECTED.get(name.split("::")[-1].split("[")[0])
        unexpected += reason is None
        print(f"{name}: {without.get(name)} without, {ours.get(name)} with; {reason or 'NOT EXPECTED'}")
    print(f"{len(without)} tests, {len(different)} with another outcome, {unexpected} of these not expected")
    return int(unexpected > 0)


if __name__ == "__main__":
    sys.exit(main())
