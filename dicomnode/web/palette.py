"""Numbers to pictures: palettes of 256 colours, and PNGs whose bytes depend on values, range and palette alone.

    inverse   white is nothing, black is `top`: how nuclear medicine reads a MIP
    grey      black is nothing, white is `top`
    hot       black, red, yellow, white
    signed    blue is -top, white is nothing, red is top: for differences
"""

from __future__ import annotations

from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["PALETTES", "picture", "stops"]

_STEPS = np.linspace(0.0, 1.0, 256)


def _mixed(*stops: tuple[float, tuple[int, int, int]]) -> NDArray[np.uint8]:
    """(256, 3): straight lines between colours at places from 0 to 1."""
    at = [place for place, _ in stops]
    channels = [np.interp(_STEPS, at, [colour[c] for _, colour in stops]) for c in range(3)]
    return np.round(np.stack(channels, axis=1)).astype(np.uint8)


PALETTES: dict[str, NDArray[np.uint8]] = {
    "inverse": _mixed((0.0, (255, 255, 255)), (1.0, (0, 0, 0))),
    "grey": _mixed((0.0, (0, 0, 0)), (1.0, (255, 255, 255))),
    "hot": _mixed((0.0, (0, 0, 0)), (0.38, (255, 0, 0)), (0.76, (255, 255, 0)), (1.0, (255, 255, 255))),
    "signed": _mixed((0.0, (5, 48, 97)), (0.25, (67, 147, 195)), (0.5, (255, 255, 255)), (0.75, (214, 96, 77)),
                     (1.0, (103, 0, 31))),
}


def stops(palette: str, number: int = 9) -> list[tuple[str, str]]:
    """The palette as stops of an SVG gradient: ("12.5%", "#rrggbb"), lowest value first. Raises KeyError.

    >>> stops("grey", 2)
    [('0%', '#000000'), ('100%', '#ffffff')]
    """
    table = PALETTES[palette]
    places = np.linspace(0, 255, number)
    return [(f"{100 * place / 255:g}%", "#{:02x}{:02x}{:02x}".format(*table[round(place)])) for place in places]


def picture(values: NDArray[np.floating], *, top: float, palette: str) -> bytes:
    """A PNG of values (rows, columns): 0 to `top` over the palette; -top to `top` for "signed".

    What lies beyond is shown as the end of the scale. Raises KeyError for an unknown palette, ValueError for a top that
    is not above zero or for values that are not an image.
    """
    if not (top > 0 and np.isfinite(top)):
        raise ValueError(f"the upper end of the scale must be above zero, not {top}")
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"an image has rows and columns, not the shape {values.shape}")
    colours = PALETTES[palette]
    share = np.asarray(values, dtype=np.float32) / np.float32(top)
    if palette == "signed":
        share = (share + 1) / 2
    index = np.round(np.clip(share, 0.0, 1.0) * 255).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(index), mode="P")
    image.putpalette(colours.tobytes())
    out = BytesIO()
    image.save(out, format="PNG", compress_level=3)
    return out.getvalue()
