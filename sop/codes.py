"""Codes of what we measure. Standard ones (PS3.16, SNOMED CT, UCUM) wherever they exist; our own scheme else."""

from __future__ import annotations

import re

from highdicom.coding_schemes import CodingSchemeIdentificationItem
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

__all__ = ["OUR_SCHEME", "kernel_estimate", "kernel_weight", "our_scheme", "own", "quantity", "unit"]

OUR_SCHEME = "99DICOMNODE"  # PS3.3 8.2: private schemes begin with 99
_MILLIMETRE = Code("mm", "UCUM", "mm")


def own(value: str, meaning: str) -> Code:
    """A code of our own scheme: at most 16 characters (SH), meaning at most 64 (LO)."""
    return Code(re.sub(r"[^A-Za-z0-9_-]", "-", value)[:16], OUR_SCHEME, meaning[:64])


def our_scheme() -> CodingSchemeIdentificationItem:
    """C.12.1: what a reader who meets our codes can find out."""
    return CodingSchemeIdentificationItem(OUR_SCHEME, name="dicomnode measurements",
                                          responsible_organization="dicomnode")


def kernel_weight() -> Code:
    """Weight of a voxel of a point spread kernel."""
    return own("kernel-weight", "Point spread kernel weight")


def kernel_estimate() -> Code:
    """How a kernel comes of an image; CID 7203 has nothing near to it."""
    return own("kernel-estimate", "Estimation of the point spread kernel")


#: Unit as it is shown (sop.suv.shown_unit) -> what a PET voxel in it measures (CID 85), and its UCUM code.
_SUV = {
    "SUVbw": (codes.DCM.Suvbw, codes.UCUM.StandardizedUptakeValueBodyWeight),
    "SUVlbm": (codes.DCM.Suvlbm, codes.UCUM.StandardizedUptakeValueLeanBodyMassJames),
    "SUVlbm(James128)": (codes.DCM.SuvlbmJames128, codes.UCUM.StandardizedUptakeValueLeanBodyMassJames128Multiplier),
    "SUVlbm(Janma)": (codes.DCM.SuvlbmJanma, codes.UCUM.StandardizedUptakeValueLeanBodyMassJanma),
    "SUVbsa": (codes.DCM.Suvbsa, codes.UCUM.StandardizedUptakeValueBodySurfaceArea),
    "SUVibw": (codes.DCM.Suvibw, codes.UCUM.StandardizedUptakeValueIdealBodyWeight),
}
_UNITS = {
    "kBq/mL": Code("kBq/ml", "UCUM", "kilobecquerel per milliliter"),
    "counts": codes.UCUM.Counts, "counts/s": codes.UCUM.CountsPerSecond,
    "propcounts": codes.UCUM.ProportionalToCounts, "propcounts/s": codes.UCUM.ProportionalToCountsPerSecond,
    "mm": _MILLIMETRE, "ml": Code("ml", "UCUM", "ml"), "%": codes.UCUM.Percent, "1": codes.UCUM.NoUnits,
}


def unit(name: str) -> Code:
    """The UCUM code of a unit as it is shown, of "mm", "ml", "%" or "1"; another name as an annotation."""
    if name in _SUV:
        return _SUV[name][1]
    return _UNITS.get(name) or Code(f"{{{name}}}"[:16], "UCUM", name[:64])


def quantity(display_unit: str) -> Code:
    """What a PET voxel of that display unit measures: an SUV (CID 85), or tomographic activity."""
    return _SUV[display_unit][0] if display_unit in _SUV else codes.DCM.NuclearMedicineTomographicActivity
