"""A program for environments with and without the package: it trains in many ways and prints what came of each.

It knows nothing of the package. Its first lines, which the test writes, set NAMESPACE and ONLY, names of cases or none.
"""

import hashlib
import importlib
import json
import os
import re
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

warnings.simplefilter("ignore")
warnings.filterwarnings("always", message="lightning-stability")
pl = importlib.import_module(NAMESPACE)  # noqa: F821
for part in ("loggers", "callbacks", "plugins"):
    importlib.import_module(f"{NAMESPACE}.{part}")  # noqa: F821


def digest(value):
    """A text that is equal only for bit-equal values."""
    if isinstance(value, torch.Tensor):
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype}{tuple(value.shape)}{hashlib.md5(content).hexdigest()}"
    if isinstance(value, dict):
        return {digest(str(k)): digest(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [digest(v) for v in value]
    if callable(value):  # SWALR's state holds a function under torch 2.7
        value = getattr(value, "__qualname__", type(value))
    return str(value).replace(str(Path.cwd()), "CWD")


class Model(pl.LightningModule):
    """Batch norm, dropout, a metric of the epoch, a schedule."""

    def __init__(self, width=16, optimizer=None):
        super().__init__()
        self.save_hyperparameters(ignore="optimizer")
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(6, width), nn.BatchNorm1d(width), nn.Dropout(0.2), nn.ReLU(), nn.Linear(width, 1)
        )
        self.make_optimizer = optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=0.01))
        self.norms = []

    def loss(self, batch):
        return self.net(batch[0].to(self.net[0].weight.dtype)).float().pow(2).mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.loss(batch)

    def on_before_zero_grad(self, optimizer):
        """After clipping: what the optimizer was given."""
        self.norms.append([p.grad.to_dense().clone() for p in self.parameters() if p.grad is not None])

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2), "interval": "step"}]


class Manual(Model):
    """Two optimizers, stepped by hand."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for optimizer in (first, second):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            self.clip_gradients(optimizer, 0.1, "norm")
            optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.net[0].parameters(), 0.1), torch.optim.Adam(self.net[4].parameters(), 0.1)


class Sparse(Model):
    """An embedding whose gradients are sparse, with rows that occur more than once."""

    def __init__(self):
        super().__init__(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.3))
        torch.manual_seed(0)
        self.words = nn.Embedding(3, 6, sparse=True)

    def loss(self, batch):
        return self.net(batch[0] + self.words((batch[0][:, 0].abs() * 9).long() % 3)).pow(2).mean()


class MixedKinds(Model):
    """Half of the weights in bf16."""

    def __init__(self):
        super().__init__()
        self.net[4].to(torch.bfloat16)

    def loss(self, batch):
        return self.net[4](self.net[:4](batch[0]).bfloat16()).float().pow(2).mean()


class Spoilt(Model):
    """A weight that is not finite and takes part in nothing."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.tensor([torch.nan]))


HOOKS = []
"""Names of a callback's hooks in the order in which Lightning called them."""


def record(name):
    return lambda self, trainer, *args, **kwargs: HOOKS.append(f"{name} {trainer.global_step}")


class Recorder(pl.Callback):
    """Notes every hook."""


for hook in vars(pl.Callback):
    if hook.startswith("on_") or hook in ("setup", "teardown"):
        setattr(Recorder, hook, record(hook))


class LogsNothing(Model):
    """Neither metrics nor hyperparameters."""

    def __init__(self):
        super().__init__()
        self._hparams_initial = None

    def log(self, *args, **kwargs):
        pass


def adamw(**options):
    return lambda parameters: torch.optim.AdamW(parameters, lr=0.01, **options)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def lbfgs(parameters):
    return torch.optim.LBFGS(parameters, lr=0.01, max_iter=3)


CSV = {"logger": lambda: pl.loggers.CSVLogger("csv")}
CASES = {
    "plain": (Model, {}),
    "csv logger, accumulation": (Model, {**CSV, "accumulate_grad_batches": 3}),
    "SGD, clipped by norm": (lambda: Model(optimizer=sgd), {"gradient_clip_val": 0.01}),
    "clipped by value": (Model, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "fused, clipped": (lambda: Model(optimizer=adamw(fused=True)), {"gradient_clip_val": 0.01}),
    "large tensors, clipped": (lambda: Model(width=4096), {"gradient_clip_val": 0.01}),
    "bf16-true, clipped": (Model, {"gradient_clip_val": 0.01, "precision": "bf16-true"}),
    "bf16-mixed, clipped": (Model, {"gradient_clip_val": 0.01, "precision": "bf16-mixed"}),
    "two kinds of weights, clipped": (MixedKinds, {"gradient_clip_val": 0.01}),
    "16-mixed": (Model, {"plugins": lambda: [pl.plugins.MixedPrecision("16-mixed", "cpu")]}),
    "16-true, eps too small": (Model, {"precision": "16-true", "max_steps": 1}),
    "64-true, clipped": (Model, {"gradient_clip_val": 0.01, "precision": "64-true"}),
    "manual optimization": (Manual, {}),
    "LBFGS": (lambda: Model(optimizer=lbfgs), {}),
    "sparse gradients": (Sparse, {}),
    "a weight that is not finite": (Spoilt, {}),
    "nothing logged": (LogsNothing, {}),
    "no logger": (Model, {"logger": lambda: False}),
    "no checkpoints": (Model, {"enable_checkpointing": False}),
    "fast_dev_run": (Model, {"fast_dev_run": 2}),
    "barebones": (Model, {"barebones": True}),
    "SWA": (Model, {"callbacks": lambda: [pl.callbacks.StochasticWeightAveraging(0.01, swa_epoch_start=1)]}),
    "batch size finder": (
        Model,
        {"callbacks": lambda: [pl.callbacks.BatchSizeFinder(max_trials=2, steps_per_trial=1)]},
    ),
    "learning rate finder": (
        lambda: Tuned(),
        {"callbacks": lambda: [pl.callbacks.LearningRateFinder(num_training_steps=6)]},
    ),
    "early stopping, monitored checkpoints": (
        Model,
        {
            "callbacks": lambda: [
                pl.callbacks.EarlyStopping("val_loss", patience=1),
                pl.callbacks.ModelCheckpoint(monitor="val_loss", save_top_k=2, save_last=True),
            ]
        },
    ),
    "every hook": (Model, {"callbacks": lambda: [Recorder()], "accumulate_grad_batches": 2, "gradient_clip_val": 0.01}),
    "every hook, by hand": (Manual, {"callbacks": lambda: [Recorder()]}),
    "overfit_batches": (Model, {"overfit_batches": 2}),
    "detect_anomaly, value": (Model, {"detect_anomaly": True}),
}


class Tuned(Model):
    """With a learning rate to be found."""

    def __init__(self):
        super().__init__()
        self.lr = 0.01
        self.make_optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=self.lr)


class Data(pl.LightningDataModule):
    batch_size = 4

    def loader(self):
        torch.manual_seed(1)
        return DataLoader(TensorDataset(torch.randn(24, 6)), batch_size=self.batch_size, shuffle=False)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader


def train(name, make, options):
    folder = Path(re.sub(r"\W+", "_", name))
    folder.mkdir()
    os.chdir(folder)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    defaults = {"max_epochs": 2, "accelerator": "cpu", "log_every_n_steps": 2, **quiet}
    options = {key: value() if callable(value) else value for key, value in options.items()}
    if options.get("barebones"):
        defaults = {"max_epochs": 2, "accelerator": "cpu"}
    HOOKS.clear()
    torch.manual_seed(2)
    model = make()
    trainer = pl.Trainer(**{**defaults, **options})
    data = Data()
    trainer.fit(model, data)
    result = {
        "weights": digest(model.state_dict()),
        "gradients": digest(model.norms),
        "metrics": digest(trainer.callback_metrics),
        "optimizers": digest([optimizer.state_dict() for optimizer in trainer.optimizers]),
        "random": digest(torch.get_rng_state()),
        "step": trainer.global_step,
        "batch size": data.batch_size,
        "hooks": list(HOOKS),
    }
    if not options.get("barebones"):
        result["test"] = digest(trainer.test(model, data, verbose=False))
        result["predict"] = digest(trainer.predict(model, data))
    result["files"] = {}
    for path in sorted(path for path in Path().rglob("*") if path.is_file()):
        content = ""
        if path.suffix == ".ckpt":
            checkpoint = torch.load(path, weights_only=False)
            known = vars(pl.callbacks)
            callbacks = {k: v for k, v in checkpoint.pop("callbacks", {}).items() if re.split(r"\W", k)[0] in known}
            content = digest([checkpoint, callbacks])
        elif path.suffix in (".csv", ".yaml"):
            content = path.read_text().replace(str(Path.cwd()), "CWD")
        result["files"][re.sub(r"tfevents.*", "tfevents", str(path))] = content
    os.chdir("..")
    return result


if ONLY:  # noqa: F821
    CASES = {name: CASES[name] for name in ONLY}  # noqa: F821
print("RESULT" + json.dumps({name: train(name, *case) for name, case in CASES.items()}))
