import ast
import re
from pathlib import Path

import pytest

from tests.command import run_python

ROOT = Path(__file__).parents[1]


def test_importing_the_package_needs_one_namespace_and_loads_no_extra(tmp_path):
    extra = ["mne", "edfio", "torchdata", "jsonargparse"]
    unwanted = [*extra, "pytorch_lightning.cli", "tensorboard", "lightning_stability.cli", "lightning_stability.tuab"]
    # (`lightning` is one of two namespaces, and need not be installed)
    script = "import sys; sys.modules['lightning'] = None"
    script += f"; import lightning_stability; print([m for m in {unwanted} if m in sys.modules])"
    script += f"; import lightning_stability.tuab; print([m for m in {extra} if m in sys.modules])"
    script += "; import pytorch_lightning; callback = lightning_stability.GradNormMonitor()"
    script += "; print(isinstance(callback, pytorch_lightning.Callback), 'lightning.pytorch' in sys.modules)"
    done = run_python("-c", script, cwd=tmp_path)
    assert (done.returncode, done.stdout.split()) == (0, ["[]", "[]", "True", "False"]), done.stderr


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names.add(node.module or "")
            if node.module == "lightning_stability":  # a room, or a public name
                names |= {f"{node.module}.{alias.name}" for alias in node.names if is_room(alias.name)}
                names -= {node.module} if all(is_room(alias.name) for alias in node.names) else set()
    return names


def is_room(name: str) -> bool:
    package = ROOT / "lightning_stability"
    return (package / name).is_dir() or (package / f"{name}.py").is_file()


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
    "internals": set(),
    "processes": set(),
    "notices": set(),
    "atomic": {"processes"},
    "events": {"atomic"},
    "flagged_inputs": {"atomic"},
    "health": {"_compat", "internals"},
    "recovery": {"_compat", "health", "internals"},
    "checkpointing": {"_compat", "atomic", "health", "internals", "notices", "processes", "recovery"},
    "runtime": {"_compat", "events", "health", "internals", "notices", "recovery"},
    "pages": set(),
    "diagnosis": {"", "_compat", "atomic", "checkpointing", "health", "internals", "pages", "recovery"},
    "status": {"atomic", "events", "pages", "processes"},
    "callbacks": {
        *("_compat", "checkpointing", "diagnosis", "events", "flagged_inputs", "health", "internals", "notices"),
        *("processes", "recovery", "runtime"),
    },
    "plugin": {"_compat", "callbacks"},
    "tuab": {""},
    "replay_steps": {"_compat", "callbacks", "checkpointing", "events"},
    "commands": {"_compat", "checkpointing", "diagnosis", "replay_steps", "tuab"},
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


MAX_LINES = 400


def import_graph() -> dict[str, set[str]]:
    """Which of our modules each imports; imports within functions and under TYPE_CHECKING count."""
    paths = [*(ROOT / "lightning_stability").rglob("*.py"), *ROOT.glob("lightning_stability_*.py")]
    dotted = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    files = {name.removesuffix(".__init__"): path for path, name in dotted.items()}
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                # a name is a module of the package, or else something in its `__init__`
                given = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= {name if name in files else str(node.module) for name in given}
        graph[module] = names & files.keys() - {module}
    return graph


def circles(graph: dict[str, set[str]]) -> set[tuple[str, ...]]:
    """The sets of modules that all reach each other."""
    reached = {}
    for module in graph:
        seen, todo = set(), list(graph[module])
        while todo:
            other = todo.pop()
            if other not in seen:
                seen.add(other)
                todo += graph[other]
        reached[module] = seen
    found = {tuple(sorted(m for m in reached[module] if module in reached[m])) for module in graph}
    return {tuple(name.removeprefix("lightning_stability.") for name in circle) for circle in found if circle}


def test_a_circle_of_imports_is_found_however_long_it_is():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": {"d"}, "f": {"a"}}
    assert circles(graph) == {("a", "b", "c"), ("d", "e")}


def test_no_modules_import_each_other():
    assert circles(import_graph()) == set()


def test_no_file_is_longer_than_400_lines():
    package = ROOT / "lightning_stability"
    long = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if len(path.read_text().splitlines()) > MAX_LINES
    }
    assert long == set()


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
        *project["optional-dependencies"]["report"],
        *project["optional-dependencies"]["dev"],
    ]
    assert {re.match(r"[\w-]+", requirement)[0].lower() for requirement in asked} <= pinned
