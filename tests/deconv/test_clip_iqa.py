"""CLIP-IQA: the score is the softmax over two captions, whoever encodes them; real weights are the user's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from deconv.phantoms import head_and_neck
from deconv.quality.clip_iqa import CAPTIONS, SIZE, clip_iqa, clip_iqa_volume, load_encoder, prepared
from deconv.quality.clip_rn50 import ClipRN50, RN50Encoder, read_state


class Brightness:
    """Encodes a picture by how bright it is: all along (1, 0) when white, (0, 1) when black. "Good" is bright."""

    scale = 2.0

    def __init__(self) -> None:
        self.captions: list[str] = []

    def images(self, batch: np.ndarray) -> np.ndarray:
        dark = prepared(np.zeros((SIZE, SIZE))).mean()
        light = prepared(np.ones((SIZE, SIZE))).mean()
        bright = (batch.mean(axis=(1, 2, 3)) - dark) / (light - dark)
        return 7.0 * np.stack([bright, 1 - bright], axis=1)  # CLIP's embeddings have any length

    def texts(self, captions: Sequence[str]) -> np.ndarray:
        self.captions += captions
        return np.array([[3.0, 0.0], [0.0, 5.0]])


def test_score_is_the_softmax_of_scaled_cosines() -> None:
    """White is the first caption, black the second: e^2 / (e^2 + 1) and 1 / (1 + e^2), whatever the lengths."""
    encoder = Brightness()
    assert clip_iqa(np.ones((32, 32)), encoder) == pytest.approx(np.exp(2) / (np.exp(2) + 1), abs=1e-5)
    assert clip_iqa(np.zeros((32, 32)), encoder) == pytest.approx(1 / (1 + np.exp(2)), abs=1e-5)
    assert clip_iqa(np.full((32, 32), 0.5), encoder) == pytest.approx(0.5, abs=1e-5)
    assert encoder.captions[:2] == list(CAPTIONS) == ["Good photo.", "Bad photo."]


def test_volume_is_the_mean_over_its_projections() -> None:
    """Three pictures, one score."""
    volume = head_and_neck((16, 24, 24)).measured
    x = volume.array / volume.array.max()
    expected = np.mean([clip_iqa(x.max(axis=axis), Brightness()) for axis in range(3)])
    assert clip_iqa_volume(volume, Brightness()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shape", [(30, 60), (60, 30), (300, 500), (SIZE, SIZE)])
def test_the_whole_picture_is_shown(shape: tuple[int, int]) -> None:
    """Any shape becomes a square with black beside it; nothing is cut off or stretched."""
    shown = prepared(np.ones(shape))
    black = prepared(np.zeros(shape))
    assert shown.shape == (3, SIZE, SIZE) and shown.dtype == np.float32
    lit = (shown[0] > (shown[0].max() + black[0].min()) / 2).sum() / SIZE**2
    assert lit == pytest.approx(min(shape) / max(shape), abs=0.02)


def test_what_cannot_be_judged_is_refused() -> None:
    """Another range of values, no picture, an encoder that answers nothing."""
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        clip_iqa(np.full((32, 32), 7.0), Brightness())
    with pytest.raises(ValueError, match="is \\(H, W\\)"):
        clip_iqa(np.zeros((2, 32, 32)), Brightness())
    silent = Brightness()
    silent.images = lambda batch: np.zeros((len(batch), 2))  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="zero"):
        clip_iqa(np.ones((32, 32)), silent)


def small_clip() -> ClipRN50:
    torch.manual_seed(0)
    return ClipRN50(layers=(1, 1, 1, 1), width=8, text_layers=2, text_width=64, embedding=32)


def test_clip_itself_is_an_encoder() -> None:
    """A small one with random weights, through the real interface: a probability, the same every time."""
    encoder = RN50Encoder(small_clip())
    torch.nn.init.normal_(encoder.model.text_projection)
    picture = np.linspace(0, 1, 64 * 64).reshape(64, 64)
    assert 0 <= clip_iqa(picture, encoder) == clip_iqa(picture, encoder) <= 1
    assert encoder.scale == pytest.approx(100.0)
    with pytest.raises(ValueError, match="no tokens"):
        encoder.texts(["A cat."])


def test_captions_end_where_they_end() -> None:
    """The embedding of a caption is that of its last token: what precedes counts, order included."""
    model = small_clip().eval()
    torch.nn.init.normal_(model.text_projection)
    torch.nn.init.normal_(model.positional_embedding)
    with torch.inference_mode():
        one, other = model.encode_text(torch.tensor([[1, 2, 3, 9], [2, 1, 3, 9]]))
    assert not torch.allclose(one, other, atol=1e-3)


def test_picture_size_is_free_without_positional_embedding() -> None:
    """Any multiple of 32 pixels gives an embedding of one length."""
    encoder = RN50Encoder(small_clip())
    assert encoder.images(np.zeros((2, 3, 64, 96), np.float32)).shape == (2, 32)


def test_missing_weights_say_what_to_do(tmp_path: Path) -> None:
    """The message names the file and the weights that are needed."""
    with pytest.raises(FileNotFoundError, match=r"comes without weights.*RN50\.pt"):
        load_encoder(tmp_path / "RN50.pt")


@pytest.mark.parametrize("content", ["rubbish", "another network", "no dictionary"])
def test_a_file_that_is_not_clip_is_refused(tmp_path: Path, content: str) -> None:
    """Named as such, whatever it is."""
    path = tmp_path / "RN50.pt"
    if content == "rubbish":
        path.write_bytes(b"not weights")
    else:
        torch.save(small_clip().state_dict() if content == "another network" else [1, 2], path)
    reasons = r"(not CLIP RN50|no weights that torch can read safely|no state dictionary)"
    with pytest.raises(ValueError, match=rf"{reasons}.*comes without weights"):
        load_encoder(path)


class Published(torch.nn.Module):
    """Encoders inside a module that can be run, as a TorchScript archive holds them."""

    def __init__(self, model: ClipRN50) -> None:
        super().__init__()
        self.visual = model.visual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.visual(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_weights_are_read_from_both_kinds_of_file(tmp_path: Path) -> None:
    """A state dictionary, one of a distributed run, and a TorchScript archive hold the same names and weights."""
    model = Published(small_clip()).eval()
    state = model.state_dict()
    torch.save(state, tmp_path / "state.pt")
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "run.pt")
    torch.jit.save(torch.jit.trace(model, torch.zeros(1, 3, 64, 64)), str(tmp_path / "scripted.pt"))
    for name in ("state.pt", "run.pt", "scripted.pt"):
        read = read_state(tmp_path / name)
        assert set(read) >= {key for key in state if "num_batches" not in key}
        assert all(torch.equal(read[key], state[key]) for key in read)


def test_real_weights_prefer_a_picture_to_noise() -> None:
    """Where the user has weights (DICOMNODE_CLIP_WEIGHTS names the file)."""
    path = os.environ.get("DICOMNODE_CLIP_WEIGHTS")
    if not path:
        pytest.skip("no CLIP weights: DICOMNODE_CLIP_WEIGHTS names none")
    encoder = load_encoder(path)
    volume = head_and_neck((32, 48, 48)).measured
    x = volume.array.max(axis=1) / volume.array.max()
    grain = np.random.default_rng(0).random(x.shape)
    assert 0 < clip_iqa(grain, encoder) < clip_iqa(x, encoder) < 1
