"""Environments with and without the built wheel; all tests that use them run in one worker and share them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.plugin.environments import Environment, build

collect_ignore = ["fits.py"]  # a program for the environments


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The package as it would be published: the sdist and the wheel."""
    return build(tmp_path_factory.mktemp("distributions"))


@pytest.fixture(scope="session")
def wheel(distributions: tuple[Path, Path]) -> Path:
    """The wheel, which was built from the sdist."""
    return distributions[1]


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """An environment in which the wheel is installed."""
    environment = Environment(tmp_path_factory.mktemp("installed"), wheel)
    yield environment
    environment.close()


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """The same environment without the package."""
    environment = Environment(tmp_path_factory.mktemp("bare"))
    yield environment
    environment.close()
