"""What a stored value measures: Units (0054,1001) of PET [PS3.3 C.8.9.1.1.3] and its UCUM code; Philips counts.

Philips scanners write Units CNTS and, in the private block "Philips PET Private Group" of group 7053, two factors for
the rescaled value: xx09 gives Bq/ml, xx00 gives SUVbw in g/ml. A factor of zero is unusable.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from pydicom.dataset import Dataset

from sop.errors import Refused
from sop.header import private_text, text

__all__ = ["UCUM", "Scale", "philips_factor", "pet_scale"]

PHILIPS_CREATOR = "Philips PET Private Group"
PHILIPS_SUV, PHILIPS_BQML = 0x00, 0x09

UCUM = {
    "BQML": "Bq/ml",
    "CM2ML": "cm2/ml{SUVbsa}",
    "CNTS": "{counts}",
    "CPS": "{counts}/s",
    "PROPCNTS": "{propcounts}",
    "PROPCPS": "{propcounts}/s",
}
# SUVType (0054,1006) says which SUV Units GML is; body weight where it is absent [C.8.9.1].
SUV_UCUM = {
    "": "g/ml{SUVbw}",
    "BW": "g/ml{SUVbw}",
    "LBM": "g/ml{SUVlbm}",
    "LBMJAMES128": "g/ml{SUVlbm(James128)}",
    "LBMJANMA": "g/ml{SUVlbm(Janma)}",
    "IBW": "g/ml{SUVibw}",
    "BSA": "cm2/ml{SUVbsa}",
}


@dataclass(frozen=True)
class Scale:
    """`unit` of the Volume, `source_units` as in the header, and `factors` from rescaled to Volume value, per slice."""

    unit: str
    source_units: str
    factors: tuple[float, ...]


def philips_factor(header: Dataset, element: int) -> float | None:
    """A factor of the Philips private block; None if absent or unusable."""
    try:
        factor = float(private_text(header, 0x7053, PHILIPS_CREATOR, element))
    except ValueError:
        return None
    return factor if math.isfinite(factor) and factor > 0 else None


def pet_scale(headers: Iterable[Dataset], *, assume_units: str | None = None) -> Scale:
    """Units of a PET series and the factor of each slice.

    assume_units   a Units code used only where the series states none.

    Raises Refused "units-missing", "units-differ", "units-unsupported".
    """
    headers = list(headers)
    stated = {text(header, "Units").upper() for header in headers}
    if len(stated) > 1:
        raise Refused("units-differ", f"slices state different Units: {', '.join(sorted(stated))}",
                      "send one reconstruction per series")
    units = stated.pop() or (assume_units or "").strip().upper()
    if not units:
        raise Refused("units-missing", "Units (0054,1001) is missing, so the values mean nothing",
                      "send the original series, or name the unit when working offline (--assume-units BQML)")
    ones = (1.0,) * len(headers)
    if units == "CNTS":
        for element, unit in ((PHILIPS_BQML, "Bq/ml"), (PHILIPS_SUV, "g/ml{SUVbw}")):
            factors = [philips_factor(header, element) for header in headers]
            usable = tuple(factor for factor in factors if factor is not None)
            if len(usable) == len(headers):
                return Scale(unit, units, usable)
    if units == "GML":
        kind = text(headers[0], "SUVType").upper()
        if kind not in SUV_UCUM:
            raise Refused("units-unsupported", f"SUVType {kind!r} is not one of {', '.join(filter(None, SUV_UCUM))}",
                          "send the series in BQML")
        return Scale(SUV_UCUM[kind], units, ones)
    if units not in UCUM:
        raise Refused("units-unsupported", f"Units {units!r} is not an activity, a count or an SUV",
                      "send the reconstructed PET in BQML, not a parametric map")
    return Scale(UCUM[units], units, ones)
