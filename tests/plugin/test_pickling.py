"""What was pickled where the package is installed can be loaded where it is not."""

import pytest

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


@pytest.fixture(params=[NAMESPACES[0], pytest.param(NAMESPACES[1], marks=pytest.mark.slow)])
def pickled(installed, bare, tmp_path, request):
    """Runs a script where the package is, and loads all that it saved where the package is not."""

    def run(script, automatic=None):
        head = f"NAMESPACE = {request.param!r}{PREAMBLE}"
        done = installed(f"{head}{FORMS}{script}", cwd=tmp_path, automatic=automatic)
        assert done.returncode == 0, done.stderr
        loaded = bare(f"{head}{LOAD}", cwd=tmp_path)
        assert loaded.returncode == 0, loaded.stderr
        return loaded.stdout.split()

    return run


def test_a_list_of_callbacks_and_a_trainer_load_without_the_package(pickled):
    loaded = pickled("""
callbacks = [pl.callbacks.Timer()]
trainer = make(callbacks=callbacks)
forms("before-callbacks", callbacks)
forms("before-trainer", trainer)
trainer.fit(BoringModel())
forms("after-callbacks", callbacks)
forms("after-trainer", trainer)
""")
    assert len(loaded) == 4 * 7


def test_what_is_pickled_while_a_run_trains_loads_without_the_package(pickled):
    loaded = pickled(
        "Save.what = 'callbacks', 'module', 'optimizers'\nmake(callbacks=[Save()]).fit(BoringModel())", automatic="all"
    )
    assert len(loaded) == 3 * 7


@pytest.mark.xfail(strict=False, reason="what the runtime sets on the precision plugin cannot be pickled")
def test_a_trainer_pickled_while_it_trains_loads_without_the_package(pickled):
    loaded = pickled("Save.what = 'plugin', 'trainer'\nmake(callbacks=[Save()]).fit(BoringModel())", automatic="all")
    assert len(loaded) == 2 * 7


def test_hyperparameters_that_hold_the_callbacks_load_without_the_package(pickled, tmp_path):
    loaded = pickled("""
options = {"callbacks": [pl.callbacks.Timer()], "max_steps": 2}
trainer = pl.Trainer(**options, accelerator="cpu", logger=False, enable_progress_bar=False)
trainer.fit(Hyper(options))
trainer.save_checkpoint("hparams-.torch")
""")
    assert loaded == ["hparams-.torch"]


def test_copies_and_unpickled_lists_are_guarded_where_the_package_is(installed, tmp_path):
    done = installed(
        f"""NAMESPACE = {NAMESPACES[0]!r}{PREAMBLE}
sys.modules["__main__"].Look = Look
look = Look()
trainer = make(callbacks=[look])
for copied in (copy.deepcopy(trainer), pickle.loads(pickle.dumps(make(callbacks=[Look()])))):
    copied.fit(BoringModel())
    [seen] = [c for c in copied.callbacks if type(c) is Look]
    print(len(seen.policies))
again = make(callbacks=pickle.loads(pickle.dumps(trainer.callbacks)))
again.fit(BoringModel())
print(len(next(c for c in again.callbacks if type(c) is Look).policies))
""",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    # A Trainer that was pickled is Lightning's alone wherever it is loaded; one that is made anew has the callbacks.
    assert done.stdout.split() == ["2", "0", "2"]


def test_a_users_own_callback_of_ours_is_pickled_as_itself(installed, tmp_path):
    done = installed(
        f"""NAMESPACE = {NAMESPACES[0]!r}{PREAMBLE}
import lightning_stability, lightning_stability.plugin
own = [lightning_stability.NaNEarlyStop(patience=7), lightning_stability.FractionalCheckpoint(0.5)]
for copied in (pickle.loads(pickle.dumps(own)), copy.deepcopy(own), copy.copy(own)):
    assert copied[0].patience == 7 and copied[1].state_key == own[1].state_key
    trainer = make(callbacks=copied); trainer.fit(BoringModel())
    assert copied[0] in trainer.callbacks
""",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr


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
    assert "NaNEarlyStop ended the run: the loss was nan" in done.stderr
