import ast
import re
from pathlib import Path

import pytest

from tests.command import run_python

ROOT = Path(__file__).parents[1]


def test_importing_the_package_imports_neither_mne_nor_the_command_line_nor_tensorboard(tmp_path):
    unwanted = ["mne", "edfio", "torchdata", "jsonargparse", "pytorch_lightning.cli", "tensorboard"]
    unwanted += ["lightning_stability.cli", "lightning_stability.tuab"]
    done = run_python(
        "-c", f"import lightning_stability, sys; print([m for m in {unwanted} if m in sys.modules])", cwd=tmp_path
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_importing_the_trainer_does_not_load_the_packages_of_its_extra(tmp_path):
    unwanted = ["mne", "edfio", "torchdata", "jsonargparse"]
    done = run_python(
        "-c", f"import lightning_stability.tuab, sys; print([m for m in {unwanted} if m in sys.modules])", cwd=tmp_path
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names.add(node.module or "")
    return names


def test_nothing_but_the_command_line_imports_the_trainer():
    package = ROOT / "lightning_stability"
    users = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if "tuab" not in path.relative_to(package).parts
        and any(name.startswith("lightning_stability.tuab") for name in imports(path))
    }
    assert users == {"cli.py", "commands.py"}  # the second holds the commands that train nothing


MAY_IMPORT = {
    # the rooms, from the ground up: each may import itself and what stands here
    "_compat": set(),
    "events": set(),
    "internals": set(),
    "flagged_inputs": set(),
    "processes": set(),
    "health": {"_compat"},
    "recovery": {"_compat", "health"},
    "checkpointing": {"_compat", "health", "processes"},
    "runtime": {"_compat", "events", "health", "recovery"},
    "status": {"_compat", "events", "processes"},
    "diagnosis": {"_compat", "checkpointing", "health", "internals"},
    "callbacks": {"_compat", "checkpointing", "diagnosis", "events", "flagged_inputs", "health", "recovery", "runtime"},
    "plugin": {"_compat", "callbacks"},
    "tuab": {""},
    "commands": {"_compat", "checkpointing", "tuab"},
    "cli": {"callbacks", "checkpointing", "commands", "diagnosis", "plugin", "status", "tuab"},
    "": {"callbacks"},  # `__init__.py`: the public names
    "__main__": {"cli", "status"},
}


def room(module: str) -> str:
    return [*module.split("."), ""][1]


def test_no_room_imports_one_that_stands_above_it():
    package = ROOT / "lightning_stability"
    wrong, seen = set(), set()
    for path in sorted(package.rglob("*.py")):
        own = path.relative_to(package).parts[0].removesuffix(".py").replace("__init__", "")
        seen.add(own)
        ours = {name for name in imports(path) if name.split(".")[0] == "lightning_stability"}
        wrong |= {(path.name, name) for name in ours if room(name) not in MAY_IMPORT[own] | {own}}
    assert not wrong
    assert seen == set(MAY_IMPORT)


def pyproject() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="it came with Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_core_dependencies_are_exactly_those_of_the_design():
    project = pyproject()
    core = {re.match(r"[\w-]+(\[\w+\])?", requirement)[0] for requirement in project["dependencies"]}
    assert core == {"pytorch-lightning", "torch", "torchmetrics", "tensorboard", "numpy", "jsonargparse[signatures]"}
    assert set(project["optional-dependencies"]["tuab"]) == {"mne", "edfio", "torchdata"}


def test_every_dependency_is_pinned_in_the_constraints():
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    project = pyproject()
    asked = [
        *project["dependencies"],
        *project["optional-dependencies"]["tuab"],
        *project["optional-dependencies"]["dev"],
    ]
    assert {re.match(r"[\w-]+", requirement)[0].lower() for requirement in asked} <= pinned
