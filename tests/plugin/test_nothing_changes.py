"""A run with the package installed gives, bit for bit, what it gives without."""

import json
from pathlib import Path

import pytest

from tests.runs import NAMESPACES

pytestmark = pytest.mark.xdist_group("installed")
PROGRAM = (Path(__file__).parent / "fits.py").read_text()


def results(environment, namespace, cwd, automatic=None):
    cwd.mkdir()
    done = environment(f"NAMESPACE, ONLY = {namespace!r}, ()\n{PROGRAM}", cwd=cwd, automatic=automatic)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("RESULT")[1]), done.stderr


@pytest.mark.parametrize("namespace", [NAMESPACES[0], pytest.param(NAMESPACES[1], marks=pytest.mark.slow)])
def test_weights_metrics_files_and_checkpoints_are_what_they_are_without_the_package(
    installed, bare, tmp_path, namespace
):
    ours, said = results(installed, namespace, tmp_path / "installed")
    without, _ = results(bare, namespace, tmp_path / "bare")
    assert ours.keys() == without.keys()
    differences = [
        f"{case}: {part}" for case, result in without.items() for part in result if ours[case][part] != result[part]
    ]
    assert differences == []
    assert len(without["every hook"]["hooks"]) > 50
    aside = [line.split("this run: ")[1] for line in said.splitlines() if " in this run: " in line]
    assert [reason[:5] for reason in aside] == ["AdamW", "LBFGS", "NaNEa"], aside  # eps, closures, weights
