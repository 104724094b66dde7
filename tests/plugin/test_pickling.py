"""What was pickled where the package is installed can be loaded where it is not."""

import collections
import copy
import functools
import pickle

import pytest
import pytorch_lightning as pl

import lightning_stability.plugin  # noqa: F401 - it says how our callbacks are copied
from lightning_stability import FractionalCheckpoint, NaNEarlyStop
from tests import runs
from tests.plugin.test_automatic import PREAMBLE
from tests.runs import NAMESPACES

pytestmark = pytest.mark.xdist_group("installed")

FORMS = """
import cloudpickle, joblib
def forms(name, value, mode="wb"):
    for protocol in (0, 2, pickle.HIGHEST_PROTOCOL):
        with open(f"{name}-{protocol}.pickle", "wb") as file: pickle.dump(value, file, protocol)
    with open(f"{name}.cloudpickle", "wb") as file: cloudpickle.dump(value, file)
    torch.save(value, f"{name}.torch")
    joblib.dump(value, f"{name}.joblib")
    with open(f"{name}-copied.pickle", "wb") as file: pickle.dump(copy.deepcopy(value), file)
class Save(pl.Callback):
    what = ()
    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step == 2:
            of = {"callbacks": trainer.callbacks[:], "module": module, "optimizers": trainer.strategy._optimizers,
                  "plugin": trainer.precision_plugin, "trainer": trainer}
            for what in self.what: forms("during-" + what, of[what])
class Hyper(BoringModel):
    def __init__(self, options):
        super().__init__()
        self.save_hyperparameters()
sys.modules["__main__"].__dict__.update(Save=Save, Look=Look, Hyper=Hyper)
"""
LOAD = f"""
import glob
{FORMS}
for path in sorted(glob.glob("*-*")):
    end = path.rpartition(".")[2]
    if end == "torch": found = torch.load(path, weights_only=False)
    elif end == "joblib": found = joblib.load(path)
    else: found = pickle.load(open(path, "rb"))
    callbacks = found if isinstance(found, list) else getattr(found, "callbacks", [])
    if "callbacks" in path or "trainer" in path:
        assert any(type(c) is pl.Callback for c in callbacks), path
        make(callbacks=[c for c in callbacks if type(c).__name__ != "Save"], logger=False).fit(BoringModel())
    print(path)
assert not [name for name in sys.modules if name.startswith("lightning_stability")]
"""


@pytest.fixture
def pickled(installed, bare, tmp_path):
    """Runs a script where the package is, and loads all that it saved where the package is not."""

    def run(script, namespace=NAMESPACES[0]):
        head = f"NAMESPACE = {namespace!r}{PREAMBLE}"
        done = installed(f"{head}{FORMS}{script}", cwd=tmp_path, automatic="all")
        assert done.returncode == 0, done.stderr
        loaded = bare(f"{head}{LOAD}", cwd=tmp_path)
        assert loaded.returncode == 0, loaded.stderr
        return [name.partition("-")[0] for name in loaded.stdout.split()]

    return run


@pytest.mark.parametrize("namespace", [NAMESPACES[0], pytest.param(NAMESPACES[1], marks=pytest.mark.slow)])
def test_whatever_is_pickled_loads_without_the_package(pickled, namespace):
    """The list, the Trainer, what a run holds, and hyperparameters in a checkpoint; each in seven forms."""
    loaded = pickled(
        """
callbacks = [pl.callbacks.Timer()]
trainer = make(callbacks=callbacks)
forms("before-callbacks", callbacks)
forms("before-trainer", trainer)
trainer.fit(BoringModel())
forms("after-callbacks", callbacks)
forms("after-trainer", trainer)
Save.what = "callbacks", "module", "optimizers"
make(callbacks=[Save()]).fit(BoringModel())
options = {"callbacks": [pl.callbacks.Timer()], "max_steps": 2}
trainer = pl.Trainer(**options, accelerator="cpu", logger=False, enable_progress_bar=False)
trainer.fit(Hyper(options))
trainer.save_checkpoint("checkpoint-.torch")
""",
        namespace,
    )
    assert collections.Counter(loaded) == {"before": 14, "after": 14, "during": 21, "checkpoint": 1}


@pytest.mark.slow
def test_a_trainer_pickled_while_it_trains_loads_without_the_package(pickled):
    loaded = pickled("Save.what = 'plugin', 'trainer'\nmake(callbacks=[Save()]).fit(BoringModel())")
    assert loaded == ["during"] * 14


class Names(pl.Callback):
    """Notes which automatic callbacks the run has."""

    def on_train_batch_start(self, trainer, *args):
        self.seen = [type(c).__name__ for c in trainer.callbacks if getattr(c, "automatic", False)]


def seen(trainer):
    trainer.fit(runs.make_module(pl), runs.data())
    return next(c.seen for c in trainer.callbacks if type(c) is Names)


def test_copies_are_guarded_and_a_trainer_from_a_pickle_is_lightnings_alone(monkeypatch):
    monkeypatch.setenv("LIGHTNING_STABILITY_CALLBACKS", "NaNEarlyStop")
    make = functools.partial(runs.trainer, pl, max_steps=1)
    trainer = make(callbacks=[Names()])
    assert seen(copy.deepcopy(trainer)) == ["NaNEarlyStop"]
    assert seen(make(callbacks=copy.deepcopy(trainer.callbacks))) == ["NaNEarlyStop"]
    assert seen(make(callbacks=pickle.loads(pickle.dumps(trainer.callbacks)))) == ["NaNEarlyStop"]
    assert seen(pickle.loads(pickle.dumps(trainer))) == []
    assert seen(trainer) == ["NaNEarlyStop"]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda given: pickle.loads(pickle.dumps(given))])
def test_a_callback_that_the_user_made_is_copied_as_itself(copied):
    stop = copied(NaNEarlyStop(patience=7))
    assert (type(stop), stop.patience) == (NaNEarlyStop, 7)
    checkpoint = FractionalCheckpoint(0.5)
    assert copied(checkpoint).state_key == checkpoint.state_key


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_a_process_of_the_run_is_guarded_however_it_was_started(installed, tmp_path, strategy):
    (tmp_path / "started.py").write_text(f"""
NAMESPACE = "pytorch_lightning"
{PREAMBLE}
if __name__ == "__main__":
    trainer = make(devices=2, strategy="{strategy}", max_epochs=1, max_steps=-1, limit_train_batches=6)
    warnings.simplefilter("always")
    trainer.fit(Nan())
    assert all(torch.isfinite(p).all() for p in trainer.lightning_module.parameters())
""")
    done = installed.run("python", "started.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 skipped; first incident at epoch 0, batch 3, global step 3" in done.stderr
