"""What tests of several callbacks take."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import checkpoint_fit as fits


@pytest.fixture(scope="module")
def processes() -> Iterator[fits.Fits]:
    """Runs fits, each in a process of its own that can be killed."""
    launcher = fits.Fits()
    yield launcher
    launcher.close()
