"""Errors of ours that are contained leave the step as it was."""

from typing import Any

from lightning_stability.runtime.containment import ContainedListener


class Fails:
    def after_step(self, optimizer: Any, model: Any, result: Any, kwargs: dict[str, Any]) -> Any:
        raise RuntimeError("ours")


def test_each_failure_after_a_step_leaves_the_steps_result():
    seen: list[Exception] = []
    listener = ContainedListener(Fails(), lambda error: not seen.append(error))
    assert [listener.after_step(None, None, "loss", {}) for _ in range(3)] == ["loss"] * 3
    assert len(seen) == 3
