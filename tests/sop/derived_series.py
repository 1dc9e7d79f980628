"""A small source series and the derived series made from it, for tests of the writer and of the check."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from scipy import ndimage

from deconv.volume import Volume
from sop.pet import Derivation, DerivedSeries, write_derived
from sop.read import read_series
from sop.series import SeriesInfo
from tests.factories import pet_series

NOW = datetime(2026, 3, 4, 5, 6, 7, 890000, tzinfo=UTC)
SHAPE = (12, 30, 26)


def body(shape: tuple[int, int, int] = SHAPE) -> NDArray[np.float64]:
    """An ellipsoid of 2000 with seven hot spheres spread over it, smooth as a PET image is; Bq/mL."""
    grid = np.stack(np.meshgrid(*[np.arange(n) + 0.5 for n in shape], indexing="ij"), axis=-1) / np.array(shape) - 0.5
    image = np.where((grid**2).sum(axis=-1) < 0.45**2, 2000.0, 20.0)
    places = [(0, 0, 0), (0.2, 0.2, 0.2), (-0.2, 0.2, -0.2), (0.2, -0.2, 0.1), (-0.1, -0.25, -0.2), (-0.25, 0, 0.2),
              (0.25, 0.05, -0.2)]
    for strength, place in enumerate(places):
        image[((grid - np.array(place)) ** 2).sum(axis=-1) < 0.09**2] = 9000.0 + 2000 * strength
    return ndimage.gaussian_filter(image, 0.9, mode="nearest")


def doubled(array: NDArray[Any]) -> NDArray[np.float32]:
    """Linear interpolation onto the doubled grid, edges kept: the stand-in for a deblurred image."""
    fine = ndimage.zoom(np.asarray(array, dtype=np.float64), 2, order=1, grid_mode=True, mode="nearest")
    return fine.astype(np.float32)


def derivation(**changes: Any) -> Derivation:
    """A complete Derivation; what a test is about is given by keyword."""
    given: dict[str, Any] = {"method": "nbd", "preset": "best", "settings": {"seed": 1, "steps": [2, 3]},
                             "software_version": "1.2.3", "kernel_fwhm_mm": (5.5, 6.0, 6.25)}
    return Derivation(**(given | changes))


def save(data_sets: Iterable[Dataset], folder: Path) -> list[Path]:
    """Write data sets as files 000.dcm, 001.dcm, ... and name them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, ds in enumerate(data_sets):
        paths.append(folder / f"{number:03d}.dcm")
        ds.save_as(paths[-1], enforce_file_format=True)
    return paths


def derive(
    sources: Sequence[Path | Dataset], folder: Path, *,
    image: Callable[[NDArray[np.float32]], NDArray[Any]] = doubled, now: datetime = NOW, **changes: Any,
) -> tuple[DerivedSeries, Volume, SeriesInfo]:
    """Read, double by `image`, write. The series, the image as handed over, what was known of the source."""
    volume, info = read_series(sources)
    fine = volume.doubled(np.asarray(image(volume.array), dtype=np.float32))
    return write_derived(fine, info, derivation(**changes), folder, now=now), fine, info


def source_series(**options: Any) -> list[Dataset]:
    """A GE whole body PET of two beds, oblong voxels, not square, with values of `body`."""
    slices, rows, columns = SHAPE
    defaults: dict[str, Any] = {"slices": slices, "rows": rows, "columns": columns, "values": body(),
                                "spacing": (3.27, 4.6875, 4.0)}
    return pet_series(**(defaults | options))


def read_back(files: Iterable[Path]) -> list[Dataset]:
    """The data sets of a derived series in the order of its files."""
    return [dcmread(path) for path in files]


def values_of(ds: Dataset) -> NDArray[np.float64]:
    """Rescaled values of one slice."""
    return ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept)


def written(tmp_path: Path, *, image: Callable[[NDArray[np.float32]], NDArray[Any]] = doubled, now: datetime = NOW,
            changes: dict[str, Any] | None = None, **options: Any) -> list[Dataset]:
    """Derived data sets in order, of a source made with `options`; `changes` go to the Derivation."""
    return read_back(derive(source_series(**options), tmp_path / "derived", image=image, now=now,
                            **(changes or {}))[0].files)
