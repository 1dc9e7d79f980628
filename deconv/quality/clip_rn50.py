"""CLIP RN50: the two encoders of CLIP-IQA, for weights that the user has.

A ResNet-50 with a stem of three convolutions, average pooling before every stride and attention instead of the last
mean; a transformer of 12 layers for captions. Names of layers are those of the published weights. The positional
embedding of the attention pooling is left out: quality has no place, and then the picture may have any size [W23].

[R21] Radford et al. 2021, arXiv:2103.00020        [W23] Wang, Chan, Loy 2023, doi:10.1609/aaai.v37i2.25353
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["TOKENS", "ClipRN50", "RN50Encoder", "load", "read_state"]

#: captions as CLIP's byte pair encoding writes them, begin and end included
TOKENS = {
    "Good photo.": (49406, 886, 1125, 269, 49407),
    "Bad photo.": (49406, 2103, 1125, 269, 49407),
}


class _Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolution with a residual; strides are average pools."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample = None if stride == 1 and channels == 4 * width else nn.ModuleDict({
            "0": nn.Conv2d(channels, 4 * width, 1, bias=False), "1": nn.BatchNorm2d(4 * width)})

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w) -> (n, 4 width, h / stride, w / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.pool(F.relu(self.bn2(self.conv2(y))))
        y = self.bn3(self.conv3(y))
        if self.downsample is not None:
            x = self.downsample["1"](self.downsample["0"](self.pool(x)))
        return F.relu(x + y)


class _AttentionPool(nn.Module):
    """The mean place asks all places: multi-head attention with one query."""

    def __init__(self, channels: int, heads: int, out: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(channels, channels) for _ in range(3))
        self.c_proj = nn.Linear(channels, out)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w) -> (n, out)."""
        places = x.flatten(2).transpose(1, 2)
        places = torch.cat([places.mean(dim=1, keepdim=True), places], dim=1)

        def per_head(values: Tensor) -> Tensor:  # (n, heads, places, channels / heads)
            return values.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        query, keys, values = self.q_proj(places[:, :1]), self.k_proj(places), self.v_proj(places)
        asked = F.scaled_dot_product_attention(per_head(query), per_head(keys), per_head(values))
        return self.c_proj(asked.transpose(1, 2).flatten(1))


class _ResNet(nn.Module):
    def __init__(self, layers: Sequence[int] = (3, 4, 6, 3), width: int = 64, out: int = 1024) -> None:
        super().__init__()
        half = width // 2
        self.conv1, self.bn1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = nn.Conv2d(half, half, 3, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = nn.Conv2d(half, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        channels = width
        for i, count in enumerate(layers):
            blocks = []
            for j in range(count):
                blocks.append(_Bottleneck(channels, width * 2**i, 2 if i > 0 and j == 0 else 1))
                channels = 4 * width * 2**i
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.attnpool = _AttentionPool(channels, channels // 64, out)
        self.depth = len(layers)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) -> (n, out)."""
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(conv(x)))
        x = F.avg_pool2d(x, 2)
        for i in range(self.depth):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.attnpool(x)


class _TextBlock(nn.Module):
    """Attention to what came before, then two dense layers, each with a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, width), same shape out."""
        tokens = x.shape[1]
        later = torch.triu(torch.ones(tokens, tokens, dtype=torch.bool, device=x.device), 1)
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=later, need_weights=False)[0]
        y = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](y * torch.sigmoid(1.702 * y))


class ClipRN50(nn.Module):
    """Both encoders; smaller ones for tests by `layers`, `width` (pictures), `text_layers`, `text_width`."""

    def __init__(
        self, *, layers: Sequence[int] = (3, 4, 6, 3), width: int = 64, text_layers: int = 12, text_width: int = 512,
        embedding: int = 1024, vocabulary: int = 49408, context: int = 77,
    ) -> None:
        super().__init__()
        self.visual = _ResNet(layers, width, embedding)
        self.token_embedding = nn.Embedding(vocabulary, text_width)
        self.positional_embedding = nn.Parameter(torch.zeros(context, text_width))
        blocks = nn.ModuleList([_TextBlock(text_width, text_width // 64) for _ in range(text_layers)])
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.zeros(text_width, embedding))
        self.logit_scale = nn.Parameter(torch.tensor(float(np.log(100.0))))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(n, tokens) whose last is the end token -> (n, embedding). What would follow the end cannot be seen."""
        x = self.token_embedding(tokens) + self.positional_embedding[:tokens.shape[1]]
        for block in cast(nn.ModuleList, self.transformer["resblocks"]):
            x = block(x)
        return self.ln_final(x[:, -1]) @ self.text_projection


class RN50Encoder:
    """What `deconv.quality.clip_iqa` asks: numpy in, numpy out."""

    def __init__(self, model: ClipRN50, device: str = "cpu") -> None:
        self.model, self.device = model.eval().to(device), device

    @property
    def scale(self) -> float:
        """exp(logit_scale), 100 in the published weights."""
        return float(self.model.logit_scale.detach().exp())

    def images(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, 3, h, w) -> (n, embedding)."""
        with torch.inference_mode():
            return np.asarray(self.model.visual(torch.from_numpy(batch).to(self.device)).cpu().numpy())

    def texts(self, captions: Sequence[str]) -> NDArray[np.float32]:
        """Captions of TOKENS -> (n, embedding). Raises ValueError for another caption."""
        unknown = [caption for caption in captions if caption not in TOKENS]
        if unknown:
            raise ValueError(f"no tokens for {unknown}; there are {list(TOKENS)}")
        tokens = torch.tensor([TOKENS[caption] for caption in captions], device=self.device)
        with torch.inference_mode():
            return np.asarray(self.model.encode_text(tokens).cpu().numpy())


def load(path: Path, device: str = "cpu") -> RN50Encoder:
    """An encoder with the weights of a file: the TorchScript archive OpenAI publishes, or a state dictionary.

    Raises ValueError where the file is neither, or not CLIP RN50.
    """
    try:
        state = read_state(path)
    except (RuntimeError, OSError, EOFError, ValueError, UnpicklingError) as error:
        # without torch's own words: they advise to load what may run code
        raise ValueError(f"{path} holds no weights that torch can read safely ({type(error).__name__})") from error
    model = ClipRN50()
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items() if "num_batches" not in name}
    given = {name: tuple(value.shape) for name, value in state.items()}
    wrong = sorted(name for name, shape in wanted.items() if given.get(name) != shape)
    if wrong:
        raise ValueError(f"{path} is not CLIP RN50: {len(wrong)} of {len(wanted)} layers are missing or of another "
                         f"size, among them {wrong[0]!r}")
    model.load_state_dict({name: state[name].float() for name in wanted}, strict=False)
    return RN50Encoder(model, device)


def read_state(path: Path) -> Mapping[str, Tensor]:
    """Names and weights of a TorchScript archive or of a state dictionary saved by torch, on the CPU, as they are.

    Raises ValueError for anything else that torch can read, and whatever torch raises for what it cannot.
    """
    with path.open("rb") as file:
        scripted = zipfile.is_zipfile(file) and any("/code/" in name for name in zipfile.ZipFile(file).namelist())
    if scripted:
        return dict(torch.jit.load(str(path), map_location="cpu").state_dict())  # the form OpenAI publishes
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(loaded, Mapping):
        raise ValueError(f"a {type(loaded).__name__} and no state dictionary")
    state = loaded.get("state_dict", loaded)
    return {str(name).removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}
