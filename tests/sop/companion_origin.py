"""A derived series to make companions of, and literal measures as the job's report tells them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset

from sop.companion import Origin
from tests.sop.derived_series import NOW, derivation, derive, source_series

KERNEL_SPACING = (3.27, 4.6875, 4.0)


def origin(tmp_path: Path, *, source: list[Dataset] | None = None, name: str = "derived", now: Any = NOW,
           **changes: Any) -> Origin:
    """Of a small whole-body source; `changes` go to the Derivation."""
    derived, _, info = derive(source or source_series(), tmp_path / name, now=now, **changes)
    return Origin.of(info, derived, derivation(**changes), now=now)


def kernel() -> NDArray[np.float32]:
    """Asymmetric along every axis, so that no axis can be taken for another; its sum is one."""
    d, h, w = np.meshgrid(np.arange(5), np.arange(7), np.arange(9), indexing="ij")
    values = np.exp(-((d - 1.7) ** 2 / 1.5 + (h - 3.4) ** 2 / 2.5 + (w - 4.6) ** 2 / 4.0)).astype(np.float32)
    return np.asarray(values / values.sum(), dtype=np.float32)


def told(**looks: Any) -> dict[str, Any]:
    """What report.json holds of a job, as far as a measurement report needs it."""
    before, after = {"max": 16.2, "mean": 9.123456789012345, "peak": 12.5}, {"max": 21.0, "mean": 9.2, "peak": 13.7}
    return {
        "method": "nbd", "preset": "best", "device": "cpu", "settings": {"seed": 1, "steps": [2, 3]},
        "gates": [{"name": "activity", "ok": True, "measured": 0.0012, "limit": 0.005},
                  {"name": "end-slice-activity", "ok": True, "measured": 0.03, "limit": 0.1},
                  {"name": "slice-activity", "ok": True, "measured": 0.011, "limit": 0.02},
                  {"name": "kernel-width", "ok": True, "measured": 6.25, "limit": 10.0},
                  {"name": "kernel-centroid", "ok": False, "measured": None, "limit": 0.25}],
        "looks": {
            "unit": "SUVbw", "kernel": {"fwhm_mm": [5.501, 6.002, 6.253]}, "activity_change": 0.000123,
            "residual_rms": 0.0456,
            "regions": [{"label": "1", "centre_mm": [1.5, -20.25, -80.0], "source_slice": 5, "volume_ml": 3.25,
                         "before": before, "after": after},
                        {"label": "2", "centre_mm": [4.5, 2.25, -70.0], "source_slice": 8, "volume_ml": 1.5,
                         "before": after, "after": before}],
        } | looks,
    }


def read(content: bytes) -> Dataset:
    """The data set of a companion's file."""
    return dcmread(io.BytesIO(content))
