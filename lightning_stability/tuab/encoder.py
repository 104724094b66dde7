"""The EEGPT encoder, and loading its published weights.

Source: Wang et al., "EEGPT: Pretrained Transformer for Universal and Reliable Representation of EEG Signals",
NeurIPS 2024.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_stability.tuab.channels import CHANNELS, EEGPT_CHANNELS, embedding_rows

PATCH_SAMPLES = 64  # 0.25 s at 256 Hz
_CHECKPOINT_PREFIX = "target_encoder."


class EEGPTEncoder(nn.Module):
    """Turns windows of EEG into four summary vectors for each quarter of a second.

    Every channel is cut into patches of 64 samples, which a convolution turns into tokens; an embedding of the channel
    is added. The tokens of all channels at one time, and the learned summary tokens, go through a pre-norm transformer;
    patches at different times do not see each other. Parameter names are those of the published checkpoint.

    The defaults are EEGPT large, 25 million parameters.

    Args:
        channels: Names of the input's channels, of :data:`~lightning_stability.tuab.channels.EEGPT_CHANNELS`.
        embed_dim: Width of a token.
        depth: Number of transformer blocks.
        num_heads: Attention heads in a block; they divide ``embed_dim``.
        patch_stride: Samples from one patch to the next: 64, or 32 for overlapping patches.

    Shape:
        - Input: (batch, channels, samples), at 256 Hz, of about unit variance; at least 64 samples.
        - Output: (batch, time patches, 4, embed_dim).

    Example::

        >>> encoder = EEGPTEncoder(embed_dim=64, depth=2, num_heads=4)
        >>> encoder(torch.randn(2, 19, 2048)).shape
        torch.Size([2, 32, 4, 64])
    """

    summary_tokens = 4

    def __init__(
        self,
        channels: Sequence[str] = CHANNELS,
        embed_dim: int = 512,
        depth: int = 8,
        num_heads: int = 8,
        patch_stride: int = PATCH_SAMPLES,
    ) -> None:
        super().__init__()
        self.patch_embed = _PatchEmbed(embed_dim, patch_stride)
        self.chan_embed = nn.Embedding(len(EEGPT_CHANNELS), embed_dim)
        self.summary_token = nn.Parameter(torch.empty(1, self.summary_tokens, embed_dim))
        self.blocks = nn.ModuleList([_Block(embed_dim, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        # which rows of the embedding the channels are; not learned, and not in the published checkpoint
        self.register_buffer("_rows", torch.tensor(embedding_rows(channels)), persistent=False)
        for weights in (self.summary_token, self.chan_embed.weight):
            nn.init.trunc_normal_(weights, std=0.02)

    @property
    def embed_dim(self) -> int:
        return self.norm.normalized_shape[0]

    def forward(self, eeg: Tensor) -> Tensor:
        """Encode ``eeg``, (batch, channels, samples), as (batch, time patches, 4, embed_dim)."""
        patches = self.patch_embed(eeg) + self.chan_embed(self._rows)  # (batch, times, channels, width)
        batch, times = patches.shape[:2]
        tokens = patches.flatten(0, 1)
        summaries = self.summary_token.to(tokens.dtype).expand(len(tokens), -1, -1)
        tokens = torch.cat([tokens, summaries], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        summaries = self.norm(tokens[:, -self.summary_tokens :])
        return torch.unflatten(summaries, 0, (batch, times))


class _PatchEmbed(nn.Module):
    def __init__(self, embed_dim: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, embed_dim, (1, PATCH_SAMPLES), stride=(1, stride))

    def forward(self, eeg: Tensor) -> Tensor:
        if eeg.shape[-1] < PATCH_SAMPLES:
            raise ValueError(f"EEGPT needs windows of at least {PATCH_SAMPLES} samples, got {tuple(eeg.shape)}.")
        tokens: Tensor = self.proj(eeg[:, None])  # (batch, width, channels, times)
        return tokens.permute(0, 3, 2, 1)


class _Block(nn.Module):
    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = _Attention(embed_dim, num_heads)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mlp = _MLP(embed_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        out: Tensor = tokens + self.mlp(self.norm2(tokens))
        return out


class _Attention(nn.Module):
    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        # the published weights lay the outputs of `qkv` out as (3, heads, head width)
        heads = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1))  # (n, tokens, 3, heads, head width)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)  # (n, heads, tokens, head width)
        mixed: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return mixed


class _MLP(nn.Module):
    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, 4 * embed_dim)
        self.fc2 = nn.Linear(4 * embed_dim, embed_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(tokens)))
        return out


def load_pretrained(encoder: EEGPTEncoder, checkpoint: str | Path) -> None:
    """Load the published EEGPT weights into ``encoder``, all of them or none.

    Args:
        encoder: Of the checkpoint's size: the default is that of ``eegpt_mcae_58chs_4s_large4E.ckpt``.
        checkpoint: A Lightning checkpoint whose ``state_dict`` holds the encoder under ``target_encoder.``; the parts
            that belong to pre-training are left out.

    Raises:
        MisconfigurationException: If there is no such file, it is no checkpoint, or its encoder is not this one; the
            message names the keys that are missing, unexpected or of another shape.

    Example:
        >>> import tempfile
        >>> small = {"embed_dim": 64, "depth": 2, "num_heads": 4}
        >>> published, encoder = EEGPTEncoder(**small), EEGPTEncoder(**small)
        >>> weights = {f"target_encoder.{name}": value for name, value in published.state_dict().items()}
        >>> path = Path(tempfile.mkdtemp()) / "eegpt.ckpt"
        >>> torch.save({"state_dict": weights}, path)
        >>> load_pretrained(encoder, path)
        >>> torch.equal(encoder.summary_token, published.summary_token)
        True
    """
    state = _read_state_dict(Path(checkpoint))
    found = {
        key.removeprefix(_CHECKPOINT_PREFIX): value
        for key, value in state.items()
        if key.startswith(_CHECKPOINT_PREFIX)
    }
    expected = encoder.state_dict()
    problems = {
        "missing": [key for key in expected if key not in found],
        "unexpected": [key for key in found if key not in expected],
        "of another shape": [
            f"{key} {tuple(found[key].shape)}, expected {tuple(value.shape)}"
            for key, value in expected.items()
            if key in found and found[key].shape != value.shape
        ],
        "not finite": [key for key, value in found.items() if not torch.isfinite(value).all()],
    }
    if any(problems.values()):
        raise MisconfigurationException(
            f"{checkpoint} does not hold the EEGPT encoder that it was to be loaded into "
            f"({len(found)} of its {len(state)} keys start with {_CHECKPOINT_PREFIX!r}): "
            + "; ".join(f"{kind}: {_some(keys)}" for kind, keys in problems.items() if keys)
        )
    encoder.load_state_dict(found)


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise MisconfigurationException(f"There is no EEGPT checkpoint {path}.")
    if not zipfile.is_zipfile(path):
        raise MisconfigurationException(f"{path} is not a checkpoint written by torch.save, or it is cut short.")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise MisconfigurationException(
            f"{path} holds more than tensors, and loading that could run code of whoever wrote it. If you trust the "
            'file, keep its weights alone: python -c "import torch, sys; c = torch.load(sys.argv[1], '
            "map_location='cpu', weights_only=False); torch.save({'state_dict': c['state_dict']}, sys.argv[2])\" "
            f"{path} weights.ckpt"
        ) from error
    except Exception as error:  # whatever zip and torch stumble over
        raise MisconfigurationException(f"{path} cannot be loaded as a checkpoint: {error}") from error
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        keys = (
            f"its keys are {_some([str(key) for key in content])}"
            if isinstance(content, dict)
            else f"it holds a {type(content).__name__}"
        )
        raise MisconfigurationException(
            f"{path} is no Lightning checkpoint: expected a `state_dict` of tensors, {keys}."
        )
    return state


def _some(keys: Sequence[str], most: int = 8) -> str:
    return ", ".join(keys[:most]) + (f", ... ({len(keys)} in all)" if len(keys) > most else "")
