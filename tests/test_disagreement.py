"""Gradients that ranks do not share end the run on both ranks; neither waits for the other."""

from pathlib import Path

import pytest

from tests.test_distributed import two_ranks

SCRIPT = Path(__file__).with_name("distributed_disagree.py")


def test_gradients_that_are_not_reduced_are_refused_at_the_first_step(tmp_path: Path) -> None:
    results = two_ranks(tmp_path, "plain", "pytorch_lightning", launch_both=True, script=SCRIPT)
    assert [result["raised"] for result in results] == ["MisconfigurationException"] * 2
    assert all("self.manual_backward(loss)" in result["said"] for result in results)
    assert [result["step"] for result in results] == [0, 0]


def test_ranks_whose_epochs_are_not_equally_long_do_not_wait_for_each_other_at_an_epochs_end(tmp_path: Path) -> None:
    first, second = two_ranks(tmp_path, "uneven", "pytorch_lightning", launch_both=True, script=SCRIPT)
    assert (first["raised"], first["step"]) == ("NoneType", 24), "as it ends without callbacks"
    assert second["raised"] == "RuntimeError", "the first has left"
    assert first["finite"]
    assert second["finite"]


@pytest.mark.slow
def test_a_gradient_spoilt_after_the_reduction_ends_both_ranks(tmp_path: Path) -> None:
    first, second = two_ranks(tmp_path, "late", "pytorch_lightning", launch_both=True, script=SCRIPT)
    assert second["raised"] == "RanksDisagreeError"
    assert "not finite on rank 1, but rank 0 did not report the same" in second["said"]
    assert first["raised"] != "NoneType", "the other rank has lost its peer"
    assert first["finite"]
    assert second["finite"]
