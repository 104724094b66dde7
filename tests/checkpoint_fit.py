"""A fit that tests kill and resume, in processes forked off one interpreter that has imported everything (`Fits`)."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchmetrics import MeanMetric, MetricCollection, SumMetric
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC

from lightning_stability import FractionalCheckpoint, NaNEarlyStop, PrecisionFallback
from lightning_stability.tuab.sampling import BalancedSampler
from tests import runs

SWA = "stochastic weight averaging"


def needs_new_swa(name: str) -> None:
    """Skip a case of that name where torch's SWALR cannot be loaded safely."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    if name == SWA and callable(torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.1).state_dict().get("anneal_func")):
        pytest.skip("this torch saves a function in SWALR's state, which weights_only refuses")


BALANCED_LABELS = np.repeat([0, 1], [40, 16])
ROWS = "rows.jsonl"
RESULT = "result-{rank}.pt"


class Samples(Dataset):
    """Samples with random augmentation, from all three global generators."""

    def __init__(self, count: int = 28, augment: bool = True) -> None:
        self.x = torch.randn(count, 6, generator=torch.Generator().manual_seed(0))
        self.augment = augment

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = torch.rand(()) * random.random() * np.random.rand() if self.augment else 0.0
        return self.x[index] + noise, index


class Indexless(IterableDataset):
    """Data that is read from its beginning, and has no state."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return (self.samples[index] for index in range(len(self.samples)))


class Stream(IterableDataset):
    """The same without a length."""

    def __init__(self, augment: bool = True) -> None:
        self.samples = Samples(32, augment)
        self.position = 0

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        indices = range(first, 32, step)
        while self.position < len(indices):
            self.position += 1
            yield self.samples[indices[self.position - 1]]
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def make_module(
    pl: Any,
    manual: bool = False,
    plateau: str | None = None,
    large: int | None = None,
    eps: float = 1e-8,
    bad: int | None = None,
    counts: bool = False,
) -> Any:
    """Batch norm, dropout, metrics of all kinds, and an average that the module's own hook updates.

    Args:
        pl: The namespace.
        manual: Whether it steps by itself.
        plateau: The interval of a ReduceLROnPlateau, if there shall be one.
        large: The batch, counted over the run, whose input fp16 cannot hold.
        eps: The optimizer's.
        bad: The batch, counted over the run, that holds NaN on the last rank.
        counts: Whether it logs, over all ranks, the mean of the samples' indices and how many there were.
    """

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = not manual
            self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1))
            self.mean, self.auroc = MeanMetric(), BinaryAUROC()
            self.scores = MetricCollection({"accuracy": BinaryAccuracy(), "auroc": BinaryAUROC()})
            self.samples = SumMetric() if counts else None
            self.register_buffer("average", torch.zeros(8))
            self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
            self.seen: list[list[int]] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, indices = batch
            self.seen.append(indices.tolist())
            number = self.trainer.current_epoch * self.trainer.num_training_batches + batch_idx
            if self.trainer.fit_loop.epoch_loop.total_batch_idx == bad:
                x = x * float("nan") if self.global_rank == self.trainer.world_size - 1 else x
            out, target = self.net(x * 1e6 if number == large else x), x.sum(1, keepdim=True)
            loss = (out - target).pow(2).mean()
            self.log("train_loss", loss, on_step=True, on_epoch=True)
            if self.samples is not None:
                mean = indices.float().mean()
                self.log("index", mean, on_step=False, on_epoch=True, batch_size=len(indices), sync_dist=True)
                self.samples.update(len(indices))
                self.log("samples", self.samples, on_step=False, on_epoch=True)
            if batch_idx % 3 == 0:
                self.log("largest", loss.detach(), on_step=False, on_epoch=True, reduce_fx="max")
            probability, label = torch.sigmoid(out.detach()[:, 0]), (target[:, 0] > 0).int()
            self.mean(loss.detach())
            self.log("mean", self.mean, on_step=False, on_epoch=True)
            self.auroc.update(probability, label)
            self.scores.update(probability, label)
            if manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

        def on_train_batch_end(self, *args: Any) -> None:
            with torch.no_grad():
                self.average.mul_(0.9).add_(self.net[0].bias, alpha=0.1)

        def on_train_epoch_end(self) -> None:
            self.log("auroc", self.auroc.compute())
            self.log_dict({f"score_{name}": value for name, value in self.scores.compute().items()})
            self.auroc.reset()
            self.scores.reset()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.net(batch[0]).pow(2).mean())

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, eps=eps)
            if plateau is None:
                return optimizer
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.7)
            config = {"scheduler": scheduler, "monitor": "train_loss", "interval": plateau}
            return {"optimizer": optimizer, "lr_scheduler": config}

    return Module()


def make_sharded(pl: Any) -> Any:
    """A network that FSDP2 shards, with dropout, and rows that ranks cannot share evenly."""
    base = type(make_module(pl))

    class Sharded(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Dropout(0.3), nn.Linear(7, 1))
            self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
            self.seen: list[list[int]] = []
            self.at_start: dict[str, Any] = {}

        def configure_model(self) -> None:
            from torch.distributed.fsdp import fully_shard

            if self.device_mesh is not None and not hasattr(self.net[0].weight, "full_tensor"):
                fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def on_train_start(self) -> None:
            self.at_start = whole(self.state_dict())

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen.append(batch[1].tolist())
            loss = (self.net(batch[0]) - batch[0].sum(1, keepdim=True)).pow(2).mean()
            self.log("train_loss", loss, on_step=True, on_epoch=True)
            return loss

        configure_optimizers = base.configure_optimizers

    return Sharded()


def whole(state: Any) -> Any:
    """A copy with every sharded tensor put together; all ranks have to ask."""
    if isinstance(state, Tensor):
        return getattr(state, "full_tensor", lambda: state)().detach().clone()
    return {key: whole(value) for key, value in state.items()} if isinstance(state, dict) else state


def file_logger(pl: Any, folder: Path) -> Any:
    """A logger that a kill takes nothing from."""

    class FileLogger(pl.loggers.Logger):
        name = "file"
        version = "0"

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if os.environ.get("LOCAL_RANK", "0") != "0":
                return
            with (folder / ROWS).open("a") as file:
                file.write(json.dumps([step, metrics]) + "\n")

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            pass

    return FileLogger()


def fit(
    folder: Path,
    namespace: str = "pytorch_lightning",
    seed: int = 1,
    data: Any = "samples",
    workers: int = 0,
    augment: bool = True,
    validate: Any = True,
    batch_size: int = 4,
    ckpt_path: str | None = None,
    kill_after_batch: int | None = None,
    kill_in: str | None = None,
    kill_at_write: int | None = None,
    extra: str | None = None,
    module: Any = None,
    checkpoint: dict[str, Any] | str | None = None,
    callbacks: Callable[[Any], list[Any]] = lambda pl: [],
    fallback: str | None = None,
    patience: int | None = None,
    fp16: bool = False,
    logger: Any = None,
    **trainer: Any,
) -> Any:
    """Train, and leave rows and the final state in the folder; return the Trainer.

    Args:
        folder: Where `checkpoints` are written, too.
        namespace: The Trainer's.
        seed: Of all generators: a resumed run is given another one.
        data: "samples", "stream", "weighted" for a sampler with a global random order, "balanced" for that of the TUAB
            data module, with "plain" before it for a loader without a state; or what makes loaders or a data module.
        workers: Processes that load.
        augment: Whether samples are made noisy by the global generators.
        batch_size: The loader's.
        validate: Whether there is a validation set, or what makes its loader.
        ckpt_path: Where to go on from.
        kill_after_batch: The process is killed when so many batches of this fit have been trained.
        kill_in: The process is killed in this hook of a callback that comes before the others.
        kill_at_write: The process is killed in place of so many-th call that changes the disk.
        extra: A callback of Lightning's: "ema", "swa" or "early".
        module: Options of `make_module`, or what makes one of a namespace.
        checkpoint: Options of FractionalCheckpoint; "none" for a ModelCheckpoint that never saves in its place.
        patience: Of a NaNEarlyStop, if there shall be one.
        callbacks: Others.
        fallback: The higher precision of a PrecisionFallback, if there shall be one.
        fp16: Whether to train in 16-mixed.
        logger: In place of the one that writes to the folder.
        trainer: The Trainer's options.
    """
    pl = runs.load_namespace(namespace)
    torch.manual_seed(0)
    model = module(pl) if callable(module) else make_module(pl, **(module or {}))
    if trainer.get("strategy") == "fsdp2":
        model, size = make_sharded(pl), trainer["devices"]
        trainer["strategy"] = pl.strategies.ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    kept = folder / "checkpoints"
    if isinstance(checkpoint, str):
        saver = pl.callbacks.ModelCheckpoint(kept, every_n_epochs=10**6)
    else:
        saver = FractionalCheckpoint(**{"dirpath": kept, "save_top_k": -1, **(checkpoint or {})})
    others = [*callbacks(pl), *([PrecisionFallback(fallback)] if fallback else [])]
    if patience is not None:
        others.append(NaNEarlyStop(patience))
    others += lightnings(pl, extra)
    if kill_after_batch is not None:
        others.append(killer(pl, kill_after_batch))
    if kill_in is not None:
        others.insert(
            0, type("Killer", (pl.Callback,), {kill_in: lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)})()
        )
    if kill_at_write is not None:
        die_at_write(kill_at_write)
    if fp16:
        trainer["plugins"] = runs.fp16(pl, init_scale=256.0)
    options = {"max_epochs": 3, "num_sanity_val_steps": 0, "enable_checkpointing": True, **trainer}
    made = runs.trainer(pl, callbacks=[saver, *others], logger=logger or file_logger(pl, folder), **options)
    validation = StatefulDataLoader(Samples(8, augment=False), batch_size=4) if validate else None
    if callable(validate):
        validation = validate()
    training = data() if callable(data) else loader(data, workers, augment, batch_size)
    if isinstance(training, pl.LightningDataModule):
        validation = None
    made.fit(model, training, validation, ckpt_path=ckpt_path)
    state = {
        "module": whole(model.state_dict()),
        "at_start": getattr(model, "at_start", {}),
        "optimizers": [whole(optimizer.state_dict().get("state")) for optimizer in made.optimizers],
        "random": [torch.rand(3), random.random(), float(np.random.rand())],
        "seen": model.seen,
        "global_step": made.global_step,
        "epoch": made.current_epoch,
        "metrics": {name: float(value) for name, value in made.callback_metrics.items()},
        "precision": [str(made.precision), made.precision_plugin.state_dict()],
        "proved": getattr(saver, "_proved", None) and (saver._proved[0] is None, saver._proved[1]),
    }
    torch.save(state, folder / RESULT.format(rank=made.global_rank))
    return made


def loader(data: str, workers: int, augment: bool, batch_size: int = 4) -> Any:
    """A loader: a plain one where the name begins so, else one with a state."""
    kind = data.removeprefix("plain").strip() or "samples"
    made = StatefulDataLoader if kind == data else torch.utils.data.DataLoader
    options: dict[str, Any] = {"batch_size": batch_size, "num_workers": workers}
    if kind == "stream":
        return made(Stream(augment), **options)
    if kind == "unstateful":
        return made(Indexless(Samples(32, augment)), **options)
    count = {"ranks": 56, "balanced": 56, "uneven": 71}.get(kind, 28)
    if kind.startswith("weighted"):
        count = 56 if "ranks" in kind else 28
        weights = [1.0] * (count // 2) + [3.0] * (count // 2)
        options["sampler"] = torch.utils.data.WeightedRandomSampler(weights, count)
    elif kind == "balanced":
        options["sampler"] = BalancedSampler(BALANCED_LABELS)
    else:
        options["shuffle"] = True
    return made(Samples(count, augment), **options)


def lightnings(pl: Any, extra: str | None) -> list[Any]:
    if extra == "ema":
        return [pl.callbacks.EMAWeightAveraging(decay=0.9)]
    if extra == "swa":
        return [pl.callbacks.StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)]
    if extra == "early":
        return [pl.callbacks.EarlyStopping("val_loss", patience=0, min_delta=1e9)]
    return []


def die_at_write(count: int) -> None:
    """Kill this process at one of the calls by which a checkpoint is written, before or in the middle of it."""
    left = [count]

    def dying(call: Any) -> Any:
        def instead(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                if call is torch.save and hasattr(args[1], "write"):
                    args[1].write(b"PK")
                    args[1].flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return instead

    for owner, name in ((torch, "save"), (os, "fsync"), (os, "replace"), (os, "link"), (os, "unlink")):
        setattr(owner, name, dying(getattr(owner, name)))


def killer(pl: Any, batches: int) -> Any:
    class Killer(pl.Callback):
        trained = 0

        def on_train_batch_end(self, *args: Any) -> None:
            self.trained += 1
            if self.trained == batches:
                os.kill(os.getpid(), signal.SIGKILL)

    return Killer()


def read_rows(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """The rows of a run, in order; what a killed run logged and its successor logged again counts once."""
    rows = [json.loads(line) for line in (folder / ROWS).read_text().splitlines()]
    seen: dict[str, Any] = {}
    for step, metrics in rows:
        key = json.dumps([step, sorted(metrics)])
        assert seen.setdefault(key, metrics) == metrics, f"step {step} was logged with other values: {metrics}"
    return sorted((json.loads(key)[0], sorted(metrics.items())) for key, metrics in seen.items())


def quietly(options: dict[str, Any]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    fit(Path(options.pop("folder")), **options)


class Fits:
    """Runs fits, one at a time, in processes forked off one that has imported everything."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, folder: Path, **options: Any) -> int:
        """Run a fit to its end, or to its death; return its status, as subprocess does."""
        self.start(folder, **options)
        return self.wait()

    def start(self, folder: Path, **options: Any) -> int:
        """Start a fit; return its process id."""
        folder.mkdir(parents=True, exist_ok=True)
        assert self._server.stdin is not None
        print(json.dumps({"folder": str(folder), **options}), file=self._server.stdin, flush=True)
        return self._read()

    def wait(self) -> int:
        """Wait for the fit that was started."""
        return self._read()

    def close(self) -> None:
        """End the process that the others are forked off."""
        self._server.communicate()

    def _read(self) -> int:
        assert self._server.stdout is not None
        return int(self._server.stdout.readline())


def import_what_a_fit_needs() -> None:
    """So that the processes that are forked off this one need not."""
    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    torch.optim.AdamW([weight]).step()  # what it imports on first use; a backward pass could not be forked
    gc.freeze()  # so that a child's collector does not go through all that was imported


def serve() -> None:
    runs.load_namespace("pytorch_lightning")
    import_what_a_fit_needs()
    for line in sys.stdin:
        options = json.loads(line)
        ranks = options.pop("ranks", 1)
        children = [fork(options, rank, ranks) for rank in range(ranks)]
        print(children[0], flush=True)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(next((status for status in statuses if status), 0), flush=True)
    os._exit(0)


def fork(options: dict[str, Any], rank: int, ranks: int) -> int:
    child = os.fork()
    if child == 0:
        if ranks > 1:  # as torchrun does, so that Lightning starts no processes of its own
            place = {"LOCAL_RANK": rank, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": options.pop("port")}
            os.environ.update({name: str(value) for name, value in place.items()})
            if options.pop("killed_rank", rank) != rank:
                options = {name: value for name, value in options.items() if not name.startswith("kill_")}
            options.update(devices=ranks, strategy=options.get("strategy", "ddp"), seed=options.get("seed", 1) + rank)
        log = os.open(Path(options["folder"]) / f"log-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            quietly(options)
            sys.stdout.flush()
            os._exit(0)  # without taking the interpreter down, which takes longer than the fit
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


if __name__ == "__main__":
    serve()
