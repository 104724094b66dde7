"""``python -m lightning_stability`` is the ``lightning-stability`` command."""

from __future__ import annotations

import sys
from importlib.metadata import version


def main() -> int:
    """Run the command and return its exit status.

    `status` and `report` are called on login nodes too: they do without torch and Lightning, which take seconds.
    """
    if sys.argv[1:] == ["--version"]:
        print(f"lightning-stability {version('lightning-stability')}")
        return 0
    if sys.argv[1:2] == ["report"]:
        from lightning_stability.status import show_report

        return show_report(sys.argv[1:])
    if sys.argv[1:2] == ["status"]:
        from lightning_stability.status import show_status

        return show_status(sys.argv[1:])
    from lightning_stability.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
