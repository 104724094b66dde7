"""What an environment with the package installed adds to its Trainers, with the built wheel really installed."""

import json
import re

import pytest

from lightning_stability.plugin import CALLBACKS
from tests.runs import NAMESPACES

pytestmark = pytest.mark.xdist_group("installed")

PREAMBLE = """
import copy, importlib, os, pickle, sys, warnings
import torch
warnings.simplefilter("ignore")
pl = importlib.import_module(NAMESPACE)
for part in ("loggers", "callbacks", "demos.boring_classes"):
    importlib.import_module(f"{NAMESPACE}.{part}")
BoringModel = pl.demos.boring_classes.BoringModel

class Nan(BoringModel):
    bad = 3
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)["loss"]
        return loss * float("nan") if batch_idx == self.bad else loss

class Look(pl.Callback):
    '''Notes the callbacks while the run trains, and who is registered with the runtime.'''
    def on_train_batch_start(self, trainer, *args):
        from lightning_stability.runtime import session_of
        self.seen = list(trainer.callbacks)
        runtime = session_of(trainer)
        self.policies = [] if runtime is None else list(runtime.dispatch.policies)
    def ours(self):
        ours = [type(c) for c in self.seen if type(c).__module__.startswith("lightning_stability.")]
        return [cls.__name__ for cls in ours if cls.__name__ != "Session"]

def make(namespace=pl, **options):
    quiet = dict(enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", max_steps=5)
    return namespace.Trainer(**{**quiet, "logger": pl.loggers.TensorBoardLogger("."), **options})
"""


@pytest.fixture(params=[NAMESPACES[0], pytest.param(NAMESPACES[1], marks=pytest.mark.slow)])
def run(installed, tmp_path, request):
    """Runs a script in the environment that has the wheel; its assertions are the test's."""

    def run(script, automatic=None, status=0):
        done = installed(f"NAMESPACE = {request.param!r}{PREAMBLE}{script}", cwd=tmp_path, automatic=automatic)
        assert done.returncode == status, done.stderr
        return done

    return run


def test_both_are_active_and_one_line_says_so_and_how_to_switch_them_off(run):
    done = run("look = Look(); make(callbacks=[look]).fit(BoringModel()); assert len(look.policies) == 2")
    lines = [line for line in done.stderr.splitlines() if "lightning-stability:" in line]
    assert lines == [
        "lightning-stability: NaNEarlyStop and GradNormMonitor are active, as in every Trainer here;"
        " LIGHTNING_STABILITY_CALLBACKS=none switches this off."
    ]


def test_none_leaves_nothing_behind(run):
    done = run(
        "look = Look(); trainer = make(callbacks=[look]); trainer.fit(BoringModel())\n"
        "assert look.ours() == [] and len(trainer.callbacks) == 2",
        automatic="none",
    )
    assert "lightning-stability" not in done.stderr


def test_named_ones_replace_the_default(run):
    run(
        "look = Look(); make(callbacks=[look]).fit(BoringModel())\n"
        "assert look.ours() == ['GradNormMonitor'] and look.policies[0].every_n_steps == 2",
        automatic="GradNormMonitor(every_n_steps=2)",
    )


def test_all_of_them_join_and_none_of_them_saves_where_no_checkpoints_are_wanted(run, tmp_path):
    done = run(
        "look = Look(); make(callbacks=[look], max_steps=8).fit(BoringModel())\n"
        "assert {'NaNEarlyStop', 'GradNormMonitor', 'FractionalCheckpoint'} <= set(look.ours()), look.ours()\n"
        "import shutil; shutil.rmtree('lightning_logs')\n"
        "make(enable_checkpointing=False, max_steps=8).fit(BoringModel())",
        automatic="all",
    )
    first, second = re.findall(r"lightning-stability: (.*) are active, as in every Trainer here", done.stderr)
    names = [cls.__name__ for cls in CALLBACKS if cls.__name__ != "PrecisionFallback"]  # nothing to fall back from
    assert re.split(", | and ", first) == names
    assert re.split(", | and ", second) == [name for name in names if name != "FractionalCheckpoint"]
    assert list(tmp_path.rglob("*.ckpt")) == []


def test_an_unknown_name_is_an_error_when_fit_begins_and_not_before(run):
    done = run("trainer = make(); trainer.validate(BoringModel()); trainer.fit(BoringModel())", "Nonsense", status=1)
    assert "MisconfigurationException: LIGHTNING_STABILITY_CALLBACKS: 'Nonsense' is no callback" in done.stderr


def test_a_trainer_that_never_fits_pays_nothing(run):
    done = run(
        "import time; make(); start = time.perf_counter()\n"
        "trainer = make(callbacks=[Look()])\n"
        "for name in ('validate', 'test', 'predict'): getattr(trainer, name)(BoringModel())\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'lightning_stability']\n"
    )
    assert "lightning-stability:" not in done.stderr


def test_the_users_instance_and_the_models_win_over_the_automatic_one_and_nothing_acts_twice(run):
    run("""
from lightning_stability import GradNormMonitor, NaNEarlyStop
class Own(NaNEarlyStop): pass
class Brings(BoringModel):
    def configure_callbacks(self): return [mine]
for mine, given, expected in (
    (NaNEarlyStop(patience=7), True, ["NaNEarlyStop", "GradNormMonitor"]),
    (NaNEarlyStop(patience=7), False, ["NaNEarlyStop", "GradNormMonitor"]),
    (Own(), True, ["Own", "GradNormMonitor"]),
    (GradNormMonitor(group_depth=1), True, ["GradNormMonitor", "NaNEarlyStop"]),
    (GradNormMonitor(group_depth=1), False, ["GradNormMonitor", "NaNEarlyStop"]),
):
    look = Look()
    trainer = make(callbacks=[look, mine] if given else [look])
    trainer.fit(BoringModel() if given else Brings())
    assert mine in look.policies and sorted(type(p).__name__ for p in look.policies) == sorted(expected)
    assert len([c for c in look.seen if isinstance(c, (NaNEarlyStop, GradNormMonitor))]) == 2
    assert mine.automatic is False
""")


def test_one_list_serves_three_trainers_of_both_namespaces_and_so_do_its_copies(run):
    run("""
import pytorch_lightning, lightning.pytorch
look = Look()
callbacks = [look]
for namespace in (pytorch_lightning, lightning.pytorch, pytorch_lightning):
    model = importlib.import_module(namespace.__name__ + ".demos.boring_classes").BoringModel
    trainer = namespace.Trainer(accelerator="cpu", max_steps=2, callbacks=callbacks, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    look.policies = None
    trainer.fit(model())
    assert [type(p).__name__ for p in look.policies] == ["NaNEarlyStop"], look.policies  # no logger: nothing to log
for copied in (copy.deepcopy(callbacks), copy.copy(callbacks), pickle.loads(pickle.dumps(callbacks[1:])) + [look]):
    again = pl.Trainer(accelerator="cpu", max_steps=2, callbacks=copied, logger=pl.loggers.CSVLogger("."),
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    again.fit(BoringModel())
    seen = next(c for c in copied if type(c) is Look)
    assert sorted(type(p).__name__ for p in seen.policies) == ["GradNormMonitor", "NaNEarlyStop"]
first = make(callbacks=callbacks)
second = make(callbacks=first.callbacks)  # the very list of another Trainer
for trainer in (first, second, first):
    trainer.fit_loop.epoch_progress.reset(); trainer.fit(BoringModel()); assert len(look.policies) == 2
""")


def test_a_fit_copied_in_its_middle_and_one_that_failed_leave_nothing_that_acts_twice(run):
    run("""
class Copy(pl.Callback):
    def on_train_batch_end(self, trainer, *args):
        self.copied = copy.deepcopy([c for c in trainer.callbacks if c is not self])
class Fails(pl.Callback):
    def on_train_batch_end(self, *args): raise ValueError("on purpose")
look, taker, fails = Look(), Copy(), Fails()
make(callbacks=[look, taker]).fit(BoringModel())
trainer = make(callbacks=taker.copied); trainer.fit(BoringModel())
assert len(next(c for c in trainer.callbacks if type(c) is Look).policies) == 2
trainer = make(callbacks=[look, fails], max_steps=-1, max_epochs=1, limit_train_batches=2)
before = list(trainer.callbacks)
try: trainer.fit(BoringModel())
except ValueError: pass
assert trainer.callbacks == before
trainer.callbacks.remove(fails)
trainer.fit(BoringModel()); assert len(look.policies) == 2
trainer.fit_loop.max_epochs = 2; trainer.fit(BoringModel()); assert len(look.policies) == 2
assert "optimizer_step" not in vars(trainer.precision_plugin)
""")


def test_the_automatic_guard_stops_a_run_that_went_bad_and_says_so(run, tmp_path):
    done = run(
        """
warnings.simplefilter("always")
trainer = make(callbacks=[pl.callbacks.ModelCheckpoint(every_n_train_steps=2)]); trainer.fit(Nan())
assert trainer.global_step == 4
""",
        automatic="NaNEarlyStop(patience=0)",
    )
    assert "NaNEarlyStop ended the run: the loss was nan" in done.stderr
    assert [path.parent.name for path in tmp_path.rglob("nan_early_stop.ckpt")] == ["checkpoints"]
    [events] = tmp_path.rglob("events.jsonl")
    names = [json.loads(line)["event"] for line in events.read_text().splitlines()]
    assert [name for name in names if name in ("update_skipped", "training_stopped")] == [
        "update_skipped",
        "training_stopped",
    ]


def test_the_automatic_monitor_writes_to_tensorboard_and_the_named_one_to_every_logger(run):
    script = """
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
csv = pl.loggers.CSVLogger("csv"); board = pl.loggers.TensorBoardLogger("board")
class Logs(BoringModel):
    def training_step(self, *args):
        out = super().training_step(*args); self.log("loss", out["loss"]); return out
make(callbacks=[], logger=[csv, board], log_every_n_steps=1, max_steps=20).fit(Logs())
keys = set(open(csv.log_dir + "/metrics.csv").readline().strip().split(","))
events = EventAccumulator(board.log_dir); events.Reload()
tags = events.Tags()["scalars"]
print(sorted(k for k in keys if "norm" in k), "grad_norm/total" in tags, len(events.Scalars("loss")))
"""
    assert run(script).stdout.strip() == "[] True 20"
    named = run(script, automatic="GradNormMonitor").stdout
    assert "'grad_norm/total'" in named
    assert named.strip().endswith("True 20")


def test_a_loggers_log_metrics_is_called_with_what_the_run_itself_logs_and_no_more(run):
    run("""
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
calls = []
class Board(pl.loggers.TensorBoardLogger):
    def log_metrics(self, metrics, step=None):
        calls.append((set(metrics), step)); super().log_metrics(metrics, step)
class Logs(BoringModel):
    def training_step(self, *args):
        out = super().training_step(*args); self.log("loss", out["loss"]); return out
board = Board("board", prefix="run")
make(callbacks=[], logger=board, log_every_n_steps=1, max_steps=3, limit_val_batches=0).fit(Logs())
assert calls == [({"loss", "epoch"}, step) for step in range(3)], calls
events = EventAccumulator(board.log_dir); events.Reload()
assert [event.step for event in events.Scalars("run-grad_norm/total")] == [0, 1, 2]
""")


def test_a_run_that_cannot_be_served_goes_on_with_one_line(run):
    done = run("""
warnings.simplefilter("always")
from lightning_stability import GradNormMonitor, NaNEarlyStop
class Lbfgs(BoringModel):
    def configure_optimizers(self): return torch.optim.LBFGS(self.parameters(), lr=1e-3, max_iter=2)
look = Look()
for callbacks in ([look], [GradNormMonitor(), look]):
    make(callbacks=callbacks).fit(Lbfgs())
    assert [type(p).__name__ for p in look.policies] == ["GradNormMonitor"] == look.ours()
""")
    aside = [line for line in done.stderr.splitlines() if " in this run: " in line]
    assert len(aside) == 2, done.stderr
    assert "in this run: LBFGS cannot be guarded" in aside[0]
    assert "GradNormMonitor is active" in done.stderr


def test_an_optimizer_that_moves_the_weights_before_its_closure_trains_as_without_the_package(run):
    done = run("""
warnings.simplefilter("always")
import os
class Ahead(torch.optim.SGD):
    def step(self, closure=None):
        weights = [p for g in self.param_groups for p in g["params"]]
        with torch.no_grad(): [p.add_(0.1) for p in weights]
        with torch.enable_grad(): loss = closure()
        with torch.no_grad(): [p.sub_(0.1) for p in weights]
        super().step()
        return loss
class Module(BoringModel):
    def training_step(self, batch, batch_idx): return self.layer(batch).pow(2).mean()
    def configure_optimizers(self): return Ahead(self.parameters(), lr=0.05)
ends = []
for logger in (True, False):
    for automatic in ("none", ""):
        os.environ["LIGHTNING_STABILITY_CALLBACKS"] = automatic
        pl.seed_everything(0)
        module = Module()
        make(logger=pl.loggers.CSVLogger(".") if logger else False, enable_checkpointing=False).fit(module)
        ends.append(module.layer.weight.detach().clone())
assert all(torch.equal(ends[0], end) for end in ends)
""")
    aside = [line for line in done.stderr.splitlines() if " in this run: " in line]
    assert len(aside) == 2, done.stderr
    assert "in this run: Ahead.step moves the weights before it calls its closure" in aside[0]


def test_what_the_user_asks_for_is_refused_as_ever(run):
    run("""
from lightning_stability import NaNEarlyStop
class Lbfgs(BoringModel):
    def configure_optimizers(self): return torch.optim.LBFGS(self.parameters(), lr=1e-3, max_iter=2)
try: make(callbacks=[NaNEarlyStop(patience=0)]).fit(Lbfgs())
except pl.utilities.exceptions.MisconfigurationException: print("refused")
else: raise AssertionError
""")


@pytest.mark.parametrize("direction", ["with to without", "without to with"])
def test_a_checkpoint_goes_both_ways_between_environments_with_and_without_the_package(
    installed, bare, tmp_path, direction
):
    writer, reader = (installed, bare) if direction == "with to without" else (bare, installed)
    script = f"NAMESPACE = {NAMESPACES[0]!r}{PREAMBLE}warnings.simplefilter('default')\n"
    done = writer(f"{script}make(logger=False, max_epochs=1).fit(BoringModel())", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    path = next(tmp_path.rglob("*.ckpt"))
    done = reader(
        f"{script}path = {str(path)!r}\n"
        "trainer = make(max_steps=8); trainer.fit(BoringModel(), ckpt_path=path); assert trainer.global_step == 8\n"
        "for fn in ('validate', 'test', 'predict'): getattr(make(logger=False), fn)(BoringModel(), ckpt_path=path)\n"
        "BoringModel.load_from_checkpoint(path)\n",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    warned = "callbacks used to create the checkpoint need to be provided" in done.stderr.replace("\n", " ")
    assert warned == (direction == "with to without"), done.stderr
    assert "lightning_stability" not in str(sorted(_load(path)["callbacks"]))


def _load(path):
    import torch

    return torch.load(path, weights_only=True)


@pytest.mark.slow
def test_a_spawned_run_has_them_in_every_process(installed, tmp_path):
    (tmp_path / "spawned.py").write_text(f"""
NAMESPACE = "pytorch_lightning"
{PREAMBLE}
class Say(Look):
    def on_train_end(self, trainer, module): print("RANK", trainer.global_rank, sorted(self.ours()), flush=True)
if __name__ == "__main__":
    make(callbacks=[Say()], devices=2, strategy="ddp_spawn").fit(BoringModel())
""")
    done = installed.run("python", "spawned.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("['GradNormMonitor', 'NaNEarlyStop']") == 2
    assert done.stderr.count("are active") == 1


@pytest.mark.parametrize("namespace", [NAMESPACES[0], pytest.param(NAMESPACES[1], marks=pytest.mark.slow)])
def test_a_process_that_uses_one_namespace_is_as_if_the_other_had_not_been_imported(installed, tmp_path, namespace):
    done = installed.run(
        "python",
        "-c",
        f"""
import logging, sys, warnings
import {namespace} as pl
from {namespace}.demos.boring_classes import BoringModel
from lightning_utilities.core import rank_zero
def process_wide(): return rank_zero.log, rank_zero.rank_zero_deprecation_category, warnings.formatwarning
logging.getLogger({namespace!r}).setLevel(logging.ERROR)
warnings.formatwarning = lambda message, *_: f"MINE {{message}}\\n"
before = process_wide()
pl.Trainer(max_steps=1, logger=False, enable_checkpointing=False, accelerator="cpu").fit(BoringModel())
warnings.warn("still in the user's own form")
assert {set(NAMESPACES).difference([namespace])!r} <= sys.modules.keys()
assert process_wide() == before
""",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "stopped" not in done.stderr  # what Lightning says at the end of fit was silenced
    assert "MINE" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "logs"),
    [("pl, L", "L"), ("L, pl", "pl"), ("pl, ours, L", "pl"), ("L, ours, pl", "L"), ("ours, L, pl", "pl")],
)
def test_the_order_of_imports_does_not_matter(installed, tmp_path, order, logs):
    modules = {"pl": "pytorch_lightning", "L": "lightning.pytorch", "ours": "lightning_stability"}
    imports = "\n".join(f"import {modules[name]}" for name in order.split(", "))
    last = "from lightning_utilities.core import rank_zero; print(rank_zero.log.name)"
    done = installed.run("python", "-c", f"{imports}\n{BOTH}\n{last}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("are active") == 4
    assert done.stdout.strip().endswith(f"{modules[logs]}.utilities.rank_zero")


BOTH = """
import importlib, sys
def fit(name, *own):
    pl = importlib.import_module(name)
    model = importlib.import_module(name + ".demos.boring_classes").BoringModel()
    pl.Trainer(max_steps=2, accelerator="cpu", enable_progress_bar=False, callbacks=list(own)).fit(model)
names = ["pytorch_lightning", "lightning.pytorch"] if "lightning" in sys.modules else ["pytorch_lightning"]
for name in names * 2:
    fit(name)
from lightning_stability import GradNormMonitor, NaNEarlyStop
for name in names:
    base = importlib.import_module(name).Callback
    assert issubclass(NaNEarlyStop, base) and issubclass(GradNormMonitor, base)
    fit(name, NaNEarlyStop(patience=0), GradNormMonitor())
"""


@pytest.mark.slow
def test_lightning_need_not_be_installed(wheel, tmp_path):
    from tests.plugin.environments import Environment

    environment = Environment(tmp_path / "env", wheel, without=["lightning"])
    done = environment.run("python", "-c", f"import pytorch_lightning\n{BOTH}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("are active") == 2
