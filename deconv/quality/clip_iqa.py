"""CLIP-IQA: does a network that has seen pictures with captions find "Good photo." or "Bad photo." the better one?

    s_j = cos(image embedding, text embedding of caption j)        score = softmax(scale s)_good, 0 bad, 1 good

[W23] Wang, Chan, Loy 2023, doi:10.1609/aaai.v37i2.25353; the paper's Table 3 (0.19 original, 0.39 deblurred).

Optional: the weights do not come with the package and are never downloaded; the user names a file (`load_encoder`).
[W23] takes CLIP RN50 of OpenAI (MIT licence) without the positional embedding of the image encoder, and so do we. Like
BRISQUE it was made for photographs: a figure to set beside the paper's, not a proof of anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage, special

from deconv.quality.brisque import Pictures, pictures
from deconv.volume import Volume

__all__ = ["CAPTIONS", "Encoder", "clip_iqa", "clip_iqa_volume", "load_encoder", "prepared"]

CAPTIONS = ("Good photo.", "Bad photo.")  # [W23]; the paper: "good photo" and "bad photo"
SIZE = 224  # pixels along a side, as CLIP RN50 was trained
_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pictures, red, green, blue
_SD = (0.26862954, 0.26130258, 0.27577711)
_REMEDY = ("CLIP-IQA comes without weights. Remedy: get RN50.pt of OpenAI's CLIP (github.com/openai/CLIP, clip/clip.py "
           "names the address) onto this machine and give its path")


class Encoder(Protocol):
    """What CLIP-IQA needs of CLIP."""

    @property
    def scale(self) -> float:
        """Factor before the softmax: CLIP's exp(logit_scale), 100 in the published weights."""
        ...

    def images(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, 3, SIZE, SIZE) pictures as `prepared` -> (n, d) embeddings of any length."""
        ...

    def texts(self, captions: Sequence[str]) -> NDArray[np.float32]:
        """m captions -> (m, d) embeddings of any length."""
        ...


def clip_iqa(picture: ArrayLike, encoder: Encoder) -> float:
    """Score of a grey picture (H, W) with values in [0, 1]: 1 fits "Good photo.", 0 "Bad photo.".

    Raises ValueError for what is no picture, or where an embedding is zero.
    """
    return float(_scores(prepared(picture)[None], encoder)[0])


def clip_iqa_volume(
    volume: Volume, encoder: Encoder, *, of: Pictures = "mip", window: tuple[float, float] | None = None,
) -> float:
    """Mean score over the pictures of a volume that `brisque.pictures` shows; its arguments and errors."""
    batch = np.stack([prepared(picture) for picture in pictures(volume, of=of, window=window)])
    return float(_scores(batch, encoder).mean())


def prepared(picture: ArrayLike) -> NDArray[np.float32]:
    """(3, SIZE, SIZE): a grey picture (H, W) in [0, 1], black added to make it square, cubic to SIZE, CLIP's colours.

    The whole picture is shown: CLIP's own crop to the middle would cut the patient. Raises ValueError for a picture
    that is not (H, W), not finite or outside [0, 1].
    """
    image = np.asarray(picture, dtype=np.float64)
    if image.ndim != 2 or 0 in image.shape:
        raise ValueError(f"a picture is (H, W), got shape {image.shape}")
    if not np.isfinite(image).all() or image.min() < -1e-6 or image.max() > 1 + 1e-6:
        raise ValueError(f"a picture has values in [0, 1], got {image.min():g} to {image.max():g}")
    side = max(image.shape)
    image = np.pad(image, [((side - n) // 2, side - n - (side - n) // 2) for n in image.shape])
    if side > SIZE:  # what is made smaller is smoothed first, or it would be sampled
        image = ndimage.gaussian_filter(image, 0.5 * (side / SIZE - 1), mode="nearest")
    grey = np.clip(ndimage.zoom(image, SIZE / side, order=3, grid_mode=True, mode="nearest"), 0.0, 1.0)
    colours = [(grey - mean) / sd for mean, sd in zip(_MEAN, _SD, strict=True)]
    return np.stack(colours).astype(np.float32)


def load_encoder(weights: str | Path, *, device: str = "cpu") -> Encoder:
    """CLIP RN50 with the weights of a file: OpenAI's RN50.pt, or a state dictionary with its names.

    Nothing is downloaded. Raises FileNotFoundError without the file, ValueError where it is not CLIP RN50; both say
    what to do.
    """
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"no CLIP weights at {path}. {_REMEDY}.")
    from deconv.quality import clip_rn50  # torch: only those who ask for it wait for it

    try:
        return clip_rn50.load(path, device)
    except ValueError as error:
        raise ValueError(f"{error}. {_REMEDY}.") from error


def _scores(batch: NDArray[np.float32], encoder: Encoder) -> NDArray[np.float64]:
    """(n,) probability of the first caption."""
    image, text = _unit(encoder.images(batch)), _unit(encoder.texts(CAPTIONS))
    return np.asarray(special.softmax(encoder.scale * image @ text.T, axis=1)[:, 0], dtype=np.float64)


def _unit(embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
    rows = np.asarray(embeddings, dtype=np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or np.any(lengths == 0):
        raise ValueError("the encoder returned an embedding that is zero or not finite")
    return rows / lengths
