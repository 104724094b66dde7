"""Make the figures in docs/ again, each from real runs.

usage: python docs/figures.py [NAME ...]

`story` and `input_check` run the command line on a synthetic corpus, which takes some minutes; the others take seconds.
The pictures of TensorBoard are made by `docs/screenshots.py`.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))
os.environ["LIGHTNING_STABILITY_CALLBACKS"] = "none"

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import pytorch_lightning as pl  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import TensorDataset  # noqa: E402
from torchdata.stateful_dataloader import StatefulDataLoader  # noqa: E402

from lightning_stability import (  # noqa: E402
    FractionalCheckpoint,
    IncidentReport,
    NaNEarlyStop,
    PrecisionFallback,
    SpikeRecovery,
)

BLUE, ORANGE, GREEN, RED, GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#777777"


def main() -> None:
    figures = {
        "story": story,
        "nan_early_stop": nan_early_stop,
        "fractional_checkpoint": fractional_checkpoint,
        "precision_fallback": precision_fallback,
        "input_check": input_check,
        "incident_report": incident_report,
        "spike_recovery": spike_recovery,
    }
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10})
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    for name in sys.argv[1:] or figures:
        figure = figures[name]()
        figure.savefig(DOCS / f"{name}.png", dpi=110)
        print(f"docs/{name}.png: {(DOCS / f'{name}.png').stat().st_size / 1000:.0f} kB")


# The story: what the README opens with


def story() -> Any:
    """The stable recipe in fp16 on recordings with artefacts, three times."""
    none = "--trainer.callbacks=null"  # instead of the recipe's
    ways = {
        "without callbacks": [none],
        "NaNEarlyStop": [none, "--trainer.callbacks+=NaNEarlyStop", "--trainer.callbacks.patience=0"],
        "PrecisionFallback": [none, "--trainer.callbacks+=PrecisionFallback"],
    }
    figure, rows = plt.subplots(3, 1, figsize=(8.6, 4.4), sharex=True, sharey=True, layout="constrained")
    with tempfile.TemporaryDirectory() as folder:
        stability(folder, "synthetic", "tuab_artefacts", "--artefacts", "3", "--seed", "3")
        for axis, (name, words) in zip(rows, ways.items(), strict=True):
            logs = Path(folder, name.replace(" ", "_"))
            fit = ["fit", "--config=tuab_stable", "--trainer.precision=16-mixed", "--data.root=tuab_artefacts"]
            # two epochs, a loss for every batch, and a learning rate at which so few batches show something
            fit += ["--trainer.max_epochs=2", "--trainer.accumulate_grad_batches=1", "--model.learning_rate=2e-3"]
            options = ["--trainer.log_every_n_steps=1", f"--trainer.default_root_dir={logs}"]
            error = stability(folder, *fit, *options, *words)
            draw_losses(axis, scalars(logs, "train_loss_step"))
            axis.set_title(name, loc="left", fontweight="bold")
            events = [json.loads(line) for path in logs.rglob("events.jsonl") for line in path.read_text().splitlines()]
            note_end(axis, error, events)
    rows[0].set_ylim(top=rows[0].get_ylim()[1] + 0.15 * (rows[0].get_ylim()[1] - rows[0].get_ylim()[0]))
    rows[0].legend(loc="lower right", frameon=False)
    rows[1].set_ylabel("training loss")
    rows[2].set_xlabel("batch")
    return figure


# InputCheck: what reaches each layer, and each batch


def input_check() -> Any:
    """The scales of two recipes' layers, and the batches of the stable one on recordings with artefacts."""
    figure, (layers, batches) = plt.subplots(2, 1, figsize=(8.6, 4.6), height_ratios=(3, 2), layout="constrained")
    names: list[str] = []  # of the crash's layers: the stable recipe has no `input_stats`
    with tempfile.TemporaryDirectory() as folder:
        for recipe, column, color in (
            ("tuab_crash", "input_deviation", RED),
            ("tuab_stable", "input_deviation", BLUE),
        ):
            # in fp32: in fp16 the crash overflows in the second layer, and nothing is known of those behind it
            logs = check(folder, f"--config={recipe}", "--trainer.max_steps=1", "--trainer.precision=32-true")
            with next(logs.rglob("input_scales.csv")).open(newline="") as file:
                deviations = {row["layer"]: float(row[column]) for row in csv.DictReader(file) if row[column]}
            names = names or list(deviations)
            places = [names.index(name) for name in deviations]
            layers.plot(places, deviations.values(), color=color, marker="o", markersize=4, label=recipe)
        stability(folder, "synthetic", "tuab_artefacts", "--artefacts", "3", "--seed", "3")
        logs = check(folder, "--config=tuab_stable", "--data.root=tuab_artefacts", "--trainer.max_epochs=1")
        series = scalars(logs, "input/std")
        events = [json.loads(line) for line in next(logs.rglob("events.jsonl")).read_text().splitlines()]
    flagged = [event["batch_idx"] for event in events if event["event"] == "input_flagged"]
    layers.axhspan(1e-2, 1e2, color=GREEN, alpha=0.1, label="no warning")
    short = [name.removeprefix("encoder.") for name in names]
    layers.set_xticks(range(len(names)), short, rotation=40, ha="right", fontsize=7)
    layers.set_title("what reaches each layer, in the first step, in fp32", loc="left", fontweight="bold")
    batches.plot(series, color=BLUE, marker=".", label="a batch")
    high = [series[batch] for batch in flagged]
    batches.plot(flagged, high, "x", color=RED, markersize=8, clip_on=False, label="flagged")
    batches.set_title("each batch, where two of the recordings have an artefact", loc="left", fontweight="bold")
    batches.set_xlabel("batch")
    for axis in (layers, batches):
        axis.set(yscale="log", ylabel="standard deviation")
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def check(folder: str, *words: str) -> Path:
    """Fit with InputCheck alone, log every batch, and return where the logs are."""
    logs = Path(tempfile.mkdtemp(dir=folder))
    words = (*words, "--trainer.callbacks=null", "--trainer.callbacks+=InputCheck", "--trainer.limit_val_batches=0")
    words = (*words, "--trainer.accumulate_grad_batches=1", "--trainer.log_every_n_steps=1")
    error = stability(folder, "fit", *words, f"--trainer.default_root_dir={logs}")
    assert not error, error
    return logs


# The story's parts


def note_end(axis: Any, error: str, events: list[dict[str, Any]]) -> None:
    kinds = {event["event"]: event for event in events}
    last = max(axis.lines[0].get_xdata())

    def note(at: float, text: str, color: str) -> None:
        axis.axvline(at, color=color)
        axis.annotate(text, (at, 1), (5, -2), ("data", "axes fraction"), "offset points", va="top", color=color)

    if "precision_changed" in kinds:
        note(kinds["precision_changed"]["step"], "from this batch on in fp32", GREEN)
    elif "training_stopped" in kinds:
        note(kinds["training_stopped"]["step"], "stopped, the good weights kept", GREEN)
    elif error:
        note(last, f"dies in validation: {error}", RED)


def stability(folder: str, *words: str) -> str:
    """Run the command line and return the error that it ended with."""
    env = {**os.environ, "PYTHONPATH": str(DOCS.parent)}
    command = [sys.executable, "-m", "lightning_stability", *words]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""
    return last.split(": the outputs")[0] if done.returncode else ""


def scalars(folder: Path, tag: str) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(folder.rglob("events.out.*")).parent))
    events.Reload()
    return [scalar.value for scalar in events.Scalars(tag)]


def draw_losses(axis: Any, losses: list[float], color: str = BLUE, label: str = "training loss") -> None:
    """Draw the finite losses as a line and the others as crosses below it."""
    axis.plot(range(len(losses)), losses, color=color, marker=".", markersize=4, linewidth=1.2, label=label)
    bad = [step for step, loss in enumerate(losses) if not math.isfinite(loss)]
    if bad:
        where = axis.get_xaxis_transform()
        axis.plot(bad, [0.06] * len(bad), "x", color=RED, transform=where, clip_on=False, label="not finite")


# Small runs: a network that anybody could have


class Model(pl.LightningModule):
    """Fits a line through batch norm and dropout; `spoil` changes a batch before it is seen."""

    def __init__(self, spoil: Any = None, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 1)
        self.net = nn.Sequential(*layers)
        self.spoil = spoil
        self.losses: list[float] = []
        self.scales: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        if self.spoil:
            x = self.spoil(x, self.global_step)
        return (self.net(x).squeeze(1) - y).pow(2).mean()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        self.scales.append(scaler.get_scale() if scaler else math.nan)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=5e-3)


def data(count: int = 320) -> Any:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 8, generator=generator)
    y = x @ torch.linspace(-1, 1, 8) + 0.1 * torch.randn(count, generator=generator)
    return StatefulDataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)


def fit(model: Model, *callbacks: Any, ckpt_path: str | None = None, **options: Any) -> Model:
    pl.seed_everything(0, verbose=False)
    defaults = {"max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    defaults |= {"enable_model_summary": False, "enable_checkpointing": any(map(is_checkpoint, callbacks))}
    trainer = pl.Trainer(callbacks=[*callbacks], **{**defaults, **options})
    trainer.fit(model, data(), ckpt_path=ckpt_path)
    return model


def is_checkpoint(callback: Any) -> bool:
    return isinstance(callback, pl.callbacks.Checkpoint)


def nan_early_stop() -> Any:
    """A NaN input at steps 20, 21 and 40."""

    def spoil(x: Tensor, step: int) -> Tensor:
        return torch.full_like(x, math.nan) if step in (20, 21, 40) else x

    runs = {
        "without callbacks": fit(Model(spoil)),
        "NaNEarlyStop(): up to two bad updates in a row are skipped": fit(Model(spoil), NaNEarlyStop()),
        "NaNEarlyStop(patience=0): the first one ends the run": fit(Model(spoil), NaNEarlyStop(patience=0)),
    }
    figure, rows = plt.subplots(3, 1, figsize=(8.6, 4.4), sharex=True, sharey=True, layout="constrained")
    for axis, (name, model) in zip(rows, runs.items(), strict=True):
        draw_losses(axis, model.losses)
        finite = all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())
        axis.set_title(name, loc="left", fontweight="bold")
        said = "weights and buffers at the end: " + ("finite" if finite else "NaN")
        axis.annotate(
            said, (1, 1), (0, 2), "axes fraction", "offset points", ha="right", color=GREEN if finite else RED
        )
    rows[0].legend(loc="center right", frameon=False)
    rows[1].set_ylabel("training loss")
    rows[2].set_xlabel("batch")
    return figure


def fractional_checkpoint() -> Any:
    """A run that ends in the middle of its second epoch and is resumed, from either checkpoint."""
    whole = fit(Model()).losses
    stopped_at = 30
    figure, axis = plt.subplots(figsize=(8.6, 3.2), layout="constrained")
    axis.plot(whole, color=GREY, linewidth=5, alpha=0.45, label="never stopped")
    ways = {
        "resumed with ModelCheckpoint": (
            ORANGE,
            pl.callbacks.ModelCheckpoint,
            {"every_n_train_steps": 10},
        ),
        "resumed with FractionalCheckpoint": (BLUE, FractionalCheckpoint, {"every_n_epochs": 0.5}),
    }
    for name, (color, kind, options) in ways.items():
        with tempfile.TemporaryDirectory() as folder:
            fit(Model(), kind(dirpath=folder, save_last=True, **options), max_steps=stopped_at)
            resumed = fit(Model(), kind(dirpath=folder, **options), ckpt_path=f"{folder}/last.ckpt").losses
        axis.plot(
            range(stopped_at, stopped_at + len(resumed)), resumed, color=color, marker=".", markersize=5, label=name
        )
        same = resumed == whole[stopped_at:]
        print(f"{name}: {len(resumed)} batches after the resume, {'bit-equal' if same else 'other losses'}")
    axis.axvline(stopped_at, color=RED, linewidth=1, linestyle="--")
    axis.annotate(
        "stopped here", (stopped_at, axis.get_ylim()[1]), (-4, -9), textcoords="offset points", ha="right", color=RED
    )
    axis.set_yscale("log")
    axis.set(xlabel="batch", ylabel="training loss")
    axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=9)
    return figure


def precision_fallback() -> Any:
    """fp16, and from step 20 on an input that is too large for it."""

    def spoil(x: Tensor, step: int) -> Tensor:
        return x * 3e5 if step >= 20 else x

    def fp16() -> dict[str, Any]:
        return {
            "plugins": [pl.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**16))]
        }

    runs = {
        "fp16 alone": fit(Model(spoil), **fp16()),
        "with PrecisionFallback": fit(Model(spoil), PrecisionFallback(), **fp16()),
    }
    figure, columns = plt.subplots(2, 2, figsize=(8.6, 4.0), sharex=True, sharey="row", layout="constrained")
    for (upper, lower), (name, model) in zip(columns.T, runs.items(), strict=True):
        draw_losses(upper, model.losses)
        upper.set_title(name, loc="left", fontweight="bold")
        lower.plot(model.scales, color=ORANGE)
        lower.set_yscale("log", base=2)
        lower.set_xlabel("batch")
    change = next(step for step, scale in enumerate(runs["with PrecisionFallback"].scales) if math.isnan(scale))
    for axis in columns[:, 1]:
        axis.axvline(change, color=GREEN)
    columns[1, 1].annotate("fp32: no loss scale", (change, 2.0**4), (6, 0), textcoords="offset points", color=GREEN)
    columns[0, 0].set_ylabel("training loss")
    columns[1, 0].set_ylabel("loss scale")
    columns[0, 0].legend(frameon=False)
    return figure


class Spiking(Model):
    """Two batches have a loss 200 times too large; later the weights of a layer are spoilt, as by one bad update."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.global_step == 120:
            with torch.no_grad():
                self.net[4].weight.mul_(-40)
        return super().training_step(batch, batch_idx) * (200 if self.global_step in (60, 61) else 1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


def spike_recovery() -> Any:
    """Two spikes at steps 60 and 61, and spoilt weights at step 120."""
    runs = {
        "without callbacks": fit(Spiking(), max_epochs=10),
        "SpikeRecovery()": fit(Spiking(), SpikeRecovery(every_n_steps=10), max_epochs=10),
    }
    figure, rows = plt.subplots(2, 1, figsize=(8.6, 3.6), sharex=True, sharey=True, layout="constrained")
    for axis, (name, model) in zip(rows, runs.items(), strict=True):
        draw_losses(axis, model.losses)
        axis.set_title(name, loc="left", fontweight="bold")
        axis.set_yscale("log")
    rows[0].set_ylabel("training loss")
    rows[1].set_xlabel("batch")
    return figure


def incident_report() -> Any:
    """fp16, and at step 20 an input that is too large for it; the run, and what the incident's report says."""

    def spoil(x: Tensor, step: int) -> Tensor:
        return x * 3e5 if step == 20 else x

    with tempfile.TemporaryDirectory() as folder:
        plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
        model = fit(Model(spoil), IncidentReport(folder), plugins=[plugin])
        report = (Path(folder) / "incidents/1-step20/report.txt").read_text()
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9.2, 3.0), layout="constrained", gridspec_kw={"width_ratios": [1, 1.35]}
    )
    draw_losses(left, model.losses)
    left.axvline(20, color=GREEN)
    left.annotate("recorded:\n1-step20", (20, max(x for x in model.losses if math.isfinite(x)) * 0.8), (6, 0),
                  textcoords="offset points", color=GREEN)  # fmt: skip
    left.set(xlabel="batch", ylabel="training loss")
    right.set_title("incidents/1-step20/report.txt", loc="left", fontweight="bold")
    right.axis("off")
    right.text(0, 0.98, report.replace(f"{DOCS.parent}/", ""), family="monospace", fontsize=7.5, va="top")
    return figure


if __name__ == "__main__":
    main()
