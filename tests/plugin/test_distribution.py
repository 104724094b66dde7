"""What `python -m build` makes: complete, and it installs and works where there is nothing of ours."""

import configparser
import email
import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from lightning_stability import __version__
from tests.plugin.environments import ROOT, environment_variables, tracked_files

pytestmark = pytest.mark.xdist_group("installed")

# Of no use outside of the repository.
LEFT_OUT = (".gitignore", ".ci/", ".github/", ".pre-commit-config.yaml")

TINY_FIT = """
import lightning_stability, pathlib, pytorch_lightning as pl, torch
from importlib import metadata
from pytorch_lightning.demos.boring_classes import BoringModel

assert "site-packages" in pathlib.Path(lightning_stability.__file__).parts
callbacks = [lightning_stability.NaNEarlyStop(patience=1), lightning_stability.GradNormMonitor()]
trainer = pl.Trainer(max_steps=3, accelerator="cpu", enable_progress_bar=False, callbacks=callbacks)
trainer.fit(BoringModel())
print("TRAINED", trainer.global_step, metadata.version("lightning-stability"))
"""


@pytest.fixture
def names(distributions):
    """What is in the sdist, less its leading folder, and in the wheel."""
    sdist, wheel = distributions
    with tarfile.open(sdist) as packed:
        inside = {member.name.partition("/")[2] for member in packed.getmembers() if member.isfile()}
    return inside, set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture
def metadata(distributions):
    """Reads a file of the wheel's dist-info."""
    packed = zipfile.ZipFile(distributions[1])
    return lambda name: packed.read(f"lightning_stability-{__version__}.dist-info/{name}").decode()


def test_the_sdist_holds_the_repository(names):
    sdist, _ = names
    assert {name for name in tracked_files() if not name.startswith(LEFT_OUT)} - sdist == set()
    assert [name for name in sdist if name.endswith(".pyc") or name.startswith(("site/", ".venv/"))] == []


def test_the_wheel_holds_the_package_with_its_data_and_nothing_else(names):
    _, wheel = names
    ours = {name for name in wheel if not name.startswith(f"lightning_stability-{__version__}.dist-info/")}
    tracked = {name for name in tracked_files() if name.startswith("lightning_stability")}
    assert ours == tracked
    assert {"lightning_stability/py.typed", "lightning_stability/tuab/configs/tuab_stable.yaml"} <= wheel


def test_the_wheel_names_its_commands_and_entry_points(metadata):
    found = configparser.ConfigParser()
    found.read_string(metadata("entry_points.txt"))
    assert set(found["console_scripts"]) == {"lightning-stability", "lightning"}
    assert "lightning-stability" in found["pytorch_lightning.callbacks_factory"]
    assert "lightning-stability" in found["lightning.pytorch.callbacks_factory"]


def test_the_description_is_the_readme_and_an_index_can_show_it(metadata):
    markdown = pytest.importorskip("readme_renderer.markdown")
    fields = email.message_from_string(metadata("METADATA"))
    assert fields["Description-Content-Type"].startswith("text/markdown")
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["License-File"] == "LICENSE"
    text = fields.get_payload()
    assert text.strip() == (ROOT / "README.md").read_text().strip()
    warnings = io.StringIO()
    html = markdown.render(text, stream=warnings)
    assert html is not None, warnings.getvalue()
    assert "<table>" in html
    assert warnings.getvalue() == ""


def test_the_wheel_trains_where_nothing_else_of_ours_is(installed, tmp_path):
    done = installed(TINY_FIT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"TRAINED 3 {__version__}" in done.stdout


@pytest.mark.slow
def test_sdist_and_wheel_install_and_train_in_an_empty_environment(distributions, tmp_path):
    """Everything comes from the index, as for a user; it takes minutes and a gigabyte."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "empty")], check=True)
    python = str(tmp_path / "empty/bin/python")

    def pip(*words: str | Path) -> None:
        pinned = ["--quiet", "-c", str(ROOT / "constraints.txt")] if words[0] == "install" else []
        done = subprocess.run([python, "-m", "pip", *map(str, words), *pinned], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    pip("install", "torch")
    for distribution in distributions:
        pip("install", distribution)
        words = [python, "-c", TINY_FIT]
        done = subprocess.run(words, cwd=tmp_path, env=environment_variables(None), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"TRAINED 3 {__version__}" in done.stdout
        pip("check")
        pip("uninstall", "--yes", "lightning-stability")
