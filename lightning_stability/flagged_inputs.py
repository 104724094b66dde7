"""flagged_inputs.csv: the samples that a run would not train on, for the next run to leave out."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from lightning_stability.atomic import append, create

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

    Raises:
        OSError: If they cannot be written.

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
    create(path, _csv([COLUMNS]))
    append(path, lines)


def _csv(rows: Iterable[Iterable[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
