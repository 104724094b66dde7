import json
import re
import warnings
from itertools import pairwise

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from sklearn import metrics as sk

from lightning_stability.tuab import EEGPTProbe, TUABDataModule
from lightning_stability.tuab.metrics import RecordingAverage, binary_metrics
from lightning_stability.tuab.probe import InputStats


def probe(**options) -> EEGPTProbe:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No EEGPT checkpoint was given")
        return EEGPTProbe(**options)


@pytest.fixture
def data(corpus, tmp_path):
    return TUABDataModule(root=str(corpus), cache_dir=str(tmp_path / "cache"), batch_size=8)


def trainer(tmp_path, **options) -> pl.Trainer:
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    return pl.Trainer(default_root_dir=tmp_path, accelerator="cpu", **{**quiet, "max_epochs": 1, **options})


def test_without_a_checkpoint_a_warning_says_that_the_encoder_is_no_eegpt():
    with pytest.warns(UserWarning, match="the small encoder has random weights and is no EEGPT"):
        small = EEGPTProbe()
    assert sum(parameter.numel() for parameter in small.encoder.parameters()) == pytest.approx(0.1e6, rel=0.1)


def test_the_random_encoder_is_the_same_whatever_the_runs_seed():
    torch.manual_seed(1)
    first, after_first = probe(), torch.rand(1)
    torch.manual_seed(2)
    second = probe()
    assert all(torch.equal(a, b) for a, b in zip(first.encoder.parameters(), second.encoder.parameters(), strict=True))
    torch.manual_seed(1)
    probe()
    assert torch.equal(torch.rand(1), after_first)


def test_gradients_reach_the_channel_adapter_through_the_frozen_encoder():
    model = probe()
    loss = model(torch.randn(2, 19, 2048)).square().sum()
    loss.backward()
    assert (model.adapter.weight.grad.abs() > 0).all()
    assert all(parameter.grad is None for parameter in model.encoder.parameters())


def test_fitting_moves_the_adapter_and_the_classifier_and_nothing_of_the_encoder(data, tmp_path):
    model = probe(learning_rate=1e-2, dropout=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = []

    class Modes(pl.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            modes.append((module.training, any(part.training for part in module.encoder.modules())))

    trainer(tmp_path, limit_train_batches=3, callbacks=[Modes()]).fit(model, data)
    assert modes == [(True, False)] * 3
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("encoder."), name


def test_max_norms_hold_in_every_forward_pass():
    model = probe()
    layers = {model.adapter: 1.0, model.classifier[1]: 1.0, model.classifier[3]: 0.25}
    with torch.no_grad():
        for layer in layers:
            layer.weight.mul_(100)
    model(torch.randn(1, 19, 2048))
    for layer, limit in layers.items():
        norms = layer.weight.detach().flatten(1).norm(dim=1)
        assert (norms <= limit * (1 + 1e-5)).all()
        assert norms.max() == pytest.approx(limit, rel=1e-4)


def test_the_adapter_starts_as_the_identity():
    eeg = torch.randn(2, 19, 256)
    torch.testing.assert_close(probe().adapter(eeg), eeg)


def test_windows_of_another_length_are_refused_with_the_options_to_change():
    with pytest.raises(ValueError, match=r"Expected windows of shape \(batch, 19, 2048\), got \(2, 19, 1024\)"):
        probe()(torch.randn(2, 19, 1024))
    assert probe(window_seconds=4)(torch.randn(2, 19, 1024)).shape == (2, 2)
    assert probe(window_seconds=2.3)(torch.randn(2, 19, 589)).shape == (2, 2)  # as long as the data module makes them


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "FileNotFoundError"),
        ("{", "JSONDecodeError"),
        ('{"mean": 0}', "KeyError: 'std'"),
        ('{"mean": 0, "std": 0}', "std is 0.0"),
        ('{"mean": "x", "std": 1}', "could not convert"),
        ('{"mean": NaN, "std": 1}', "mean is nan"),
        ("[1, 2]", "TypeError"),
    ],
)
def test_a_statistics_file_that_cannot_be_used_is_refused_with_what_was_expected(tmp_path, content, reason):
    file = tmp_path / "stats.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(MisconfigurationException, match=f"(?s){reason}.*expected a JSON file like"):
        probe(input_stats=str(file))


def test_statistics_are_applied_before_the_adapter(tmp_path):
    (tmp_path / "stats.json").write_text(json.dumps({"mean": 3.0, "std": 0.5}))
    model = probe(input_stats=str(tmp_path / "stats.json"))
    eeg = torch.randn(2, 19, 2048)
    plain = probe()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("input_stats.")})
    torch.testing.assert_close(model.eval()(eeg), plain.eval()((eeg - 3.0) / 0.5))


def test_the_reports_statistics_come_with_the_package_and_are_47_000_times_off():
    stats = InputStats.load("wrong_stats.json")
    assert stats(torch.ones(1)).item() == pytest.approx(47_081, rel=1e-4)


def test_what_reaches_the_encoder_is_said_at_the_start_of_fit(data, tmp_path, caplog):
    model = probe(input_stats="wrong_stats.json")
    with torch.no_grad():
        model.adapter.weight.mul_(0.5)
    with caplog.at_level("INFO", "pytorch_lightning.utilities.rank_zero"):
        trainer(tmp_path, limit_train_batches=1, limit_val_batches=0).fit(model, data)
    said = next(record.message for record in caplog.records if "Encoder input" in record.message)
    mean, deviation, low, high = map(float, re.findall(r"-?[\d.]+(?:e[+-]\d+)?", said)[:4])
    train = data.datasets["train"]
    windows = torch.stack([train[n]["eeg"] for n in range(len(train))]) / 2.124e-05 * 0.5
    assert deviation == pytest.approx(windows.std().item(), rel=0.1)
    assert abs(mean) < 0.1 * deviation
    assert windows.min() * 1.01 <= low < -2 * deviation
    assert 2 * deviation < high <= windows.max() * 1.01


@pytest.mark.parametrize(("scheduler", "accumulate"), [("cosine", 4), ("onecycle", 1)])
def test_the_learning_rate_rises_and_falls_over_the_optimizer_steps(data, tmp_path, scheduler, accumulate):
    rates = []

    class Rates(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    model = probe(learning_rate=1e-3, scheduler=scheduler, warmup_fraction=0.25)
    run = trainer(tmp_path, max_epochs=2, accumulate_grad_batches=accumulate, limit_val_batches=0, callbacks=[Rates()])
    run.fit(model, data)
    assert len(rates) == run.global_step == run.estimated_stepping_batches
    peak = int(np.argmax(rates))
    assert max(rates) == pytest.approx(1e-3, rel=1e-6)
    assert peak == max(1, round(0.25 * len(rates)))
    assert rates[0] < 1e-4
    assert all(a < b for a, b in pairwise(rates[: peak + 1]))
    assert all(a > b for a, b in pairwise(rates[peak:]))


@pytest.mark.parametrize(("scheduler", "steps"), [("cosine", 1), ("cosine", 2), ("onecycle", 1), ("onecycle", 3)])
def test_the_shortest_runs_have_a_schedule_too(data, tmp_path, scheduler, steps):
    run = trainer(tmp_path, max_steps=steps, limit_val_batches=0)
    run.fit(probe(scheduler=scheduler), data)
    assert run.global_step == steps


def test_a_run_without_an_end_is_refused_since_its_schedule_needs_one(data, tmp_path):
    with pytest.raises(MisconfigurationException, match="set max_epochs or max_steps"):
        trainer(tmp_path, max_epochs=-1).fit(probe(), data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0}, "learning_rate must be at least 1e-06, got 0"),
        ({"weight_decay": -1}, "weight_decay must be at least 0, got -1"),
        ({"label_smoothing": 2}, "label_smoothing must be at least 0 and below 1, got 2"),
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"dropout": 1.5}, "dropout must be at least 0 and below 1, got 1.5"),
        ({"window_seconds": 0.1}, "window_seconds must be at least 0.25, got 0.1"),
        ({"warmup_fraction": 1}, "warmup_fraction must be at least 0 and below 1"),
        ({"scheduler": "step"}, "scheduler must be 'cosine' or 'onecycle', got 'step'"),
        ({"checkpoint": "nowhere.ckpt"}, "no EEGPT checkpoint nowhere.ckpt"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        probe(**options)


probabilities = st.lists(
    st.tuples(st.integers(0, 100).map(lambda n: n / 100), st.booleans()), min_size=4, max_size=60
).filter(lambda pairs: len({label for _, label in pairs}) == 2)


@given(pairs=probabilities)
def test_metrics_are_scikit_learns(pairs):
    preds, labels = np.array([p for p, _ in pairs], dtype=np.float32), np.array([int(t) for _, t in pairs])
    ours = binary_metrics()
    for part in np.array_split(np.arange(len(pairs)), 2):
        ours.update(torch.tensor(preds[part]), torch.tensor(labels[part]))
    # torchmetrics counts a probability as positive above the threshold, not at it
    hard = (preds > 0.5).astype(int)
    expected = {
        "auroc": sk.roc_auc_score(labels, preds),
        "auprc": sk.average_precision_score(labels, preds),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, hard),
        "accuracy": sk.accuracy_score(labels, hard),
        "kappa": sk.cohen_kappa_score(labels, hard),
        "f1": sk.f1_score(labels, hard, zero_division=0),
    }
    for name, value in ours.compute().items():
        assert value.item() == pytest.approx(expected[name], abs=1e-5), name


@given(
    windows=st.lists(st.tuples(st.integers(0, 4), st.floats(0, 1, width=32)), min_size=1, max_size=50),
    cuts=st.integers(1, 5),
)
def test_a_recordings_score_is_the_mean_of_its_windows(windows, cuts):
    average = RecordingAverage(5)
    numbers, preds = np.array([n for n, _ in windows]), np.array([p for _, p in windows], dtype=np.float32)
    for part in np.array_split(np.arange(len(windows)), cuts):
        average.update(torch.tensor(preds[part]), torch.tensor(numbers[part] % 2), torch.tensor(numbers[part]))
    seen, means, labels = average.compute().unbind(dim=1)
    assert seen.tolist() == sorted(set(numbers.tolist()))
    for number, mean, label in zip(seen.tolist(), means.tolist(), labels.tolist(), strict=True):
        assert mean == pytest.approx(preds[numbers == number].astype(np.float64).mean(), rel=1e-5, abs=1e-7)
        assert label == number % 2


def test_validation_reports_every_metric_per_window_and_per_recording_as_scikit_learn_has_them(data, tmp_path):
    model = probe()
    scores = trainer(tmp_path).validate(model, data, verbose=False)[0]
    names = ["auroc", "auprc", "balanced_accuracy", "accuracy", "kappa", "f1"]
    assert set(scores) == {"val_loss", *(f"val_{n}" for n in names), *(f"val_recording_{n}" for n in names)}
    model.eval()
    with torch.no_grad():
        parts = [
            (batch["recording"], batch["label"], model(batch["eeg"]).softmax(1)[:, 1])
            for batch in data.val_dataloader()
        ]
    recording, label, pred = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    assert scores["val_auroc"] == pytest.approx(sk.roc_auc_score(label, pred), abs=1e-5)
    each = [(label[recording == n][0], pred[recording == n].mean()) for n in np.unique(recording)]
    assert scores["val_recording_auroc"] == pytest.approx(sk.roc_auc_score(*zip(*each, strict=True)), abs=1e-5)


def test_the_classifier_is_the_papers():
    model = probe()
    dropout, first, _, second = model.classifier
    assert dropout.p == 0.5
    assert (first.in_features, first.out_features) == (4 * 64, 16)
    assert (second.in_features, second.out_features) == (16 * 32, 2)
    assert probe(dropout=0.2, hidden=3).classifier[0].p == 0.2


def test_label_smoothing_is_that_of_the_cross_entropy(data, tmp_path):
    losses = {}
    for smoothing in (0.0, 0.3):
        pl.seed_everything(0)
        model, seen = probe(label_smoothing=smoothing, dropout=0.0), []
        model.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out.detach()))
        run = trainer(tmp_path, limit_train_batches=1, limit_val_batches=0)
        labels = []
        model.on_train_batch_start = lambda batch, batch_idx, labels=labels: labels.append(batch["label"])
        run.fit(model, data)
        log_probabilities = torch.log_softmax(seen[0], dim=1)
        likelihood = log_probabilities.gather(1, labels[0][:, None])[:, 0]
        expected = -((1 - smoothing) * likelihood + smoothing * log_probabilities.mean(dim=1)).mean()
        losses[smoothing] = run.callback_metrics["train_loss"]
        torch.testing.assert_close(losses[smoothing], expected)
    assert losses[0.0] != losses[0.3]


def test_the_optimizer_is_adamw_with_the_weight_decay_that_was_asked_for(data, tmp_path):
    run = trainer(tmp_path, limit_train_batches=1, limit_val_batches=0)
    model = probe(weight_decay=0.03)
    run.fit(model, data)
    assert type(run.optimizers[0]) is torch.optim.AdamW
    assert [group["weight_decay"] for group in run.optimizers[0].param_groups] == [0.03]
    trained = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for p in [*model.adapter.parameters(), *model.classifier.parameters()]}


@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_outputs_that_are_not_finite_raise_instead_of_giving_a_score(data, tmp_path, method):
    model = probe()
    data.prepare_data()
    data.setup(method)
    windows = len(data.datasets["val" if method == "validate" else "test"])
    with torch.no_grad():
        model.classifier[3].bias.fill_(torch.nan)
    options = {} if method == "predict" else {"verbose": False}
    with pytest.raises(ValueError, match=f"Input contains NaN: the outputs for {windows} windows"):
        getattr(trainer(tmp_path), method)(model, data, **options)
    assert not (tmp_path / "predictions.csv").exists()


def test_bare_data_loaders_are_refused_because_recordings_are_not_known(data, tmp_path):
    data.prepare_data()
    data.setup("validate")
    with pytest.raises(MisconfigurationException, match="needs a TUABDataModule"):
        trainer(tmp_path).validate(probe(), data.val_dataloader(), verbose=False)


def test_prediction_writes_one_probability_for_each_recording_of_the_test_set(data, tmp_path):
    trainer(tmp_path).predict(probe(), data)
    lines = (tmp_path / "predictions.csv").read_text().splitlines()
    test = [r.path for r in data.cache.recordings if r.official_split == "eval"]
    assert lines[0] == "recording,abnormal_probability"
    assert [line.split(",")[0] for line in lines[1:]] == test
    assert all(0 <= float(line.split(",")[1]) <= 1 for line in lines[1:])


def test_the_large_encoder_trains_a_step_from_a_checkpoint_of_the_published_form(data, tmp_path):
    from lightning_stability.tuab import EEGPTEncoder
    from tests.tuab.test_encoder import published_form

    torch.save(published_form(EEGPTEncoder()), tmp_path / "eegpt.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "No EEGPT checkpoint")
        model = EEGPTProbe(checkpoint=str(tmp_path / "eegpt.ckpt"), window_seconds=1)
    short = TUABDataModule(root=str(data.root), cache_dir=str(tmp_path / "cache"), batch_size=2, window_seconds=1)
    before = model.adapter.weight.clone()
    run = trainer(tmp_path, limit_train_batches=1, limit_val_batches=0)
    run.fit(model, short)
    assert run.global_step == 1
    assert model.encoder.embed_dim == 512
    assert not torch.equal(model.adapter.weight, before)


def test_a_run_resumes_from_its_checkpoint_and_loads_without_the_trainer(data, tmp_path):
    run = trainer(tmp_path, max_epochs=2, limit_train_batches=4, limit_val_batches=0)
    model = probe()
    run.fit(model, data)
    run.save_checkpoint(tmp_path / "a.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No EEGPT checkpoint was given")
        loaded = EEGPTProbe.load_from_checkpoint(tmp_path / "a.ckpt")
    eeg = torch.randn(1, 19, 2048)
    assert torch.equal(loaded.eval()(eeg), model.eval()(eeg))
    more = trainer(tmp_path, max_epochs=3, limit_train_batches=4, limit_val_batches=0)
    more.fit(probe(), data, ckpt_path=tmp_path / "a.ckpt")
    assert more.global_step == 12


def test_in_fp16_the_reports_statistics_make_every_loss_nan_and_the_scaler_skip_every_step(data, tmp_path):
    losses, scales, weights = [], [], []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            losses.append(outputs["loss"].item())
            scales.append(trainer.precision_plugin.scaler.get_scale())
            weights.append(module.adapter.weight.detach().clone())

    fp16 = MixedPrecision("16-mixed", "cpu")
    run = trainer(tmp_path, plugins=[fp16], limit_train_batches=4, limit_val_batches=0, callbacks=[Watch()])
    run.fit(probe(input_stats="wrong_stats.json"), data)
    assert np.isnan(losses).all()
    assert scales == [2.0**15, 2.0**14, 2.0**13, 2.0**12]
    assert all(torch.equal(weight, weights[0]) for weight in weights)


def test_in_fp32_the_same_statistics_are_finite_which_is_why_nobody_looked_at_them(data, tmp_path):
    run = trainer(tmp_path, limit_train_batches=2, limit_val_batches=0)
    run.fit(probe(input_stats="wrong_stats.json"), data)
    assert torch.isfinite(run.callback_metrics["train_loss"])
