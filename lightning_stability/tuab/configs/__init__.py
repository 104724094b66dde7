"""Files of settings that come with the package and are known by their bare names."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent


def config_names() -> list[str]:
    """Return the bare names of the packaged configurations."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def packaged_file(name: str) -> Path | None:
    """Return the packaged file called ``name``, with or without ``.yaml``, or None.

    A file of the user's own at that path goes before.

    Example::

        >>> packaged_file("tuab_stable").name
        'tuab_stable.yaml'
    """
    if Path(name).is_file() or Path(name).name != name:
        return None
    return next((path for path in (_FOLDER / name, _FOLDER / f"{name}.yaml") if path.is_file()), None)
