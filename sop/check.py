"""Independent check of a derived PET series against its source: the last gate before anything is sent.

Everything is measured anew from the files; nothing is shared with the writer. Each item has a stable name, the measured
figure, its limit and a sentence; the limits are `Limits`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sop.checks.content import content_items, value_items
from sop.checks.geometry import geometry_items
from sop.checks.identity import identity_items, kept_items
from sop.checks.region import grid_spacing, stated_box
from sop.checks.report import CheckItem, CheckReport, Limits
from sop.checks.stored import Instance, open_derived, open_source, source_series_uid

__all__ = ["CheckItem", "CheckReport", "Limits", "check_derived"]

_DEFAULT = Limits()
_KERNEL_SUM = 1e-3


def check_derived(
    source_files: Sequence[Path],
    derived_files: Sequence[Path],
    *,
    kernel: NDArray | None = None,
    kernel_spacing: tuple[float, float, float] | None = None,
    limits: Limits = _DEFAULT,
) -> CheckReport:
    """Check the series in `derived_files` against the one in `source_files` that it says it was made from.

    source_files     files of the source; others among them, such as a CT of the study, are passed over.
    kernel           (d, h, w), odd, sum 1, on the source's grid: y = D(x) * k. With it the activity of each slice and
                     the residual are judged on the re-blurred image, which is sharper than without.
    kernel_spacing   mm along slice, row and column; must be the source's.

    Where the derived series states that only a region was deblurred, blurring again, place and residual are judged in
    it, and all else must be the upsampled source.

    Raises FileNotFoundError for an empty list, Refused "empty" where the source is not among the files, ValueError for
    a kernel of another spacing, of even size, or whose sum is not 1, InvalidDicomError for what is not DICOM.
    """
    if not derived_files or not source_files:
        raise FileNotFoundError(f"no {'source' if derived_files else 'derived'} file was given")
    derived = open_derived(derived_files)
    source = open_source(source_files, source_series_uid(derived))
    if kernel is not None:
        _require_kernel(kernel, kernel_spacing, source)
    box = stated_box(derived)
    return CheckReport((
        *geometry_items(source, derived, limits),
        *value_items(derived, limits),
        *identity_items(source, derived),
        *kept_items(source, derived),
        *content_items(source, derived, kernel, limits, box),
    ))


def _require_kernel(kernel: NDArray, spacing: tuple[float, float, float] | None, source: Sequence[Instance]) -> None:
    if kernel.ndim != 3 or any(n % 2 == 0 for n in kernel.shape) or abs(float(kernel.sum()) - 1) > _KERNEL_SUM:
        raise ValueError(f"kernel must be three-dimensional, odd and sum to 1, got {kernel.shape}, {kernel.sum():.6f}")
    if spacing is None:
        return
    grid = grid_spacing(source)
    grid[0] = grid[0] or spacing[0]
    if np.abs(np.array(spacing) / grid - 1).max() > 0.01:
        raise ValueError(f"kernel spacing {spacing} mm is not that of the source grid, {grid.tolist()} mm")
