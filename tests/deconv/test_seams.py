"""Seams are told from anatomy, in the result alone."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from deconv.interpolate import doubled
from deconv.seams import LIMIT, seam

MIDDLE = ((32,), (32,), (32,))


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """Noise correlated over four voxels on a level: no place is like another and none is a seam."""
    noise = np.random.default_rng(5).standard_normal((64, 64, 64))
    return (10 + 20 * ndimage.gaussian_filter(noise, 1.7)).astype(np.float32)


def test_an_image_without_seams_has_none(image):
    """Wherever it is looked for."""
    for face in (20, 27, 32, 41):
        assert seam(image, ((face,), (face,), (face,))) < LIMIT


def test_a_level_that_differs_is_a_seam_on_its_axis_alone(image):
    """A step of a tenth is found at its face; the other axes and other faces show nothing."""
    for axis in range(3):
        broken = image.copy()
        np.moveaxis(broken, axis, 0)[32:] *= 1.1
        faces = [tuple((32,) if a == axis else () for a in range(3)) for axis in range(3)]
        assert [seam(broken, one) > LIMIT for one in faces] == [a == axis for a in range(3)]
        assert seam(broken, MIDDLE) > LIMIT


def test_halves_of_unlike_images_are_a_seam(image):
    """Two images of the same level but not the same texture, put together hard."""
    broken = np.concatenate([image[:32], image[::-1][32:, ::-1]])
    assert seam(broken, ((32,), (), ())) > LIMIT


def test_a_parabola_and_an_empty_image_have_no_seam():
    """What is smooth breaks nowhere; nothing is divided by nothing."""
    t = np.arange(64.0)
    assert seam(np.broadcast_to((t * t)[:, None, None], (64, 8, 8)), ((32,), (), ())) < 1e-3
    assert seam(np.zeros((16, 16, 16), np.float32), ((8,), (8,), (8,))) == 0.0
    assert seam(np.ones((16, 16, 16), np.float32), ((), (), ())) == 0.0


def test_faces_must_lie_inside(image):
    """A face at the border or beyond is a mistake of the caller."""
    for faces in (((0,), (), ()), ((64,), (), ()), ((), ())):
        with pytest.raises(ValueError, match="face"):
            seam(doubled(image[:4, :4, :4]) if len(faces) == 2 else image, faces)
