"""The bad samples of a batch drawn as what they are, beside one of the others: a signal, an image, a row, tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_stability.diagnosis.incident import Incident
from lightning_stability.health.values import named_tensors

_MOST_SAMPLES = 2
_MOST_ENTRIES = 4
_MOST_CHANNELS = 16
_MOST_PIXELS = 256
_LONG_ROW = 64


def sample_section(incident: Incident, report: dict[str, Any]) -> dict[str, Any] | None:
    """What the page shows of the bad samples; None where they are not known or not kept.

    Args:
        report: The content of `report.json`.
    """
    samples = _bad_samples(report)
    if not samples or not incident.batches:
        return None
    number = _bad_batch(incident)
    entries = [
        (name, t) for name, t in named_tensors(incident.batches[number]) if t.dim() and t.layout == torch.strided
    ]
    size = next((len(tensor) for _, tensor in entries), 0)
    samples = [sample for sample in samples if sample < size]
    if not samples:
        return None
    other = next((sample for sample in range(size) if sample not in samples), None)
    indices = _dataset_indices(incident, number)
    shown = [(sample, True) for sample in samples[:_MOST_SAMPLES]] + ([(other, False)] if other is not None else [])
    listed = ", ".join(map(str, samples[:12])) + (f" and {len(samples) - 12} more" if len(samples) > 12 else "")
    in_dataset = ", ".join(str(indices[s]) for s in samples[:12]) if indices and len(indices) > max(samples) else ""
    return {
        "heading": "The batch" if len(samples) == size else f"The bad sample{'s' if len(samples) > 1 else ''}",
        "caption": f"Position{'s' if len(samples) > 1 else ''} {listed} of {size} in the batch"
        + (f"; {in_dataset} in the dataset." if in_dataset else ".")
        + (" One of the others is shown beside." if other is not None else ""),
        "entries": [_entry(name, t, shown) for name, t in entries[:_MOST_ENTRIES] if len(t) == size],
    }


def _bad_samples(report: dict[str, Any]) -> list[int]:
    first = next((cause for cause in report.get("causes", []) if cause.get("samples")), report.get("origin") or {})
    return [sample for sample in first.get("samples") or [] if isinstance(sample, int) and sample >= 0]


def _bad_batch(incident: Incident) -> int:
    losses = [float.fromhex(loss) for loss in incident.about["losses"]]
    batches = incident.batches or []
    bad = next((i for i, loss in enumerate(losses[: len(batches)]) if not math.isfinite(loss)), len(batches) - 1)
    return max(bad, 0)


def _dataset_indices(incident: Incident, number: int) -> list[Any]:
    of_batches = incident.about["details"].get("dataset_indices") or []
    found = of_batches[number] if isinstance(of_batches, list) and number < len(of_batches) else None
    return found if isinstance(found, list) else []


def _entry(name: str, tensor: Tensor, shown: list[tuple[int, bool]]) -> dict[str, Any]:
    if tensor.dim() == 1:
        said = [f"sample {s}{'' if bad else ', one of the others'}: {_described(tensor[s])}" for s, bad in shown]
        return {"name": name, "text": "; ".join(said), "shown": []}
    return {"name": name, "text": "", "shown": [_shown(tensor[sample], sample, bad) for sample, bad in shown]}


def _shown(value: Tensor, sample: int, is_bad: bool) -> dict[str, Any]:
    """One sample of one entry."""
    caption = f"Sample {sample}{'' if is_bad else ', one of the others'}: {_described(value)}"
    shown: dict[str, Any] = {"caption": caption, "chart": "", "image": "", "text": ""}
    if not value.is_floating_point():
        return _of_whole_numbers(value, shown)
    value = value.detach().double()
    if value.dim() >= 3 or (value.dim() == 2 and _is_image(value)):
        return shown | {"image": _image(value)}
    return shown | {"chart": _chart(value if value.dim() == 2 else value[None], caption, value.dim() == 1)}


def _of_whole_numbers(value: Tensor, shown: dict[str, Any]) -> dict[str, Any]:
    if value.dim() >= 2 and min(value.shape[-2:]) >= 4:
        return shown | {"image": _image(value.double())}
    flat = value.flatten()[:200].tolist()
    return shown | {"text": " ".join(map(str, flat)) + (" ..." if value.numel() > 200 else "")}


def _is_image(value: Tensor) -> bool:
    height, width = value.shape
    return bool(min(height, width) >= 8 and max(height, width) <= 3 * min(height, width))


def _image(value: Tensor) -> str:
    from lightning_stability.pages.picture import picture

    while value.dim() > 3:
        value = value[0]
    if value.dim() == 3:
        value = value.permute(1, 2, 0) if value.shape[0] == 3 else value[0]
    height, width = value.shape[:2]
    step = max(1, math.ceil(max(height, width) / _MOST_PIXELS))
    return picture(value[::step, ::step].numpy())


def _chart(value: Tensor, title: str, is_row: bool) -> Any:
    from lightning_stability.pages.charts import bars, signals

    if is_row and value.shape[1] <= _LONG_ROW:
        return bars(title, value[0].tolist(), [str(column) for column in range(value.shape[1])])
    is_bad = (~torch.isfinite(value)).any(dim=1)
    order = sorted(range(len(value)), key=lambda channel: (not bool(is_bad[channel]), channel))
    chosen = sorted(order[:_MOST_CHANNELS])
    return signals(title, [value[channel].tolist() for channel in chosen], [str(channel) for channel in chosen])


def _described(value: Tensor) -> str:
    kind = str(value.dtype).removeprefix("torch.")
    if not value.dim():
        return f"{value.item():.6g}" if value.is_floating_point() else str(value.item())
    shape = f"{kind} {list(value.shape)}"
    if not value.is_floating_point() or not value.numel():
        return shape
    finite = value[torch.isfinite(value)].double()
    bad = value.numel() - finite.numel()
    said = f"{shape}, {float(finite.min()):.4g} to {float(finite.max()):.4g}" if finite.numel() else shape
    return f"{said}, {bad:,} not finite" if bad else said
