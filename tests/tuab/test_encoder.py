import math

import pytest
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_stability.tuab import EEGPT_CHANNELS, EEGPTEncoder, load_pretrained
from lightning_stability.tuab.channels import CHANNELS


def published_form(encoder: EEGPTEncoder) -> dict:
    """A checkpoint as EEGPT's authors publish it: a Lightning checkpoint with parts that belong to pre-training."""
    generator = torch.Generator().manual_seed(1)
    state = {
        f"target_encoder.{key}": 0.05 * torch.randn(value.shape, generator=generator)
        for key, value in encoder.state_dict().items()
    }
    state.update({"predictor.norm.weight": torch.ones(512), "reconstructor.norm.weight": torch.ones(512)})
    return {"state_dict": state, "epoch": 199, "global_step": 1, "pytorch-lightning_version": "1.9.0"}


def small() -> EEGPTEncoder:
    return EEGPTEncoder(embed_dim=32, depth=2, num_heads=4)


def reference(state: dict, eeg: torch.Tensor, heads: int, stride: int) -> torch.Tensor:
    """EEGPT written out in float64, one time patch and one attention head after the other."""
    state = {key: value.double() for key, value in state.items()}
    eeg = eeg.double()
    width = state["norm.weight"].numel()
    rows = [EEGPT_CHANNELS.index(name) for name in CHANNELS]

    def layer_norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-6)
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    kernels = state["patch_embed.proj.weight"][:, 0, 0]  # (width, 64)
    windows = []
    for window in eeg:
        times = []
        for start in range(0, window.shape[1] - 63, stride):
            x = window[:, start : start + 64] @ kernels.T + state["patch_embed.proj.bias"]
            x = torch.cat([x + state["chan_embed.weight"][rows], state["summary_token"][0]])
            for block in range(sum(key.endswith("norm1.weight") for key in state)):
                name = f"blocks.{block}"
                q, k, v = linear(layer_norm(x, f"{name}.norm1"), f"{name}.attn.qkv").split(width, dim=1)
                size = width // heads
                mixed = []
                for head in range(heads):
                    part = slice(head * size, (head + 1) * size)
                    weights = torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(size), dim=-1)
                    mixed.append(weights @ v[:, part])
                x = x + linear(torch.cat(mixed, dim=1), f"{name}.attn.proj")
                h = linear(layer_norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
                x = x + linear(h * 0.5 * (1 + torch.erf(h / math.sqrt(2))), f"{name}.mlp.fc2")
            times.append(layer_norm(x[-4:], "norm"))
        windows.append(torch.stack(times))
    return torch.stack(windows)


@pytest.mark.parametrize("stride", [64, 32])
def test_the_encoder_computes_what_the_paper_says(stride):
    torch.manual_seed(0)
    encoder = EEGPTEncoder(embed_dim=32, depth=3, num_heads=4, patch_stride=stride)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    eeg = torch.randn(2, 19, 256)
    out = encoder(eeg)
    assert out.shape == (2, 4 if stride == 64 else 7, 4, 32)
    torch.testing.assert_close(out.double(), reference(encoder.state_dict(), eeg, 4, stride), rtol=1e-4, atol=1e-4)


def test_the_large_encoder_is_the_published_one_and_loads_its_form(tmp_path):
    torch.manual_seed(0)
    encoder = EEGPTEncoder()
    keys = set(encoder.state_dict())
    assert {
        "summary_token",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        "chan_embed.weight",
        "norm.bias",
    } < keys
    assert {
        f"blocks.7.{part}.weight" for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    } < keys
    assert encoder.state_dict()["patch_embed.proj.weight"].shape == (512, 1, 1, 64)
    assert encoder.state_dict()["chan_embed.weight"].shape == (62, 512)
    assert 25.2e6 < sum(parameter.numel() for parameter in encoder.parameters()) < 25.4e6
    checkpoint = published_form(encoder)
    torch.save(checkpoint, tmp_path / "eegpt.ckpt")
    load_pretrained(encoder, tmp_path / "eegpt.ckpt")
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, checkpoint["state_dict"][f"target_encoder.{key}"])
    with torch.no_grad():
        assert encoder(torch.randn(1, 19, 128)).shape == (1, 2, 4, 512)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c["state_dict"].pop("target_encoder.norm.bias"), "missing: norm.bias"),
        (lambda c: c["state_dict"].update({"target_encoder.extra": torch.ones(1)}), "unexpected: extra"),
        (
            lambda c: c["state_dict"].update({"target_encoder.norm.bias": torch.ones(3)}),
            r"of another shape: norm.bias \(3,\), expected \(32,\)",
        ),
        (
            lambda c: c["state_dict"].update({"target_encoder.norm.bias": torch.full((32,), torch.nan)}),
            "not finite: norm.bias",
        ),
        (
            lambda c: c.update(state_dict={k.removeprefix("target_encoder."): v for k, v in c["state_dict"].items()}),
            r"0 of its \d+ keys start with 'target_encoder.'\): missing: summary_token, .* in all",
        ),
        (
            lambda c: c.pop("state_dict"),
            "no Lightning checkpoint: expected a `state_dict` of tensors, its keys are epoch, ",
        ),
    ],
)
def test_a_wrong_or_partial_checkpoint_is_refused_by_its_keys_and_loads_nothing(tmp_path, damage, message):
    encoder = small()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    checkpoint = published_form(encoder)
    damage(checkpoint)
    torch.save(checkpoint, tmp_path / "eegpt.ckpt")
    with pytest.raises(MisconfigurationException, match=message):
        load_pretrained(encoder, tmp_path / "eegpt.ckpt")
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


class Unknown:
    """Something that a pickle may hold and that loading weights alone does not run."""


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    with pytest.raises(MisconfigurationException, match=r"no EEGPT checkpoint .*missing.ckpt"):
        load_pretrained(small(), tmp_path / "missing.ckpt")
    with pytest.raises(MisconfigurationException, match="not a checkpoint written by"):
        load_pretrained(small(), tmp_path / "text.ckpt")
    torch.save(torch.ones(3), tmp_path / "tensor.ckpt")
    with pytest.raises(MisconfigurationException, match="it holds a Tensor"):
        load_pretrained(small(), tmp_path / "tensor.ckpt")
    torch.save({**published_form(small()), "hyper_parameters": Unknown()}, tmp_path / "pickle.ckpt")
    with pytest.raises(MisconfigurationException, match=r"holds more than tensors.* If you trust the file"):
        load_pretrained(small(), tmp_path / "pickle.ckpt")


def test_windows_shorter_than_a_patch_are_refused():
    with pytest.raises(ValueError, match=r"at least 64 samples, got \(2, 19, 63\)"):
        small()(torch.randn(2, 19, 63))
