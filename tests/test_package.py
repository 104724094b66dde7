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
        *("_compat", "atomic", "checkpointing", "diagnosis", "events", "flagged_inputs", "health", "internals"),
        *("notices", "processes", "recovery", "runtime"),
    },
    "plugin": {"_compat", "callbacks"},
    "tuab": {"", "atomic"},
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


WRITES_ON_ITS_WAY = {
    # outside of atomic.py: where files are written, and how they come into place
    "checkpointing/writing.py write_file": "into the open file of atomic.replace_file, or of an object store",
    "checkpointing/writing.py _switch_last": "under the name that atomic.put_in_place gives",
    "checkpointing/shard_writing.py _finish": "into a folder that atomic.move_into_place puts there",
    "checkpointing/section.py _write_their_way": "renames an older checkpoint, where a plugin of the user's writes",
    "checkpointing/own_objects.py allow_own_hyperparameters": "into memory",
    "checkpointing/own_objects.py _needs_objects": "into memory",
    "diagnosis/incident.py _fill": "into a folder that atomic.put_in_place puts there",
    "diagnosis/incident.py _save": "into that folder",
    "diagnosis/repro.py _write": "into a temporary folder, from which atomic.replace_file takes it",
    "events.py EventLog._append": "renames the file that is full",
    "status/command.py show_status": "gives what is printed to nobody",
    "tuab/building.py _opened": "a journal that grows with the cache and says how much of it counts",
    "tuab/building.py _write": "that journal and its cache",
    "tuab/building.py _Writer._cut": "what they have beyond what counts",
    "tuab/synthetic.py SyntheticCorpus.write": "renames the folder of an invented corpus once it is whole",
    "tuab/synthetic.py _Recording.write": "breaks one of its files on purpose",
}


def writing_functions(path: Path) -> set[str]:
    """The functions in which a file is opened for writing, written, copied, renamed or cut."""
    found = set()

    def walk(node: ast.AST, inside: tuple[str, ...]) -> None:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            inside = (*inside, node.name)
        if isinstance(node, ast.Call) and writes_a_file(node):
            found.add(".".join(inside))
        for child in ast.iter_child_nodes(node):
            walk(child, inside)

    walk(ast.parse(path.read_text()), ())
    return found


def writes_a_file(call: ast.Call) -> bool:
    function = ast.unparse(call.func)
    owner, _, name = function.rpartition(".")
    given = [ast.unparse(argument) for argument in (*call.args, *(keyword.value for keyword in call.keywords))]
    if name == "open" and owner == "os":
        return any(flag in " ".join(given) for flag in ("O_WRONLY", "O_RDWR", "O_CREAT", "flags"))
    if name in ("open", "fdopen"):
        modes = [value.strip("'") for value in given if re.fullmatch(r"'[rwaxbt+]+'", value)]
        return any(set(mode) & set("wax+") for mode in modes)
    if name == "replace":  # a string's has two arguments
        return owner == "os" or len(given) == 1
    if name in ("write", "save", "dump"):
        return owner in ("os", "torch", "np", "numpy", "json", "pickle", "yaml")
    copies = owner == "shutil" and name.startswith(("copy", "move"))
    return copies or name in ("write_text", "write_bytes", "truncate", "ftruncate", "pwrite", "rename", "savez")


@pytest.mark.parametrize(
    ("code", "writes"),
    [
        ("open(path, 'w')", True),
        ("path.open(mode='ab')", True),
        ("open(path)", False),
        ("path.open('rb')", False),
        ("path.write_text('x')", True),
        ("torch.save(state, path)", True),
        ("os.open(path, os.O_RDWR)", True),
        ("os.open(path, os.O_RDONLY)", False),
        ("part.replace(path)", True),
        ("name.replace('a', 'b')", False),
        ("shutil.copyfile(a, b)", True),
    ],
)
def test_a_call_that_writes_a_file_is_known(code: str, writes: bool) -> None:
    assert writes_a_file(ast.parse(code, mode="eval").body) is writes


def test_every_file_is_written_the_one_way() -> None:
    package = ROOT / "lightning_stability"
    found = {
        f"{path.relative_to(package).as_posix()} {name}"
        for path in package.rglob("*.py")
        for name in writing_functions(path)
        if path.name != "atomic.py"
    }
    assert found == set(WRITES_ON_ITS_WAY)
