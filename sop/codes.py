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


def unit(name: str) -> Code:
    """The UCUM code of "SUVbw", "kBq/mL", "counts", "mm", "ml", "%" or "1"; another name as an annotation."""
    known = {
        "SUVbw": codes.UCUM.StandardizedUptakeValueBodyWeight,
        "kBq/mL": Code("kBq/ml", "UCUM", "kilobecquerel per milliliter"),
        "counts": codes.UCUM.Counts, "mm": _MILLIMETRE, "ml": Code("ml", "UCUM", "ml"), "%": codes.UCUM.Percent,
        "1": codes.UCUM.NoUnits,
    }
    return known.get(name) or Code(f"{{{name}}}"[:16], "UCUM", name[:64])


def quantity(display_unit: str) -> Code:
    """What a PET voxel of that display unit measures: SUVbw (CID 85), or tomographic activity."""
    if display_unit == "SUVbw":
        return codes.DCM.Suvbw
    return codes.DCM.NuclearMedicineTomographicActivity
