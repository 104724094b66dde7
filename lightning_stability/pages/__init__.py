"""Self-contained HTML pages and their charts: what every report of the package looks like."""

from __future__ import annotations

from importlib.util import find_spec

_NEEDED = ("jinja2", "matplotlib")


def what_is_missing() -> str | None:
    """What has to be installed before a page can be made, in a sentence; None if all is there."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if not missing:
        return None
    return f"{' and '.join(missing)} cannot be imported; install it with: pip install 'lightning-stability[report]'"
