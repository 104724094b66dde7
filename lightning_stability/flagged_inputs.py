"""flagged_inputs.csv: the samples that a run would not train on, for the next run to leave out."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path

FILE_NAME = "flagged_inputs.csv"


@dataclass(slots=True, frozen=True)
class FlaggedInput:
    """One row: a sample, or a whole batch, and what is wrong with it. None where it is not known.

    Attributes:
        epoch: The epoch.
        batch_idx: The batch in that epoch.
        rank: The global rank of the process that had it.
        sample: Position in the batch; None if no single sample is at fault.
        dataset_index: Position in the training dataset, as the sampler said.
        description: What `describe_sample` of the data module or the module says of it.
        tensor: Where it is in the batch.
        reason: `"nonfinite"`, `"max_abs"`, `"constant"` or `"scale"`.
        value: How many values are not finite; the largest magnitude; the first constant channel; the std.
    """

    epoch: int
    batch_idx: int
    rank: int
    sample: int | None
    dataset_index: int | None
    description: str | None
    tensor: str
    reason: str
    value: float


COLUMNS = tuple(field.name for field in fields(FlaggedInput))


def append_flagged(folder: str | os.PathLike[str] | None, rows: Iterable[FlaggedInput]) -> None:
    """Append rows to the file in a run's log folder, if it has one; several processes may do so at once.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> append_flagged(folder, [FlaggedInput(0, 7, 0, 3, 1203, "subject 12, 96 s", "batch['eeg']", "scale", 2e4)])
        >>> print((Path(folder) / FILE_NAME).read_text().strip())
        epoch,batch_idx,rank,sample,dataset_index,description,tensor,reason,value
        0,7,0,3,1203,"subject 12, 96 s",batch['eeg'],scale,20000.0
    """
    lines = _csv([astuple(row) for row in rows])
    if folder is None or not lines:
        return
    path = Path(folder) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        _begin(path)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, lines)  # one call, so that rows of several processes do not mix
    finally:
        os.close(descriptor)


def _begin(path: Path) -> None:
    """Make the file with its header; whoever comes first, it is there whole or not at all."""
    own = path.with_name(f"{path.name}.{os.getpid()}.partial")
    own.write_bytes(_csv([COLUMNS]))
    try:
        with contextlib.suppress(FileExistsError):
            os.link(own, path)
    except OSError:  # a file system without links
        with contextlib.suppress(FileExistsError), path.open("xb") as file:
            file.write(own.read_bytes())
    finally:
        own.unlink()


def _csv(rows: Iterable[Iterable[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
