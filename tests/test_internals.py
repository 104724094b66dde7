"""Private names of Lightning and torch are where `internals.py` looks for them."""

from __future__ import annotations

import importlib
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, default_collate
from torchdata.stateful_dataloader import StatefulDataLoader
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAUROC

from lightning_stability import internals
from lightning_stability.internals import (
    Overrides,
    foreach_copies,
    foreach_norms,
    foreach_scale_,
    foreach_subtract_,
    found_inf_tensors,
    is_flattened,
    logger_prefix,
    loss_scale,
    unscales_itself,
)
from tests import runs


class Thing:
    def act(self):
        return "own"


def test_overrides_restore_in_reverse_order():
    thing, overrides = Thing(), Overrides()
    overrides.set(thing, "act", lambda: "first")
    overrides.set(thing, "act", lambda: "second")
    assert thing.act() == "second"
    overrides.restore()
    assert thing.act() == "own"
    assert vars(thing) == {}


def test_overrides_leave_what_somebody_set_over_them():
    thing, overrides = Thing(), Overrides()
    overrides.set(thing, "act", lambda: "ours")
    thing.act = lambda: "theirs"
    overrides.restore()
    assert thing.act() == "theirs"


# --- The training loop ---


# --- Precision plugins and optimizers ---


@pytest.mark.parametrize(("fused", "gradient"), [(False, 1.0), (False, float("inf")), (True, 1.0)])
def test_a_scaler_has_its_scale_and_what_it_found(fused, gradient):
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([weight], fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert loss_scale(scaler) is None
    assert found_inf_tensors(scaler, optimizer) == []
    scaler.scale(weight.sum() * gradient).backward()
    assert float(loss_scale(scaler)) == 1024.0
    assert unscales_itself(optimizer) is fused
    if not fused:
        scaler.unscale_(optimizer)
        assert [float(found) for found in found_inf_tensors(scaler, optimizer)] == [float(gradient != 1.0)]


def test_foreach_functions_take_many_tensors_at_once():
    tensors = [torch.full((4,), 60000.0, dtype=torch.float16), torch.tensor([3.0, 4.0])]
    assert [float(norm) for norm in foreach_norms(tensors, torch.float32)] == [120000.0, 5.0]
    copies = foreach_copies(tensors)
    foreach_scale_(tensors[1:], torch.tensor(0.5))
    foreach_subtract_(copies, tensors)
    assert [t.tolist() for t in copies] == [[0.0] * 4, [1.5, 2.0]]


@pytest.mark.parametrize("bad", [None, torch.ones(2).to_sparse()])
def test_foreach_norms_refuses_what_it_cannot_take(bad):
    with pytest.raises((TypeError, AttributeError, NotImplementedError)):
        foreach_norms([torch.ones(2), bad], None)


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("no_group_left")
def test_fsdp1_marks_what_it_has_flattened(tmp_path, original):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    net = FullyShardedDataParallel(torch.nn.Linear(2, 2), use_orig_params=original, device_id=torch.device("cpu"))
    assert [is_flattened(parameter) for parameter in net.parameters()] == [True] * (2 if original else 1)
    assert not is_flattened(torch.nn.Parameter(torch.zeros(1)))


# --- Loggers ---


@pytest.mark.parametrize("prefix", ["", "run"])
def test_a_loggers_prefix_is_that_of_its_keys(pl, tmp_path, prefix):
    logger = pl.loggers.TensorBoardLogger(tmp_path, prefix=prefix)
    logger.log_metrics({"loss": 1.0}, step=0)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert events.Tags()["scalars"] == [f"{logger_prefix(logger)}loss"]


# --- Checkpoints, loop progress and data loaders ---


def test_a_loaders_iterator_asks_its_sampler_by_next_index():
    from torchdata.stateful_dataloader import StatefulDataLoader

    for cls in (DataLoader, StatefulDataLoader):
        iterator = iter(cls(range(4), batch_size=2))
        assert isinstance(iterator, internals.LoaderIterator)
        assert getattr(internals.LoaderIterator, internals.NEXT_INDEX)(iterator) == [0, 1]
        assert next(internals.sampler_iterator(iterator)) == [2, 3]
        assert internals.collates_by(iterator) is default_collate
        assert internals.delivers_in_order(iterator)


def test_a_loaders_iterator_begins_counts_and_takes_another_order():
    begun = []

    def begin(iterator: Any, loader: Any, first_iter: bool = False) -> None:
        original(iterator, loader, first_iter)
        begun.append(first_iter)

    original, overrides = getattr(internals.LoaderIterator, internals.BEGIN_ANEW), internals.Overrides()
    overrides.set(internals.LoaderIterator, internals.BEGIN_ANEW, begin)
    loader = DataLoader(range(6), batch_size=2, num_workers=2, persistent_workers=True)
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3], [4, 5]]
    iterator = iter(loader)
    overrides.restore()
    assert begun == [True, False]
    assert internals.index_sampler(loader) is loader.batch_sampler
    assert internals.batches_delivered(iterator) == 0
    next(iterator)
    assert internals.batches_delivered(iterator) == 1
    internals.set_base_seed(iterator, 7)
    assert internals.base_seed(iterator) == 7
    single = iter(DataLoader(range(6), batch_size=2))
    internals.set_sampler_iterator(single, iter([[5]]))
    assert [batch.tolist() for batch in single] == [[5]]


def test_the_next_batch_is_made_by_the_worker_whose_turn_it_is():
    class Workers(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> int:
            return torch.utils.data.get_worker_info().id

    class Turning(torch.utils.data.Sampler):
        iterator = None

        def __len__(self) -> int:
            return 6

        def __iter__(self) -> Any:
            for index in range(6):
                if index == 4:
                    internals.turn_workers(self.iterator, 3)
                yield index

    sampler = Turning()
    loader = DataLoader(Workers(), sampler=sampler, num_workers=2, prefetch_factor=1)
    sampler.iterator = iter(loader)
    assert [batch.item() for batch in sampler.iterator] == [0, 1, 0, 1, 1, 0]


def test_the_sampler_below_lightnings_is_found():
    from lightning_fabric.utilities.distributed import DistributedSamplerWrapper

    sampler = torch.utils.data.SequentialSampler(range(4))
    wrapper = DistributedSamplerWrapper(sampler, num_replicas=2, rank=0)
    assert internals.wrapped_sampler(wrapper) is sampler


def boring_model(library: Any) -> Any:
    return importlib.import_module(f"{library.__name__}.demos.boring_classes").BoringModel()


def boring() -> Any:
    return StatefulDataLoader([torch.zeros(32)] * 8, 2)


def in_second_epoch(library: Any, check: Any) -> Any:
    """What a check returns in the second epoch of a fit."""
    done = []

    class Check(library.Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            if trainer.current_epoch == 1 and not done:
                done.append(check(trainer))

    trainer = runs.trainer(library, max_epochs=2, limit_val_batches=0, callbacks=[Check()])
    trainer.fit(boring_model(library), boring())
    return done[0]


def test_loaders_and_their_fetcher_are_found(pl: Any) -> None:
    def check(trainer: Any) -> Any:
        combined = internals.combined_loader(trainer)
        states = internals.loader_states(trainer)
        assert len(states) == 1
        assert internals.consumed(trainer) == [False]
        internals.set_consumed(trainer, [False])
        assert internals.limits(trainer) == [4]
        assert not internals.ends_with_shortest(trainer)
        assert internals.batches_of_epoch(trainer) == trainer.fit_loop.epoch_loop.batch_progress.current.ready
        internals.set_batches_of_epoch(trainer, internals.batches_of_epoch(trainer))
        assert callable(getattr(trainer.fit_loop, internals.LOADERS_ARE_MADE))
        assert not internals.loaders_are_due(trainer)
        assert internals.epoch_of_loaders(trainer) == 0
        internals.load_loaders_of_epoch(trainer, 0)
        internals.set_sampler_epoch(combined.flattened[0], 1)
        assert internals.data_fetcher(trainer).fetched >= 1
        return len(combined.flattened), len(internals.iterators(combined)), internals.validation_loader(trainer)

    assert in_second_epoch(pl, check) == (1, 1, None)


def test_a_fetcher_reads_ahead(pl: Any) -> None:
    def check(trainer: Any) -> int:
        fetcher = internals.data_fetcher(trainer)
        before = len(fetcher.batches)
        internals.fetch_ahead(fetcher)
        return len(fetcher.batches) - before

    assert in_second_epoch(pl, check) == 1


def test_progress_and_results_are_found(pl: Any, tmp_path: Path) -> None:
    def check(trainer: Any) -> Any:
        assert all(hasattr(internals.logger_connector(trainer), name) for name in internals.METRIC_STATE)
        assert hasattr(internals.training_results(trainer), "items")
        assert internals.writes_one_file(trainer)
        assert not internals.writes_shards(trainer)
        assert internals.dump_checkpoint(trainer, weights_only=True).keys() >= {"state_dict", "global_step"}
        flags = internals.epoch_is_over(trainer), internals.window_is_incomplete(trainer)
        return *flags, internals.can_stop_early(trainer)

    assert in_second_epoch(pl, check) == (False, False, True)
    assert internals.last_saved(pl.callbacks.ModelCheckpoint(tmp_path)) == ""


@pytest.mark.usefixtures("no_group_left")
def test_a_strategy_with_shards_says_so_and_dumps_them_where_they_are(pl: Any, tmp_path: Path) -> None:
    class Shards(pl.LightningModule):
        def configure_model(self) -> None:
            self.net = nn.Linear(2, 1)
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

        def on_train_end(self) -> None:
            assert internals.writes_shards(self.trainer)
            dumped.update(internals.dump_shards(self.trainer, weights_only=False))
            held.append(self.net.weight.to_local().data_ptr())

    dumped, held = {}, []
    strategy = pl.strategies.ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    trainer = runs.trainer(pl, strategy=strategy, max_steps=1)
    try:
        trainer.fit(Shards(), DataLoader(torch.ones(2, 2)))
        trainer.strategy.save_checkpoint(dict(dumped), tmp_path / "folder")
    finally:
        torch.distributed.destroy_process_group()
    weight = dumped["state_dict"]["net.weight"]
    assert weight.to_local().data_ptr() == held[0]
    assert "net.weight" in dumped["optimizer_states"][0]["state"]
    replaced = internals.with_local_part(weight, torch.full((1, 2), 3.0))
    assert type(replaced) is type(weight)
    assert (replaced.placements, replaced.shape) == (weight.placements, weight.shape)
    assert replaced.to_local().tolist() == [[3.0, 3.0]]
    loaded = internals.load_all_shards(tmp_path / "folder")
    assert torch.equal(loaded["state_dict"]["net.weight"], weight.to_local())
    assert loaded["global_step"] == 1


def test_progress_is_loaded_and_the_end_of_fit_runs_alone(pl: Any) -> None:
    ended = []

    class End(pl.Callback):
        def on_train_end(self, trainer: Any, *args: Any) -> None:
            ended.append((trainer.current_epoch, trainer.global_step))
            if len(ended) == 1:
                loops = trainer.fit_loop.state_dict()
                load = lambda: internals.load_loop_progress(trainer, loops, inside_epoch=False)  # noqa: E731
                internals.run_to_the_end(trainer, inside_epoch=False, restore=load)

    trainer = runs.trainer(pl, max_epochs=1, limit_val_batches=0, callbacks=[End()])
    trainer.fit(boring_model(pl), boring())
    assert ended == [(1, 4), (1, 4)]
    averaging = pl.callbacks.StochasticWeightAveraging(1e-2)
    averaging._model_contains_batch_norm = True
    internals.prepare_end_of_averaging(trainer, averaging)
    assert averaging._accumulate_grad_batches == 1


def test_buffers_that_no_state_dict_has_are_found() -> None:
    module = torch.nn.Module()
    module.register_buffer("hidden", torch.ones(1), persistent=False)
    module.register_buffer("shown", torch.ones(1))
    assert list(internals.non_persistent_buffers(module)) == ["hidden"]


# --- Modules, metrics and tensors ---


def test_leaves_have_the_paths_of_python():
    pair = namedtuple("pair", "x y")
    tree = {"b": [1, (2,)], "a": pair(3, None)}
    assert internals.leaves_with_paths(tree) == [
        ("['b'][0]", 1), ("['b'][1][0]", 2), ("['a'].x", 3), ("['a'].y", None)
    ]  # fmt: skip
    assert internals.leaves_with_paths(5) == [("", 5)]
    assert internals.map_leaves(str, tree) == {"b": ["1", ("2",)], "a": pair("3", "None")}


def test_compiled_modules_are_recognised():
    plain, called, wrapped = nn.Linear(1, 1), nn.Linear(1, 1), torch.compile(nn.Linear(1, 1))
    called.compile()
    assert [internals.compiles_its_call(module) for module in (plain, called, wrapped)] == [False, True, False]
    assert [type(internals.within_compiled(module)) for module in (plain, called, wrapped)] == [
        type(None), type(None), nn.Linear
    ]  # fmt: skip


def test_lightning_marks_a_module_that_is_compiled_as_a_whole(pl):
    module = runs.make_module(pl)
    assert not internals.compiles_its_call(module)
    unwrap = __import__(f"{pl.__name__}.utilities.compile", fromlist=["from_compiled"]).from_compiled
    assert internals.compiles_its_call(unwrap(torch.compile(module)))


def test_own_parameters_are_those_beside_the_childrens():
    net = nn.MultiheadAttention(2, 1)
    assert internals.has_own_parameters(net)
    assert not internals.has_own_parameters(nn.Sequential(nn.Linear(1, 1)))


@pytest.mark.parametrize("scripted", [False, True])
def test_a_modules_tensors_and_children_are_held_by_name(scripted):
    module = nn.Sequential(nn.BatchNorm1d(2))
    module = torch.jit.script(module) if scripted else module
    children = internals.children_of(module)
    assert list(children) == ["0"]
    assert list(internals.parameters_of(module[0])) == ["weight", "bias"]
    buffers = internals.buffers_of(children["0"])
    assert buffers["running_mean"].data_ptr() == module[0].running_mean.data_ptr()
    if not scripted:
        buffers["running_mean"] = torch.ones(2)
        assert module[0].running_mean.tolist() == [1.0, 1.0]


def test_a_version_counts_writes_but_not_those_through_data():
    tensor = torch.zeros(2)
    before = internals.version_of(tensor)
    tensor.data.add_(1)
    assert internals.version_of(tensor) == before
    tensor.add_(1)
    assert internals.version_of(tensor) > before


def test_tensors_that_compute_by_themselves_are_told_from_plain_ones():
    class Named(torch.Tensor):
        pass

    jagged = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged)
    assert internals.has_own_dispatch(jagged)
    plain = [torch.ones(2), nn.Parameter(torch.ones(2)), nn.UninitializedBuffer(), torch.ones(2).as_subclass(Named)]
    assert not any(map(internals.has_own_dispatch, plain))


def test_many_tensors_are_copied_and_measured_at_once():
    targets, sources = [torch.zeros(2), torch.zeros(3)], [torch.ones(2), torch.full((3,), -2.0)]
    internals.copy_each(targets, sources)
    assert [t.tolist() for t in targets] == [s.tolist() for s in sources]
    large = [torch.full((3,), 3e38), torch.tensor([1.0, torch.nan])]
    norms = internals.norm_of_each(large, 1, torch.float64)
    assert norms[0].item() == pytest.approx(9e38)
    assert norms[1].isnan()
    assert [norm.item() for norm in internals.norm_of_each(sources, 2)] == pytest.approx([2**0.5, 12**0.5])


def test_a_metrics_defaults_and_count_of_updates():
    metric = MeanMetric()
    assert {name: float(value) for name, value in internals.metric_defaults(metric).items()} == {
        "mean_value": 0.0,
        "weight": 0.0,
    }
    assert internals.metric_defaults(BinaryAUROC())["preds"] == []
    metric.update(2.0)
    assert metric.compute() == 2.0
    metric.mean_value.fill_(5.0)
    internals.set_update_count(metric, 7)
    assert metric.update_count == 7
    assert metric.compute() == 5.0, "the value that was computed is forgotten"


def test_a_metrics_newest_value():
    metric = MeanMetric()
    metric(2.0)
    assert internals.newest_value(metric) == 2.0
    internals.set_newest_value(metric, None)
    assert internals.newest_value(metric) is None


def test_items_of_self_log(pl):
    def training_step(self, batch, batch_idx):
        if self.metric is None:
            self.metric = MeanMetric()
        self.metric.update(1.0)
        self.log("epoch", 1.0, on_step=False, on_epoch=True)
        self.log("step", 1.0, on_step=True, on_epoch=False)
        self.log("metric", self.metric, on_step=False, on_epoch=True)
        self.log("forked", 1.0, on_step=True, on_epoch=True)
        items = {item.meta.name: item for item in self.trainer.fit_loop.epoch_loop._results.values()}
        found.append(
            {
                name: (
                    internals.is_logged_tensor(item),
                    internals.logged_in(item),
                    internals.is_logged_by_epoch(item),
                    internals.is_unlogged(item),
                )
                for name, item in items.items()
            }
        )
        if batch_idx == 1:
            internals.mark_unlogged(items["epoch"])
            assert internals.logged_keys(items["epoch"]) == {"epoch"}
            assert internals.logged_keys(items["forked"]) == {"forked", "forked_epoch"}
            assert internals.is_unlogged(items["epoch"])
        return self.net(batch[0]).pow(2).mean()

    found = []
    module = runs.make_module(pl, training_step=training_step)
    module.metric = None
    trainer = runs.trainer(pl, max_epochs=1, max_steps=2)
    trainer.fit(module, runs.data())
    assert found[1] == {
        "epoch": (True, "training_step", True, False),
        "step": (True, "training_step", False, False),
        "metric": (False, "training_step", True, False),
        "forked": (True, "training_step", True, False),
    }
    assert "metric" in trainer.callback_metrics
    assert "epoch" not in trainer.callback_metrics


def test_which_precisions_cast_their_inputs(pl):
    plugins = pl.plugins.precision
    assert internals.casts_inputs(plugins.HalfPrecision("16-true"))
    assert not internals.casts_inputs(plugins.Precision())
    assert not internals.casts_inputs(runs.fp16(pl)[0])


def test_the_dtype_that_a_module_says_it_has(pl):
    for module in (runs.make_module(pl), MeanMetric()):
        internals.set_named_dtype(module, torch.float16)
        assert getattr(module, "dtype", torch.float16) is torch.float16  # (a metric of torchmetrics 1.1 has none)
        assert internals.names_dtype(module, torch.float16)
        assert not internals.names_dtype(module, torch.float32)
    assert not internals.names_dtype(nn.Linear(1, 1), torch.float32)


# --- Autograd and dispatch, for diagnosis ---


def test_the_backward_node_has_the_number_of_its_operation():
    numbers: dict[str, int] = {}

    class Numbers(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            node = internals.current_backward_node()
            if node is not None and node.name() == "LogBackward0":
                numbers["backward"] = internals.node_number(node)
            elif func is torch.ops.aten.log.default:
                numbers["forward"] = internals.newest_node_number()
            return func(*args, **(kwargs or {}))

    assert internals.current_backward_node() is None
    with Numbers():
        x = torch.ones(1, requires_grad=True)
        (torch.log(x * 1) * 1).sum().backward()
    assert numbers["forward"] == numbers["backward"]


def test_every_backward_pass_is_started_by_one_function():
    codes = []

    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            frame = sys._getframe()
            while frame is not None:
                codes.append(frame.f_code)
                frame = frame.f_back
            return grad

    x = torch.ones(1, requires_grad=True)
    Looks.apply(x).sum().backward()
    torch.autograd.grad(Looks.apply(x).sum(), x)
    assert codes.count(internals.backward_engine_code()) == 2


def test_the_key_of_memory_is_not_used_again():
    keys, kept = set(), []
    for _ in range(50):
        tensor = torch.zeros(1000)
        kept.append(internals.StorageKey(tensor))
        assert kept[-1].key == internals.storage_key(tensor[10:].view(-1))
        keys.add(kept[-1].key)
    assert len(keys) == 50


def test_the_values_of_sparse_and_nested_tensors_share_their_memory():
    dense = torch.ones(2, 3)
    assert internals.strided_values(dense) is dense
    sparse, rows = torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr()
    assert internals.strided_values(sparse).shape == internals.strided_values(rows).shape == (3,)
    assert internals.storage_key(sparse) == internals.storage_key(sparse.detach())
    nested = torch.nested.nested_tensor([torch.ones(1, 2), torch.ones(2, 2)], layout=torch.jagged)
    assert internals.strided_values(nested).shape == (3, 2)


def test_what_was_trained_before_an_optimizer_was_toggled(one):
    module = runs.make_module(one)
    frozen, trained = nn.Linear(1, 1).requires_grad_(False), nn.Linear(1, 1)
    module.parts = nn.ModuleList([frozen, trained])
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in module.parts]
    module.trainer = one.Trainer(logger=False, enable_checkpointing=False)
    module.trainer.strategy.optimizers = optimizers
    assert internals.trained_before_toggle(module) == {}
    module.toggle_optimizer(optimizers[0])
    assert not trained.weight.requires_grad
    parameters = module.parts.parameters()
    assert internals.trained_before_toggle(module) == {id(p): p in set(trained.parameters()) for p in parameters}
    module.untoggle_optimizer(optimizers[0])
    assert internals.trained_before_toggle(module) == {}


def test_the_memory_of_numpys_generator_says_when_it_has_made_a_number():
    before = internals.numpy_memory()
    assert internals.numpy_memory() == before
    state = np.random.get_state(legacy=False)["state"]
    assert before == state["key"].astype(np.uint32).tobytes() + np.int32(state["pos"]).tobytes()
    np.random.rand()
    assert internals.numpy_memory() != before


def test_nccls_collectives_can_be_aborted():
    # (with NCCL itself: tests/test_many_gpus.py)
    assert callable(torch.distributed.distributed_c10d._abort_process_group)
    internals.abort_collectives()  # without a process group: nothing
