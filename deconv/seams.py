"""Seams, measured in a result alone: does the image break where two tiles, or a region and its source, meet?

For a plane between fine voxels j − 1 and j of one axis, with m(i) the mean of the h voxels i .. i + h − 1 along it,

    J(j) = sum over the plane | 3 (m(j) − m(j − h)) − (m(j + h) − m(j − 2h)) |

is how much the image jumps there beyond the slope on either side (zero for a parabola): h = 1 sees a cut, 2 and 4 what
a short ramp has smeared. A face is judged against the planes on either side of it:

    seam = max over faces and h of J(face) / max over neighbouring planes of J

Measured on TV deconvolution of a real whole body (256 x 256 x 256 fine voxels) solved at once: median 0.74 over
planes, above `LIMIT` 0.9 % of them. Tiles by `tiles.solve_in_tiles` are as the whole (1.04 at the same faces). Tiles
cut hard and solved each for itself reach 1.6, a level that differs by 10 % 1.9, an edge between deblurred and
interpolated 1.2 to 1.7. Where the image passes into a known one (a region into the upsampled source), their difference
tells more, because anatomy cancels: head and neck of that study 0.24, with a level 10 % too high inside 2.1, 5 % 1.1;
in the image itself the same are 1.20, 1.18 and 1.18. What is fainter, or faded over more voxels, cannot be told from
anatomy without the truth: compare with the solution at once there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["LIMIT", "seam"]

SCALES = (1, 2, 4)
WINDOW = 16  # fine voxels on either side of a face whose planes are compared with it
FLOOR = 5e-3  # of the image's mean: a jump that is less, in the mean over its plane, is not seen
LIMIT = 1.5


def seam(image: NDArray[np.floating], faces: Sequence[Sequence[int]]) -> float:
    """The worst seam of image (D, H, W) at `faces`: for each axis the indices of the first voxel behind a face.

    0 where there is no face, or none far enough from the border to be judged. An image is taken to have a seam above
    `LIMIT`. Raises ValueError for a face outside the image.
    """
    image = np.asarray(image)
    if image.ndim != 3 or len(faces) != 3:
        raise ValueError(f"expected (D, H, W) and faces for three axes, got {image.shape} and {len(faces)}")
    worst = 0.0
    level = float(np.abs(image).mean(dtype=np.float64))
    for axis, indices in enumerate(faces):
        for face in indices:
            if not 0 < face < image.shape[axis]:
                raise ValueError(f"a face at {face} lies outside axis {axis} of {image.shape[axis]} voxels")
            for scale in SCALES:
                worst = max(worst, _ratio(image, level, axis, face, scale))
    return worst


def _ratio(image: NDArray[np.floating], level: float, axis: int, face: int, scale: int) -> float:
    """J of a face over the largest of the planes near it but not touched by what lies at it."""
    reach = 2 * scale
    first = max(face - WINDOW, reach)
    last = min(face + WINDOW, image.shape[axis] - reach)
    if not first <= face <= last:
        return 0.0
    index = [slice(None)] * 3
    index[axis] = slice(first - reach, last + reach)
    slab = np.moveaxis(image[tuple(index)], axis, 0)
    jumps = [_jump(slab, j - first + reach, scale) for j in range(first, last + 1)]
    others = [jump for j, jump in enumerate(jumps, start=first) if abs(j - face) > reach]
    if not others:
        return 0.0
    return jumps[face - first] / max(*others, FLOOR * level * slab[0].size, 1e-30)


def _jump(slab: NDArray[np.floating], at: int, h: int) -> float:
    """J of the module before plane `at`."""
    far, near, here, beyond = (slab[at + i * h : at + (i + 1) * h].mean(axis=0) for i in (-2, -1, 0, 1))
    return float(np.abs(3.0 * (here - near) - (beyond - far)).sum(dtype=np.float64))
