"""A file of each format that was written outside of a test loads, or says in one line why not."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from lightning_stability.checkpointing.resume import FORMAT, READABLE, SECTION
from tests import checkpoint_fit as fits
from tests.callbacks.test_fractional_checkpoint import fit, result

FILES = {int(path.stem): path for path in (Path(__file__).parent / "formats").glob("*.ckpt")}
DATA = {3: "samples", 4: "plain"}  # of the run that the file is of; in 3 a plain loader has no position


def test_a_file_of_each_readable_format_is_kept() -> None:
    assert sorted(FILES) == sorted(READABLE) == sorted(DATA)
    assert FORMAT in FILES
    for number, path in FILES.items():
        assert torch.load(path, weights_only=True)[SECTION]["format"] == number


@pytest.mark.parametrize("number", sorted(FILES))
def test_it_resumes_inside_its_epoch(tmp_path: Path, number: int) -> None:
    options = {"data": DATA[number], "max_epochs": 1, "validate": False, "checkpoint": {"every_n_epochs": 0.4}}
    fit(tmp_path / "whole", **options)
    fit(tmp_path / "resumed", ckpt_path=str(FILES[number]), seed=9, **options)
    whole, resumed = result(tmp_path / "whole"), result(tmp_path / "resumed")
    assert resumed["global_step"] == 7
    assert len(resumed["seen"]) == 4
    assert resumed["seen"] == whole["seen"][3:]


@pytest.mark.parametrize(("number", "words"), [(2, "another version"), (FORMAT + 1, "a newer version")])
def test_a_format_that_is_not_known_is_said_in_one_line(tmp_path: Path, number: int, words: str) -> None:
    checkpoint = torch.load(FILES[FORMAT], weights_only=True)
    checkpoint[SECTION]["format"] = number
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fits.fit(tmp_path, data="plain", max_epochs=1, ckpt_path=str(tmp_path / "other.ckpt"))
    said = [str(warning.message) for warning in caught if "format" in str(warning.message)]
    assert len(said) == 1
    assert words in said[0]
    assert f"in format {number}" in said[0]
