"""What tests of undoing share."""

from collections.abc import Iterator

import pytest

from lightning_stability.recovery import metric_undo, undo


@pytest.fixture(params=["host", "device"])
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a device nobody may look at the flag; the code for that runs on the CPU just as well."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "device":
            for module in (undo, metric_undo):
                patch.setattr(module, "is_on_host", lambda flag: False)
        yield
