"""How figures and gates are said to people: once, for the pages, the reports and the pictures alike.

Kernel FWHM is everywhere the width at half maximum of the kernel that is kept (kernel.npy, the Parametric Map), on the
PET's voxels, through its highest one; so in the derived series' DerivationDescription and in the measurement report.
PSF FWHM is the method's own figure for the blur, before it was put on voxels: narrower by the voxels' part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["AXES", "GATES", "PSF_IS", "activity", "change", "figure", "gate_words", "psf", "unit_note", "uptake",
           "volume", "widths"]

Json = Mapping[str, Any]

#: Along the axes of a volume. "Along the rows" would be taken for either of two.
AXES = ("from slice to slice", "from row to row", "from column to column")

PSF_IS = "the blur that the method found or was given, without the voxels' part"

#: Gate (deconv.safeguards) -> what is measured, and its unit. A share is told in per cent.
GATES = {
    "activity": ("Change of the total activity", "%"),
    "activity-scale": ("How far off the solver's own total was, before it was corrected", "%"),
    "maximum": ("Highest value, over the source's", "×"),
    "kernel-centroid": ("How far the kernel's centre lies off its middle voxel, along the worst axis", "voxels"),
    "kernel-maximum": ("Share of the kernel in its highest voxel: 1 would be no blur at all", ""),
    "kernel-width": ("Widest FWHM of the kernel", "mm"),
    "slice-gain": ("Largest correction of the activity of a single slice", "%"),
    "slice-activity": ("Largest change of a slice's activity, after blurring again", "%"),
    "end-slice-activity": ("The same for the slices at both ends", "%"),
    "residual": ("What blurring again leaves of the source: root mean square, of its maximum", "%"),
    "seam": ("Break where the deblurred region ends, over that at planes beside it", "×"),
    "uncertainty": ("Voxels whose uncertainty is impossible", "voxels"),
}


def figure(value: Any, unit: str = "") -> str:
    """Four digits, at most four decimals, and the unit; a share as per cent; "–" for what was not measured.

    >>> figure(0.00215, "%"), figure(6.1137, "mm"), figure(1.26e-10, "%"), figure(0.0), figure(None), figure(12345.6)
    ('0.215 %', '6.114 mm', '< 0.0001 %', '0', '–', '12346')
    """
    if value is None:
        return "–"
    if isinstance(value, str | bool):
        return str(value)
    number = float(value) * (100.0 if unit == "%" else 1.0)
    if 0 < abs(number) < 5e-5:
        text = "< 0.0001"
    elif abs(number) >= 1000:
        text = f"{number:.0f}"
    else:
        text = f"{number:.4g}" if abs(number) >= 0.001 or not number else f"{number:.4f}"
    return f"{text} {unit}".rstrip()


def gate_words(gate: Json) -> tuple[str, str, str]:
    """(what is measured, how much it was, its limit) of a gate of a job's report.

    >>> gate_words({"name": "kernel-width", "measured": 6.1137, "limit": 12.25})
    ('Widest FWHM of the kernel', '6.114 mm', '12.25 mm')
    >>> gate_words({"name": "activity", "measured": None, "limit": 0.005})[1:]
    ('not a number', '0.5 %')
    """
    words, unit = GATES.get(gate["name"], ("", ""))
    measured = "not a number" if gate["measured"] is None else figure(gate["measured"], unit)
    return words, measured, figure(gate["limit"], unit)


def uptake(value: float | None) -> str:
    """A value of the image, in its display unit.

    >>> uptake(11.105006), uptake(0.5), uptake(12345.6), uptake(None)
    ('11.11', '0.50', '12346', '–')
    """
    return "–" if value is None else f"{value:.2f}" if abs(value) < 1000 else f"{value:.0f}"


def unit_note(unit: str, why: str) -> str:
    """Why an image is not shown in SUVbw.

    >>> unit_note("kBq/mL", "no SUV: PatientWeight is missing")
    'Shown in kBq/mL, not in SUVbw: PatientWeight is missing.'
    """
    return f"Shown in {unit}, not in SUVbw: {why.removeprefix('no SUV: ').rstrip('.')}."


def volume(ml: float) -> str:
    """mL.

    >>> volume(1.64808)
    '1.65'
    """
    return f"{ml:.2f}"


def change(before: float | None, after: float | None) -> str:
    """From one to the other, with its sign.

    >>> change(10.0, 12.83), change(0.0, 1.0), change(3.0, 3.0 - 1e-9)
    ('+28.3 %', '–', '+0.0 %')
    """
    if before is None or after is None or not before > 0:
        return "–"
    return f"{round(100 * (after / before - 1), 1) + 0.0:+.1f} %"  # never -0.0


def activity(share: float | None) -> str:
    """A relative change of the total activity.

    >>> activity(1.3e-10), activity(-0.0021), activity(None)
    ('less than 0.001 %', '-0.210 %', '–')
    """
    if share is None:
        return "–"
    return "less than 0.001 %" if abs(share) < 1e-5 else f"{100 * share:+.3f} %"


def widths(mm: Sequence[float | None]) -> str:
    """Three widths along the axes; "" where there are none.

    >>> widths([6.379, 6.296, 6.398])
    '6.38 mm from slice to slice, 6.30 mm from row to row, 6.40 mm from column to column'
    """
    if not mm or any(one is None for one in mm):
        return ""
    return ", ".join(f"{one:.2f} mm {axis}" for one, axis in zip(mm, AXES, strict=True))


def psf(metrics: Json) -> str:
    """The PSF FWHM with its standard error, of the metrics of a job's report; "" where the method tells none."""
    found = []
    for letter, axis in zip("dhw", AXES, strict=True):
        width, spread = metrics.get(f"psf_fwhm_{letter}_mm"), metrics.get(f"psf_log_sd_{letter}")
        if width is None:
            return ""
        found.append(f"{width:.2f} mm{'' if spread is None else f' ± {100 * spread:.1f} %'} {axis}")
    return ", ".join(found)
