"""The module of a recorded step, made anew in another process from its import path and hyperparameters."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities.parsing import AttributeDict
from torch import nn
from torch.optim import Optimizer

from lightning_stability.diagnosis.errors import DiagnosisError

Description = dict[str, Any]
_SCRIPT = "lightning_stability_recorded_script"
_HINT = "Give a function that makes it: --module package.module:factory"


def describe(module: nn.Module) -> Description:
    """How a module can be made anew, as JSON holds it."""
    cls = type(module)
    path = cls.__module__
    run_by_name = getattr(sys.modules.get("__main__"), "__spec__", None)
    if path == "__main__" and run_by_name is not None:  # python -m package.train
        path = run_by_name.name
    file = next((f.__code__.co_filename for f in vars(cls).values() if inspect.isfunction(f)), None)
    description: Description = {
        "class": f"{path}:{cls.__qualname__}",
        "file": str(Path(file).resolve()) if file and Path(file).is_file() else None,
        "hyperparameters": {},
        "not_kept": [],
        "eval": [path for path, part in module.named_modules() if not part.training],
    }
    for name, value in dict(getattr(module, "hparams_initial", {})).items():
        try:
            description["hyperparameters"][name] = json.loads(json.dumps(value, allow_nan=True))
        except (TypeError, ValueError):
            description["not_kept"].append(f"{name} is a {type(value).__name__}")
    return description


def rebuild(description: Description, incident: Path) -> nn.Module:
    """Make a recorded module anew.

    Args:
        description: What `describe` gave.
        incident: The incident's folder, from which no code is taken.

    Raises:
        DiagnosisError: If it cannot be made; the message says what to do.
    """
    cls = _find_class(description, incident)
    hyperparameters = dict(description["hyperparameters"])
    instantiator = hyperparameters.pop("_instantiator", None)
    made: nn.Module
    try:
        if instantiator is not None:  # recorded by LightningCLI
            from pytorch_lightning.cli import instantiate_module  # slow to import

            made = instantiate_module(cls, hyperparameters)
        else:
            made = cls(**_arguments(cls, hyperparameters))
        for path in description["eval"]:
            made.get_submodule(path).training = False
        return made
    except Exception as error:
        missing = "; ".join(description["not_kept"])
        kept = f" Not recorded: {missing}." if missing else ""
        known = ", ".join(hyperparameters) or "none (call self.save_hyperparameters() in its __init__)"
        raise DiagnosisError(
            f"The module {description['class']} cannot be made anew: {type(error).__name__}: {error}."
            f" Recorded hyperparameters: {known}.{kept} {_HINT}"
        ) from error


def from_factory(module: str | nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """A module that the user gave: itself, a function that makes it, or `package.module:function`.

    Raises:
        DiagnosisError: If no module comes of it.
    """
    if isinstance(module, str):
        path, colon, name = module.partition(":")
        if not colon or not name:
            raise DiagnosisError(f"Found the module {module!r}; expected package.module:function")
        try:
            module = getattr(importlib.import_module(path), name)
        except (ImportError, AttributeError) as error:
            raise DiagnosisError(f"{module} cannot be imported: {error}") from error
    if not isinstance(module, nn.Module):
        module = module()  # type: ignore[operator]
    if not isinstance(module, nn.Module):
        raise DiagnosisError(f"The function gave a {type(module).__name__}; expected a LightningModule")
    return module


def make_optimizers(module: Any) -> list[Optimizer]:
    """The module's optimizers, as its `configure_optimizers` makes them."""
    made = module.configure_optimizers()
    if isinstance(made, tuple) and len(made) == 2 and all(isinstance(part, list) for part in made):
        made = made[0]  # optimizers and schedulers
    several = made if isinstance(made, (list, tuple)) else [made]
    found = [entry["optimizer"] if isinstance(entry, dict) else entry for entry in several]
    return [optimizer for optimizer in found if isinstance(optimizer, Optimizer)]


def _find_class(description: Description, incident: Path) -> Any:
    path, _, name = str(description["class"]).partition(":")
    if "<locals>" in name:
        raise DiagnosisError(f"The class {name} was made inside a function. {_HINT}")
    file = Path(description["file"]) if description["file"] else None
    if file is not None and file.is_relative_to(incident.resolve()):
        raise DiagnosisError(f"The incident names code in its own folder, {file}, which is not executed. {_HINT}")
    try:
        found: Any = _load_script(file) if path == "__main__" else _import(path, file)
        for part in name.split("."):
            found = getattr(found, part)
    except DiagnosisError:
        raise
    except Exception as error:  # whatever the user's module raises
        raise DiagnosisError(f"The module's class {path}:{name} cannot be imported: {error}. {_HINT}") from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise DiagnosisError(f"{path}:{name} is no module's class. {_HINT}")
    return found


def _import(path: str, file: Path | None) -> Any:
    if file is not None:  # where the run found it, behind all that is found here
        root = file.parents[len(path.split(".")) - (0 if file.stem == "__init__" else 1)]
        if str(root) not in sys.path:
            sys.path.append(str(root))
    return importlib.import_module(path)


def _load_script(file: Path | None) -> Any:
    """Load a script under another name than `__main__`, so that it trains nothing."""
    if file is None:
        raise DiagnosisError(f"The module's class was typed into a notebook or a console, so it is in no file. {_HINT}")
    if not file.is_file():
        raise DiagnosisError(f"The module's class is one of the script {file}, which is not there. {_HINT}")
    if _SCRIPT in sys.modules and getattr(sys.modules[_SCRIPT], "__file__", None) == str(file):
        return sys.modules[_SCRIPT]
    spec = importlib.util.spec_from_file_location(_SCRIPT, file)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules[_SCRIPT] = script
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    try:
        spec.loader.exec_module(script)
    except BaseException:
        del sys.modules[_SCRIPT]
        raise
    return script


def _arguments(cls: type, hyperparameters: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
    named = [p for p in list(parameters)[1:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return hyperparameters
    known = {p.name for p in named}
    required = [p.name for p in named if p.default is p.empty]
    if len(required) == 1 and required[0] not in hyperparameters and hyperparameters:
        return {required[0]: AttributeDict(hyperparameters)}  # `save_hyperparameters(config)`
    return {name: value for name, value in hyperparameters.items() if name in known}
