"""InputCheck on a GPU: no synchronisation on a clean step, and kernels that say what torch's pass says."""

import math
from typing import Any

import pytest
import torch

from lightning_stability import InputCheck, InputError
from lightning_stability.health import input_scan
from lightning_stability.health.inputs import InputMeter
from tests import runs
from tests.health.same_stats import assert_same_stats
from tests.recovery import poison
from tests.recovery.test_guard import OPTIMIZERS
from tests.recovery.test_rejection import data
from tests.test_gpu import count

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
pl = runs.load_namespace("pytorch_lightning")
SETTINGS: dict[str, dict[str, Any]] = {
    "32-true": {},
    "32-true fused": {"fused": True},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "16-mixed": {"precision": "16-mixed"},
    "16-mixed fused": {"precision": "16-mixed", "fused": True},
    "accumulating": {"accumulate_grad_batches": 2},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_clean_step_is_not_synchronised_with_by_warn(name: str) -> None:
    settings = SETTINGS[name]
    bare = count(settings, [], log_every_n_steps=4)
    checked = count(settings, [InputCheck()], log_every_n_steps=4)
    start = 2 * settings.get("accumulate_grad_batches", 1)  # the first ones compile and allocate
    print(f"{name}: bare {bare[start:-1]}, with InputCheck {checked[start:-1]}")
    assert checked[start:-1] == bare[start:-1]


def test_torchs_pass_does_not_synchronise_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_scan, "scan", input_scan.scan_with_torch)
    assert count({}, [InputCheck()])[2:-1] == count({}, [])[2:-1]


def test_skip_adds_none_where_the_device_decides_and_raise_adds_one() -> None:
    settings = {"fused": True}
    # (the guard looks at all that the module holds once, at the third batch)
    assert count(settings, [InputCheck(action="skip")])[3:-1] == count(settings, [])[3:-1]
    more = zip(count({}, [InputCheck(action="raise")]), count({}, []), strict=True)
    assert [a - b for a, b in more][3:-1] == [1] * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(), (7,), (32, 100), (32, 19, 2048), (64, 3, 224, 224), (4096, 16), (3, 1, 70001)], ids=str
)
def test_the_kernels_say_what_torchs_pass_says(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    batches = [torch.randn(shape, device="cuda", generator=generator).to(dtype) * s for s in (1.0, 2.0, 2000.0, 1.0)]
    batches[1].view(-1)[-1] = math.nan
    if len(shape) > 1:
        batches[3][:, -1] = 0.5
    meters = InputMeter(1e3, 100.0), InputMeter(1e3, 100.0)
    for batch in batches:
        [ours] = meters[0].measure(batch)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(input_scan, "scan", input_scan.scan_with_torch)
            [reference] = meters[1].measure(batch)
        assert_same_stats(ours, reference)
    assert input_scan._REFUSED == [], "the kernels did not run"
    assert input_scan.kernels_suit(batches[0].reshape(1, 1, -1))


def test_two_kernels_a_tensor() -> None:
    meter, x = InputMeter(None, 100.0), torch.randn(32, 19, 2048, device="cuda")
    for _ in range(3):
        meter.measure(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        meter.measure(x)
        torch.cuda.synchronize()
    on_device = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert {event.key: event.count for event in on_device} == {"read_values": 1, "judge_values": 1}


@pytest.mark.parametrize("optimizer", ["AdamW fused", "AdamW foreach"])
@pytest.mark.parametrize("how", ["too large", "nan"])
def test_a_rejected_batch_leaves_no_trace(how: str, optimizer: str) -> None:
    results = []
    make = {
        "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
        "AdamW foreach": OPTIMIZERS["AdamW foreach"],
    }
    for by_hand in (False, True):
        kinds = {2: "rejected", 8: "rejected"} if by_hand else {}
        module = poison.make_module(pl, kinds, make[optimizer], by_hand)
        torch.cuda.manual_seed(5)
        callbacks = [] if by_hand else [InputCheck(action="skip")]
        results.append(poison.fit(pl, module, callbacks, data({2}, how), accelerator="gpu"))
    assert poison.differences(*results) == []
    assert poison.nonfinite(results[0]["weights"]) == []


def test_raise_names_the_sample() -> None:
    module = poison.make_module(pl, {}, OPTIMIZERS["AdamW foreach"], by_hand=False)
    with pytest.raises(InputError, match=r"batch 2: `batch\[0\]` holds 6 values that are not finite; sample 1"):
        poison.fit(pl, module, [InputCheck(action="raise")], data({2}, "nan"), accelerator="gpu")


def test_warnings_arrive_late_but_all_of_them() -> None:
    check = InputCheck()
    module = poison.make_module(pl, {}, OPTIMIZERS["AdamW foreach"], by_hand=False)
    with pytest.warns(UserWarning, match=r"epoch 0, batch 2: the std of `batch\[0\]`.*sample 1 \(dataset index 9\)"):
        poison.fit(pl, module, [check], data({2}, "too large"), accelerator="gpu")
    counts = check.state_dict()["counts"]
    assert (counts["looked"], counts["flagged"]) == (12, 2)
