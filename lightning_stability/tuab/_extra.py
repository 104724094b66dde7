"""The packages of the ``tuab`` extra, loaded when they are needed and asked for by name when they are missing."""

from __future__ import annotations

import importlib
from typing import Any

from pytorch_lightning.utilities.exceptions import MisconfigurationException


def need(module: str) -> Any:
    """Import a package of the ``tuab`` extra.

    Args:
        module: The module to import, such as ``"mne"``.

    Raises:
        MisconfigurationException: If it is not installed; the message holds the line that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MisconfigurationException(
            f"The included TUAB trainer needs {module.partition('.')[0]}, which could not be imported ({error}). "
            "Install the extra that brings it: pip install 'lightning-stability[tuab]'"
        ) from error
