"""InputCheck in real runs whose data is meant to hold what is not finite or constant, and in some where it is not."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_stability import InputCheck, InputError, NaNEarlyStop
from lightning_stability.callbacks.input_report import LONGEST_STREAK
from tests import runs
from tests.callbacks.test_input_check import fit, infos, loader, make_module, one

BATCHES = 12


def with_mask(self: Any, batch: Any, batch_idx: int) -> Tensor:
    """Attention over three positions, the last of which are padding."""
    x, mask = batch
    weights = (x[:, :, None] * x[:, None, :] + mask).softmax(dim=-1)
    return self.net(torch.einsum("bqk,bk->bq", weights, x)).pow(2).mean()


def masks(padded: list[bool]) -> DataLoader:
    torch.manual_seed(0)
    mask = torch.zeros(4 * BATCHES, 1, 6)
    for batch, is_padded in enumerate(padded):
        mask[4 * batch : 4 * batch + 4, :, 4:] = -math.inf if is_padded else 0.0
    return DataLoader(TensorDataset(torch.randn(4 * BATCHES, 6), mask), batch_size=4)


def without_what_is_missing(self: Any, batch: Any, batch_idx: int) -> Tensor:
    x, y = batch
    error = self.net(x)[:, 0] - y
    return error[y.isfinite()].pow(2).mean()


def targets(missing: list[int]) -> DataLoader:
    torch.manual_seed(0)
    y = torch.randn(4 * BATCHES)
    y[[4 * batch + 1 for batch in missing]] = math.nan
    return DataLoader(TensorDataset(torch.randn(4 * BATCHES, 6), y), batch_size=4)


@pytest.mark.parametrize("action", ["skip", "raise"])
class TestHealthyData:
    @pytest.mark.parametrize(
        "padded", [[True] * BATCHES, [True, False] * 6, [False] * 11 + [True]], ids=["all", "every other", "the last"]
    )
    def test_additive_masks_cost_no_update_and_no_word(self, action: Any, padded: list[bool]) -> None:
        module = make_module(one, training_step=with_mask)
        said, trainer = fit(one, InputCheck(action=action), masks(padded), module, [runs.RecordCallback()])
        assert (said, trainer.global_step) == ([], BATCHES)
        assert {record.outcome for record in trainer.callbacks[0].records} == {"applied"}

    def test_targets_that_are_missing_are_named_at_the_start_and_cost_no_update(self, action: Any) -> None:
        module = make_module(one, training_step=without_what_is_missing)
        data = targets([batch for batch in range(BATCHES) if batch % 3 < 2])
        [said], trainer = fit(one, InputCheck(action=action), data, module, [runs.RecordCallback()])
        assert "epoch 0, batch 0: `batch[1]` holds a value that is not finite; sample 1 (dataset index 1)" in said
        assert "It is the first batch looked at, so that this is taken as meant to be" in said
        assert {record.outcome for record in trainer.callbacks[0].records} == {"applied"}

    def test_rare_features_cost_no_update(self, action: Any) -> None:
        def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
            return self.net(batch[0][:, :6]).pow(2).mean()

        generator = torch.Generator().manual_seed(0)
        data = DataLoader(TensorDataset((torch.rand(64, 60, generator=generator) < 0.05).float()), batch_size=4)
        records = runs.RecordCallback()
        said, _ = fit(one, InputCheck(action=action), data, make_module(one, training_step=training_step), [records])
        assert said == []
        assert [record.outcome for record in records.records] == ["applied"] * 16


def test_channels_that_are_constant_from_the_start_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        return self.net(batch.mean(dim=2)).pow(2).mean()

    x = torch.randn(12, 6, 5)
    x[:, 2] = 1.0
    x[8:, 4] = 0.0
    module = make_module(one, training_step=training_step)
    said, _ = fit(one, InputCheck(), DataLoader(x, batch_size=4), module, max_epochs=2)
    assert [message for message in infos(caplog) if "by" in message or "constant in the first batch" in message] == [
        "InputCheck: channel 2 of `batch` is constant in the first batch: taken as meant to be, and not looked at"
        " any more."
    ]
    assert len(said) == 1
    assert "batch 2: channel 4 of `batch` is constant, and varied in every batch before" in said[0]


@pytest.mark.parametrize("action", ["skip", "raise"])
def test_a_channel_that_becomes_constant_is_told_and_trained_on(action: Any, tmp_path: Path) -> None:
    """A class that no sample of a batch has leaves its channel of a one-hot mask empty."""

    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch.mean(dim=2)).pow(2).mean()

    torch.manual_seed(0)
    x = torch.randn(4 * BATCHES, 6, 5)
    x[8:12, 4] = 0.0
    records = runs.RecordCallback()
    module = make_module(one, training_step=training_step)
    logger = one.loggers.CSVLogger(tmp_path)
    said, _ = fit(one, InputCheck(action=action), DataLoader(x, batch_size=4), module, [records], logger=logger)
    assert [record.outcome for record in records.records] == ["applied"] * BATCHES
    [message] = said
    assert "batch 2: channel 4 of `batch` is constant, and varied in every batch before. Further" in message
    assert not list(tmp_path.rglob("flagged_inputs.csv"))
    [event] = [event for event in runs.incidents(logger.log_dir) if event["event"] == "input_flagged"]
    assert event["action"] == "warn"


class Graph:
    """A batch of somebody's own class, which Lightning moves by its `to`."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.parent = self

    def to(self, *args: Any, **kwargs: Any) -> "Graph":
        return Graph(self.x.to(*args, **kwargs))


def test_what_a_batch_of_ones_own_class_holds_is_looked_at() -> None:
    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch["graph"].x).pow(2).mean()

    torch.manual_seed(0)
    scales = [1.0] * 5 + [1e5] + [1.0] * 5
    data = [{"graph": Graph(torch.randn(4, 6) * scale)} for scale in scales]
    records = runs.RecordCallback()
    module = make_module(one, training_step=training_step)
    said, _ = fit(one, InputCheck(action="skip"), DataLoader(data, batch_size=None), module, [records])
    assert [record.outcome == "rejected" for record in records.records] == [scale > 1 for scale in scales]
    assert "the std of `batch['graph'].x` is" in said[0]


def test_a_batch_that_a_collate_fn_of_ones_own_makes_names_no_dataset_index() -> None:
    """It may have been sorted, by length say."""
    said, _ = fit(
        one, InputCheck(action="skip"), loader({9: 1e6}, collate_fn=lambda samples: default_collate(samples[::-1]))
    )
    [message] = said
    assert "sample" in message
    assert "dataset index" not in message


def test_what_most_of_the_batches_hold_is_not_flagged_any_more_and_a_warning_says_so() -> None:
    module = make_module(one, training_step=without_what_is_missing)
    records = runs.RecordCallback()
    said, _ = fit(one, InputCheck(action="skip"), targets(list(range(1, BATCHES))), module, [records])
    assert [record.outcome for record in records.records] == [
        "applied",
        *["rejected"] * 2,
        *["applied"] * (BATCHES - 3),
    ]
    assert "epoch 0, batch 1: `batch[1]` holds a value that is not finite" in said[0]
    assert "epoch 0, batch 3: `batch[1]` holds a value that is not finite" in said[1]
    assert "Most batches before held such, so that this is taken as meant to be" in said[1]
    assert len(said) == 2


class TestBadData:
    def test_a_bad_first_batch_is_named_and_the_guard_skips_it_and_later_ones_are_flagged(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        records = runs.RecordCallback()
        bad = {2: math.nan, 14: math.nan}  # of the batches 0 and 3
        said, trainer = fit(one, InputCheck(action="skip"), loader(bad, shuffle=False), callbacks=[records])
        assert [record.outcome for record in records.records] == ["bad", *["applied"] * 2, "rejected", *["applied"] * 2]
        assert "batch 0: `batch['x']` holds 6 values that are not finite; sample 2" in said[0]
        assert "taken as meant to be" in said[0]
        assert "batch 3: `batch['x']` holds 6 values that are not finite; sample 2" in said[1]
        assert all(p.isfinite().all() for p in trainer.lightning_module.parameters())
        summary = (
            "6 batches looked at, 1 flagged (1 nonfinite); 1 update skipped for that; 1 update skipped because it was"
        )
        assert summary in infos(caplog)[-1]

    def test_raise_ends_the_run_after_a_bad_first_batch_whose_loss_is_not_finite(self) -> None:
        with pytest.raises(
            InputError, match=r"epoch 0, batch 0: .* sample 2 .*Its loss is not finite either"
        ) as raised:
            fit(one, InputCheck(action="raise"), loader({2: math.nan}, shuffle=False))
        error = raised.value
        assert (error.reason, error.batch_idx, error.sample, error.step) == ("nonfinite", 0, 2, 0)

    def test_a_feature_that_is_never_finite_is_left_to_the_guard_which_ends_the_run(self) -> None:
        x = torch.randn(32, 6)
        x[:, 4] = math.nan
        stop = NaNEarlyStop(patience=2)
        module = make_module(one, training_step=lambda self, batch, batch_idx: self.net(batch[0]).pow(2).mean())
        data = DataLoader(TensorDataset(x), batch_size=4)
        said, trainer = fit(one, InputCheck(action="skip"), data, module, [stop])
        assert "holds 4 values that are not finite" in said[0]
        assert (stop.state_dict()["skipped_bad"], trainer.global_step) == (3, 3)


class TestSkippedUpdates:
    def test_so_many_in_a_row_are_warned_of_with_what_was_flagged_and_what_to_do(self, tmp_path: Path) -> None:
        too_large = dict.fromkeys(range(4, 24), 1e4)
        check = InputCheck(max_abs=100.0, action="skip")
        logger = one.loggers.CSVLogger(tmp_path)
        said, _ = fit(one, check, loader(too_large, shuffle=False), max_epochs=4, logger=logger)
        assert [message for message in said if "Nothing is learnt" in message] == []

        said, _ = fit(one, check, loader(dict.fromkeys(range(24), 1e4)), max_epochs=4, logger=logger)
        [message] = [message for message in said if "Nothing is learnt" in message]
        assert message == (
            "InputCheck: the last 8 updates were skipped because of what went in and none of this fit was made; flagged"
            " most: `batch['x']` (max_abs, in 8 batches). Nothing is learnt from skipped updates. If that data is as it"
            ' should be, raise max_abs, or take action="warn"; if not, mend it, or leave out what flagged_inputs.csv'
            " lists."
        )

    def test_a_row_in_the_middle_of_a_fit_counts_as_well(self) -> None:
        bad = dict.fromkeys(range(4, 24), 1e4)
        check = InputCheck(max_abs=100.0, action="skip")
        said, _ = fit(one, check, loader(bad, batch_size=2, shuffle=False))
        [message] = [message for message in said if "Nothing is learnt" in message]
        assert f"the last {LONGEST_STREAK} updates were skipped because of what went in; flagged most" in message

    @pytest.mark.parametrize(("batches", "which"), [(1, "the last update was skipped"), (3, "the last 3 updates were")])
    def test_a_short_fit_without_any_update_says_so_at_its_end(
        self, batches: int, which: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        check = InputCheck(max_abs=1e-9, action="skip")
        said, _ = fit(one, check, loader(), limit_train_batches=batches)
        assert which in said[-1]
        assert f"; {batches} update{'s' * (batches > 1)} skipped for that" in infos(caplog)[-1]

    def test_a_fit_that_learns_says_nothing_of_it(self) -> None:
        said, _ = fit(one, InputCheck(max_abs=100.0, action="skip"), loader({0: 1e4}, shuffle=False))
        assert [message for message in said if "Nothing is learnt" in message] == []
