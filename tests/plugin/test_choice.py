"""What LIGHTNING_STABILITY_CALLBACKS may say."""

import pytest
from pytorch_lightning import Callback

import lightning_stability
from lightning_stability._compat import MisconfigurationException
from lightning_stability.plugin import CALLBACKS, chosen


def names(value):
    return [type(callback).__name__ for callback in chosen(value)]


def test_every_public_callback_can_be_named():
    public = (getattr(lightning_stability, name) for name in lightning_stability.__all__)
    assert set(CALLBACKS) == {cls for cls in public if isinstance(cls, type) and issubclass(cls, Callback)}


def test_by_default_the_callbacks_that_observe_and_stop():
    assert names("") == ["NaNEarlyStop", "GradNormMonitor"]
    assert names("  ") == ["NaNEarlyStop", "GradNormMonitor"]


def test_none_all_and_names():
    assert names("none") == []
    assert names("all") == [cls.__name__ for cls in CALLBACKS]
    assert names("GradNormMonitor") == ["GradNormMonitor"]
    assert names(" GradNormMonitor , NaNEarlyStop(patience=0) ,") == ["GradNormMonitor", "NaNEarlyStop"]


def test_options_are_spelled_as_in_python_and_their_types_are_checked():
    stop, monitor = chosen(
        'NaNEarlyStop(patience=2, action="raise", monitor=["val_loss", "val,acc"]),'
        "GradNormMonitor(every_n_steps=10,log_update_ratio=True,group_depth=1)"
    )
    assert (stop.patience, stop.action, stop.monitor) == (2, "raise", ["val_loss", "val,acc"])
    assert (monitor.every_n_steps, monitor.log_update_ratio, monitor.group_depth) == (10, True, 1)
    [stop] = chosen("NaNEarlyStop(monitor='val_loss')")
    assert stop.monitor == ["val_loss"]
    [monitor] = chosen("GradNormMonitor(every_n_steps=None)")
    assert monitor.every_n_steps is None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("Nonsense", "'Nonsense' is no callback of lightning-stability"),
        ("Nonsense", "none, all, or names of NaNEarlyStop, GradNormMonitor"),
        ("NaNEarlyStop;GradNormMonitor", "'NaNEarlyStop;GradNormMonitor' is not of the form Name(option=value)"),
        ("NaNEarlyStop(patience=2", "is not of the form"),
        ("none,NaNEarlyStop", "'none' is no callback"),
        ("NaNEarlyStop(patienc=2)", "option 'patienc' is unknown. Known options: patience, action, monitor."),
        ("NaNEarlyStop(2)", "option '2' has no name in front. Known options: patience"),
        ("NaNEarlyStop(**patience)", "option '**patience' is unknown"),
        ("NaNEarlyStop(patience=two)", "patience=two is no value. Expected a number, a text in quotes"),
        ("NaNEarlyStop(patience='two')", "NaNEarlyStop(patience='two'): Parser key \"patience\": Expected a"),
        ("NaNEarlyStop.patience", "'NaNEarlyStop.patience' is not of the form"),
        ("NaNEarlyStop(patience=-1)", "expected a whole number of at least 0"),
        ("GradNormMonitor(every_n_steps=0)", "expected a whole number of at least 1"),
        ("NaNEarlyStop(patience=2) GradNormMonitor(group_depth=1)", "is not of the form"),
        (
            "FractionalCheckpoint(every_n_train_steps=2)",
            "enable_version_counter, allow_nonfinite, skip_by_loading.",
        ),
        (",", "',' is not of the form Name(option=value)"),
        ("NaNEarlyStop,NaNEarlyStop(patience=2)", "names NaNEarlyStop twice"),
    ],
)
def test_what_is_not_understood_is_an_error_that_lists_what_is_known(value, said):
    with pytest.raises(MisconfigurationException) as raised:
        chosen(value)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_comes_with_the_environment_knows_whether_it_was_named():
    assert [(c.automatic, c.asked_for) for c in chosen("")] == [(True, False)] * 2
    assert [(c.automatic, c.asked_for) for c in chosen("NaNEarlyStop")] == [(True, True)]
