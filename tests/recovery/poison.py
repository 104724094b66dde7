"""Runs with bad steps, guarded, and the same runs with those steps left out by hand."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, BinaryPrecision

from tests import runs

BAD_FORWARD = {"nan_input", "inf_loss", "nan_loss", "rejected"}  # "rejected": the loader's own batch is bad


class Net(nn.Module):
    """Everything that a step may write besides what the optimizer does."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 6, max_norm=1.0)
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(8, 1)
        self.register_buffer("mask", torch.triu(torch.full((4, 4), -torch.inf), 1))
        self.register_buffer("running_max", torch.zeros(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.running_max = torch.maximum(self.running_max, x.detach().max())  # a new object each time
            self.seen += 1
        which = torch.nan_to_num(x[:, 0].abs() * 3).long() % 7
        return self.head(self.encoder(x + self.words(which))).squeeze(1)


def spoil(kind: str | None, x: Tensor) -> Tensor:
    if kind == "large_input":
        return x * 1e6  # beyond fp16, which ends at 65,504
    return torch.full_like(x, torch.nan) if kind == "nan_input" else x


def loss_of(kind: str | None, out: Tensor, module: Any) -> Tensor:
    loss = out.float().pow(2).mean()
    if kind == "inf_loss":
        return loss + torch.inf  # finite gradients
    if kind == "nan_loss":
        return loss * torch.nan
    if kind == "nan_gradient":
        return loss + torch.sqrt((module.net.head.weight * 0.0).sum().abs())  # the slope of sqrt at 0, times 0
    if kind == "fp16_overflow":
        return loss + _Steep.apply(module.net.head.bias).sum()
    if kind == "overflow":
        return loss + (module.net.head.bias * 1e25).sum()  # finite, but its square is not
    return loss


def make_module(pl: Any, kinds: Mapping[int, str], optimizer: Any, by_hand: bool, net: Any = None) -> Any:
    """A module whose batches (counted over the run) are spoilt as `kinds` says.

    Args:
        pl: The namespace.
        kinds: What is wrong with which batch.
        optimizer: Makes the optimizer from the parameters.
        by_hand: Whether the module itself leaves out the bad steps: the reference.
        net: Makes what is trained, in place of `Net`.
    """

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = Net() if net is None else net()
            self.mean = MeanMetric()
            self.metrics = MetricCollection([BinaryAccuracy(), BinaryPrecision(), BinaryAUROC()])
            self.batch = -1
            self.window_bad = False
            self.window_rejected = False
            self.before: dict[str, Tensor] = {}
            self.epoch_metrics: list[dict[str, float]] = []
            self.validations: list[bool] = []

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.before = copy.deepcopy(self.net.state_dict())

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.batch = self.trainer.current_epoch * self.trainer.num_training_batches + batch_idx
            kind = kinds.get(self.batch)
            out = self.net(spoil(kind, batch[0]))
            loss = loss_of(kind, out, self)
            if by_hand and kind not in (None, "large_input"):
                self.window_bad = True
                self.window_rejected |= kind == "rejected"
                if kind in BAD_FORWARD:
                    return loss
            with torch.no_grad():
                probabilities = torch.nan_to_num(torch.sigmoid(out.float()))
                target = (batch[0][:, 0] > 0).long()
                self.mean.update(loss.detach())
                self.metrics.update(probabilities, target)
                self.log("loss", loss, on_step=False, on_epoch=True)
                self.log("largest", loss, on_step=False, on_epoch=True, reduce_fx="max")
                self.log("mean", self.mean, on_step=False, on_epoch=True)
                self.log_dict(self.metrics, on_step=False, on_epoch=True)
            return loss

        def on_after_backward(self) -> None:
            if by_hand and kinds.get(self.batch) in BAD_FORWARD:
                self.net.load_state_dict(self.before)

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
            if not by_hand:
                optimizer.step(closure=closure)
                return
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            if scaler is not None:
                self.step_by_hand_under(scaler, optimizer, closure)
                return
            closure()
            bad, self.window_bad = self.window_bad, False
            self.window_rejected = False
            if not bad:
                optimizer.step(closure=lambda: None)

        def step_by_hand_under(self, scaler: Any, optimizer: Any, closure: Any) -> None:
            """GradScaler's own skip stays its own; one that it sees no reason for leaves the scale as it was."""
            closure()
            bare = optimizer.optimizer
            if self.window_rejected:
                bare.zero_grad(set_to_none=False)  # GradScaler finds nothing to halve its scale for
            scaler.unscale_(bare)
            if not self.window_bad or any(scaler._found_inf_per_device(bare).values()):
                scaler.step(bare)
            self.window_bad = self.window_rejected = False
            scaler.update()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            out = self.net(batch[0])
            self.validations.append(bool(torch.isfinite(out).all()))
            self.log("val_loss", out.float().pow(2).mean())

        def on_train_epoch_end(self) -> None:
            self.epoch_metrics.append({k: float(v) for k, v in self.trainer.callback_metrics.items()})

        def configure_optimizers(self) -> Any:
            made = optimizer(self.net.parameters())
            schedule = torch.optim.lr_scheduler.StepLR(made, 2, 0.9)
            return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Module()


class _Steep(torch.autograd.Function):
    """Its value is 0; its gradient is infinite at every scale, as one that overflows in fp16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.inf


class AverageWeights:
    """An exponential average of weights and buffers, as users write it, in either namespace."""

    def __new__(cls, pl: Any) -> Any:
        class Average(pl.Callback):
            def __init__(self) -> None:
                self.average: dict[str, Tensor] = {}

            def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
                for name, value in module.net.state_dict().items():
                    old = self.average.get(name, value).clone()
                    self.average[name] = old.mul_(0.9).add_(value, alpha=0.1) if old.is_floating_point() else value

        return Average()


def data(batches: int = 6, batch_size: int = 4) -> DataLoader:
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(batches * batch_size, 6)), batch_size=batch_size)


def fit(pl: Any, module: Any, callbacks: list[Any], loader: Any = None, **options: Any) -> dict[str, Any]:
    """Train and return everything that must be equal."""
    average = AverageWeights(pl)
    torch.manual_seed(2)
    trainer = runs.trainer(pl, callbacks=[average, *callbacks], **{"max_epochs": 2, **options})
    trainer.fit(module, loader or data())
    return {
        "weights": dict(module.state_dict()),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "average": average.average,
        "metrics": module.epoch_metrics,
        "rates": [scheduler.scheduler.state_dict() for scheduler in trainer.lr_scheduler_configs],
        "step": trainer.global_step,
        "random": torch.get_rng_state(),
        "precision": trainer.precision_plugin.state_dict(),
        "trainer": trainer,
    }


def differences(ours: Any, reference: Any, path: str = "") -> list[str]:
    """Where two nested results are not bit-equal; NaN equals NaN only where the reference has it too."""
    if path.endswith("trainer"):
        return []
    if isinstance(reference, Tensor):
        same = torch.equal(torch.nan_to_num(ours, nan=12345.0), torch.nan_to_num(reference, nan=12345.0))
        return [] if same else [path]
    if isinstance(reference, dict):
        if ours.keys() != reference.keys():
            return [f"{path}: keys {sorted(map(str, ours.keys() ^ reference.keys()))}"]
        return [d for key in reference for d in differences(ours[key], reference[key], f"{path}.{key}")]
    if isinstance(reference, (list, tuple)):
        if len(ours) != len(reference):
            return [f"{path}: {len(ours)} instead of {len(reference)}"]
        pairs = enumerate(zip(ours, reference, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{path}[{i}]")]
    if callable(reference):
        return []
    return [] if ours == reference or (ours != ours and reference != reference) else [f"{path}: {ours} not {reference}"]


def nonfinite(state: Mapping[str, Tensor], but: tuple[str, ...] = ("mask",)) -> list[str]:
    return [
        name
        for name, value in state.items()
        if value.is_floating_point() and not torch.isfinite(value).all() and not name.endswith(but)
    ]
