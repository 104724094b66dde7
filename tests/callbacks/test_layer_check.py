"""The layer scale check: a run with it is the run without it, and it says which layer gets what, and why."""

import copy
import csv
import itertools
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_stability import InputCheck, NaNEarlyStop, PrecisionFallback
from lightning_stability.events import read_events
from tests import busy_module, runs
from tests.busy_module import differences, fit

PRECISIONS: dict[str, Any] = {
    "32-true": lambda pl: {},
    "16-mixed": lambda pl: {"plugins": runs.fp16(pl)},
    "bf16-mixed": lambda pl: {"precision": "bf16-mixed"},
    "16-true": lambda pl: {"precision": "16-true"},
    "bf16-true": lambda pl: {"precision": "bf16-true"},
    "64-true": lambda pl: {"precision": "64-true"},
}
BRIEF = [("32-true", 1), ("16-mixed", 3), ("16-true", 1)]
CASES = [
    pytest.param(*case, marks=() if case in BRIEF else pytest.mark.slow)
    for case in itertools.product(PRECISIONS, (1, 3))
]


class TestNothingChanges:
    @pytest.mark.parametrize(("precision", "accumulate"), CASES)
    def test_a_run_with_the_check_is_bit_equal_to_one_without(
        self, pl: Any, precision: str, accumulate: int, caplog: pytest.LogCaptureFixture, recwarn: Any
    ) -> None:
        options = {"accumulate_grad_batches": accumulate}
        without = fit(pl, busy_module.make_module(pl), [], **options, **PRECISIONS[precision](pl))
        module = busy_module.make_module(pl)
        with caplog.at_level("INFO"):
            result = fit(pl, module, [InputCheck()], **options, **PRECISIONS[precision](pl))
        assert differences(without, result) == []
        assert f"measured 6 layers in the first batch, in {precision}" in caplog.text
        assert not [w for w in recwarn if "InputCheck" in str(w.message)]
        assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())

    def test_a_copy_of_the_module_in_the_midst_of_a_step_has_none_of_its_hooks(self, one: Any) -> None:
        copies: list[Any] = []

        def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
            copies.extend((pickle.loads(pickle.dumps(self.net)), copy.deepcopy(self.net)))
            return self.net(batch[0]).pow(2).mean()

        module = runs.make_module(one, training_step=training_step)
        check = InputCheck()
        runs.trainer(one, callbacks=[check], max_epochs=1).fit(module, runs.data())
        assert any(layer._forward_hooks for layer in copies[0].modules())
        for made in copies:
            for layer in made.modules():
                hooks = [*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()]
                assert not [hook for hook in hooks if "lightning_stability" in repr(hook)]
            made(torch.zeros(2, 6))

    def test_with_a_guard_and_a_fallback_that_keep_the_window(self, one: Any) -> None:
        results = []
        for check in ([], [InputCheck()]):
            others = [NaNEarlyStop(patience=0), PrecisionFallback()]
            options = {"accumulate_grad_batches": 2, "plugins": runs.fp16(one)}
            results.append(fit(one, busy_module.make_module(one), [*check, *others], **options))
        assert differences(*results) == []

    def test_gradient_penalties_iterators_and_lazy_layers_are_no_obstacle(
        self, one: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        plain = busy_module.make_module(one).training_step.__func__

        def with_penalty(self: Any, batch: Any, batch_idx: int) -> Any:
            loss = plain(self, batch, batch_idx) * next(self.weights)
            [gradient] = torch.autograd.grad(loss, self.head.weight, create_graph=True)
            return loss + 0.1 * gradient.pow(2).sum()

        results = []
        for check in ([], [InputCheck()]):
            module = busy_module.make_module(one, training_step=with_penalty)
            module.weights = iter(torch.linspace(0.5, 1.5, 12))
            module.head = nn.LazyLinear(1)
            module.head(torch.zeros(1, 8))
            with caplog.at_level("INFO"):
                results.append(fit(one, module, check, plugins=runs.fp16(one)))
        assert differences(*results) == []
        assert "measured 6 layers in the first batch" in caplog.text

    def test_a_frozen_transformer_layer_keeps_its_fast_path(self, one: Any) -> None:
        class Probe(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
                self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).requires_grad_(False).eval()
                self.head = nn.Linear(6, 1)

            def forward(self, x: Any) -> Any:
                with torch.no_grad():
                    x = self.encoder(x[:, None])
                return self.head(x[:, 0])

        paths = []
        for check in ([], [InputCheck()]):
            calls: list[str] = []
            fast = torch._transformer_encoder_layer_fwd
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    torch, "_transformer_encoder_layer_fwd", lambda *a, c=calls, f=fast: c.append("fast") or f(*a)
                )
                runs.trainer(one, callbacks=check).fit(runs.make_module(one, Probe()), runs.data())
            paths.append(calls)
        assert paths == [["fast"] * 4] * 2


class Amplifier(nn.Module):
    def forward(self, x: Any) -> Any:
        return 3e4 * x


def manual_step(self: Any, batch: Any, batch_idx: int) -> None:
    optimizer = self.optimizers()
    optimizer.zero_grad()
    self.manual_backward(self.net(batch[0]).float().pow(2).mean())
    optimizer.step()


def fit_net(pl: Any, net: nn.Module, tmp_path: Path, **options: Any) -> Any:
    """A short fit whose log folder is `tmp_path`; returns InputCheck's warnings."""
    logger = pl.loggers.CSVLogger(str(tmp_path), name="", version="")
    manual = options.pop("manual", False)
    module = runs.make_module(pl, net, **({"training_step": manual_step} if manual else {}))
    module.automatic_optimization = not manual
    scale = options.pop("scale", 1.0)
    batches = [[scale * torch.randn(8, 6, generator=torch.Generator().manual_seed(i))] for i in range(2)]
    trainer = runs.trainer(pl, callbacks=[InputCheck()], logger=logger, **options)
    with pytest.warns() as caught:
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return [str(w.message) for w in caught if "InputCheck: " in str(w.message)]


class TestWhatItSays:
    def test_the_layer_the_factor_and_the_limit_before_any_weight_moves(self, pl: Any, tmp_path: Path) -> None:
        net = nn.Sequential(nn.LayerNorm(6), Amplifier(), nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        [said] = fit_net(pl, net, tmp_path, plugins=runs.fp16(pl))
        deviation = re.search(r"the input of `net\.2` has std ([\d,]+): fp16 ends at 65,504", said)[1]
        assert 25_000 < float(deviation.replace(",", "")) < 31_000
        assert re.search(r"the batch itself has std (1\.0|0\.9\d), so `net\.1` multiplies by 30,000", said)
        assert "It reaches `net.3` (" in said
        [event] = [e for e in read_events(tmp_path) if e["event"] == "input_scales"]
        assert (event["step"], event["layers"], len(event["far_from_unit_scale"])) == (0, 5, 1)
        rows = list(csv.DictReader((tmp_path / "input_scales.csv").open()))
        assert [row["layer"] for row in rows] == [f"net.{i}" for i in range(5)]
        assert float(rows[2]["input_deviation"]) == pytest.approx(float(deviation.replace(",", "")), rel=1e-3)
        assert float(rows[4]["input_deviation"]) < 2

    @pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
    def test_weights_of_16_bits_and_a_batch_that_they_cannot_hold(
        self, one: Any, precision: str, tmp_path: Path
    ) -> None:
        net = nn.Sequential(nn.Linear(6, 8), nn.LSTM(8, 4))
        net[1].register_forward_hook(lambda layer, args, out: out[0])
        said = fit_net(one, net, tmp_path, precision=precision, scale=1e6, max_steps=1)
        figure = r"std (1,\d{3}|9\d{2}),\d{3}"
        what = "is not finite: fp16 ends at 65,504" if precision == "16-true" else f"has {figure}"
        assert re.match(rf"InputCheck: the input of `net\.0` {what}; the batch itself has {figure}", said[0])
        [row, lstm] = csv.DictReader((tmp_path / "input_scales.csv").open())
        assert row["input_deviation"] == "nan" if precision == "16-true" else float(row["input_deviation"]) > 1e5
        assert lstm["output_deviation"] == "nan" if precision == "16-true" else float(lstm["output_deviation"]) > 0

    def test_manual_optimization_is_reported_after_its_first_step(self, pl: Any, tmp_path: Path) -> None:
        net = nn.Sequential(Amplifier(), nn.Linear(6, 8))
        [said] = fit_net(pl, net, tmp_path, manual=True)
        assert re.search(r"the input of `net\.1` has std [23]\d,\d+", said)
        assert re.search(r"the batch itself has std (1\.0|0\.9\d), so `net\.0` multiplies by 30,000", said)
        [event] = [e for e in read_events(tmp_path) if e["event"] == "input_scales"]
        assert event["step"] == 1

    def test_a_compiled_module_is_one_layer_and_compiled_without_hooks(self, one: Any, tmp_path: Path) -> None:
        compiled = []

        def backend(graph: Any, inputs: Any) -> Any:
            compiled.append(graph)
            return graph.forward

        inner = torch.compile(nn.Sequential(nn.Linear(6, 6), Amplifier()), backend=backend)
        [said] = fit_net(one, nn.Sequential(inner, nn.Linear(6, 8)), tmp_path)
        assert "the input of `net.1` has std" in said
        assert re.search(r"so `net\.0` multiplies by \d\d,", said)
        assert len(compiled) == 1

    def test_a_layer_that_makes_infinity_of_finite_values_is_the_cause(self, one: Any, tmp_path: Path) -> None:
        class Log(nn.Module):
            def forward(self, x: Any) -> Any:
                return torch.log(x.clamp_min(0))

        said = fit_net(one, nn.Sequential(nn.Linear(6, 8), Log(), nn.Linear(8, 1)), tmp_path, max_steps=1)
        [first] = [message for message in said if "InputCheck: the " in message]
        assert re.fullmatch(
            r"InputCheck: the input of `net\.2` is not finite; the batch itself has std [\d.]+, so `net\.1`"
            r" returns values that are not finite\.",
            first,
        )

    def test_a_training_step_that_raises_is_explained_first(self, one: Any, tmp_path: Path) -> None:
        def raise_on_large(self: Any, batch: Any, batch_idx: int) -> Any:
            raise ValueError(f"out of range: {self.net(batch[0])}")

        net = nn.Sequential(Amplifier(), nn.Linear(6, 8))
        trainer = runs.trainer(one, callbacks=[InputCheck()])
        with (
            pytest.warns(UserWarning, match=r"the input of `net\.1` .* so `net\.0` multiplies by 30,000"),
            pytest.raises(ValueError, match="out of range"),
        ):
            trainer.fit(runs.make_module(one, net, training_step=raise_on_large), runs.data())
        assert not any(layer._forward_hooks for layer in net.modules())

    def test_several_causes_are_several_warnings_and_many_are_counted(self, one: Any, tmp_path: Path) -> None:
        blocks = [m for _ in range(7) for m in (nn.LayerNorm(6), Amplifier(), nn.Linear(6, 6))]
        said = fit_net(one, nn.Sequential(*blocks), tmp_path, max_steps=1)
        assert [re.search(r"the input of `net\.(\d+)`", s)[1] for s in said[:-1]] == ["2", "5", "8", "11", "14"]
        assert said[-1] == "InputCheck: 2 more layers are like these."

    def test_a_batch_that_is_far_from_unit_scale_itself(self, one: Any, tmp_path: Path) -> None:
        [said] = fit_net(one, nn.Sequential(nn.Linear(6, 8)), tmp_path, scale=1e-4, max_steps=1)
        assert re.fullmatch(
            r"InputCheck: the input of `net\.0` has std [\d.e-]+; the batch itself has std [\d.e-]+\.", said
        )

    def test_a_batch_that_is_not_finite_is_left_to_the_check_of_batches(self, one: Any, tmp_path: Path) -> None:
        said = fit_net(one, nn.Sequential(nn.Linear(6, 8)), tmp_path, scale=float("inf"), max_steps=1)
        assert len(said) == 1
        assert "values that are not finite" in said[0]

    def test_what_happens_before_the_first_layer(self, one: Any, tmp_path: Path) -> None:
        class Scales(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(6, 8)

            def forward(self, x: Any) -> Any:
                return self.layer(x / 1e-4)

        [said] = fit_net(one, Scales(), tmp_path, max_steps=1)
        assert "the batch itself has std" in said
        assert "so what comes before it multiplies by 10,000" in said

    def test_what_no_layer_before_it_explains_is_another_cause(self, one: Any, tmp_path: Path) -> None:
        class TwoCauses(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.amplifier, self.norm, self.layer = Amplifier(), nn.LayerNorm(6), nn.Linear(6, 8)

            def forward(self, x: Any) -> Any:
                return self.layer(1e8 * self.norm(self.amplifier(x)))

        first, second = fit_net(one, TwoCauses(), tmp_path, max_steps=1)
        assert "the input of `net.norm`" in first
        assert "`net.amplifier` multiplies by 30,000" in first
        assert "the input of `net.layer`" in second
        assert "so what comes before it multiplies by" in second
