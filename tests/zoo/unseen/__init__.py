"""Programs that were written without a look at the diagnosis: `judge("unseen.NAME", seed)` of the table takes them."""

from pathlib import Path

NAMES = sorted(
    f"unseen.{path.stem}" for path in Path(__file__).parent.glob("*.py") if path.stem[:5] not in ("__ini", "test_")
)
HEALTHY = [name for name in NAMES if name.startswith("unseen.healthy_")]
FAILURES = [name for name in NAMES if name not in HEALTHY]
