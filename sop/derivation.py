"""Derivation: how a derived PET series was made, in the words it carries into DICOM; and recognising our own output."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydicom.dataset import Dataset

__all__ = ["EQUIPMENT_NAME", "GENERIC_ROOT", "Derivation", "is_own_output"]

EQUIPMENT_NAME = "dicomnode"
GENERIC_ROOT = "2.25"  # PS3.5 B.2: UIDs made from UUIDs, for sites without a root of their own
_UID_ROOT = re.compile(r"[0-2](\.(0|[1-9][0-9]*))+")
_LONGEST_ROOT = 39  # leaves 24 decimal digits, 79 bits: two series meeting by chance stays out of the question


@dataclass(frozen=True)
class Derivation:
    """What was done to the source image, and how the derived series is to be named.

    method, preset, settings, software_version, guide_series_uid decide the image and so, with the source SOP Instance
    UIDs, the UIDs; `settings` must be plain JSON values and is kept as such.

    kernel_fwhm_mm        FWHM of the estimated or given kernel, mm, along slice, row and column direction.
    region_box            "box:d0-d1,h0-h1,w0-w1", source voxels (slices, rows, columns; half-open), where these alone
                          were deblurred and the rest interpolated; "" for the whole volume.
    guide_series_uid      SeriesInstanceUID of the CT that guided the method.
    uid_root              "2.25" or the site's own root, at most 39 characters.
    series_description    template; "{source}" stands for the source's SeriesDescription. A preview says so in any case,
                          and another method's name takes the place of NBD.
    series_number_offset  added to the source's SeriesNumber; counted on past `taken_series_numbers`, the numbers of the
                          study's OTHER series (not of an earlier delivery of this same derived series, or a repeat
                          would get another number under the same UIDs).
    research_use          whether ImageComments opens with "Research use, not for diagnosis".
    institution, station  InstitutionName and StationName of the node, for ContributingEquipmentSequence; "" leaves out.

    Raises ValueError for settings that are not JSON, a root that is no UID root, and an empty description.
    """

    method: str
    preset: str
    settings: Mapping[str, Any]
    software_version: str
    kernel_fwhm_mm: tuple[float, float, float] | None = None
    region_box: str = ""
    guide_series_uid: str | None = None
    uid_root: str = GENERIC_ROOT
    series_description: str = "NBD deblurred"
    series_number_offset: int = 1000
    taken_series_numbers: frozenset[int] = field(default_factory=frozenset)
    research_use: bool = True
    institution: str = ""
    station: str = ""

    def __post_init__(self) -> None:
        try:
            plain = json.loads(json.dumps(dict(self.settings), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"settings must be plain JSON values, so that they can be repeated: {error}") from error
        object.__setattr__(self, "settings", plain)
        object.__setattr__(self, "taken_series_numbers", frozenset(self.taken_series_numbers))
        if not _UID_ROOT.fullmatch(self.uid_root) or len(self.uid_root) > _LONGEST_ROOT:
            raise ValueError(f"uid_root {self.uid_root!r} is not a UID root of at most {_LONGEST_ROOT} characters")
        try:
            sample = self.series_description.format(source="")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"series_description {self.series_description!r}: only {{source}} is known") from error
        if not sample.strip() or "\\" in sample:
            raise ValueError(f"series_description {self.series_description!r} must say more than the source's")

    @property
    def is_preview(self) -> bool:
        """Whether the preset is the quick look, which every viewer must be able to tell."""
        return self.preset == "preview"

    def canonical(self) -> str:
        """Everything that decides the image, as one canonical JSON text: the same recipe gives the same bytes."""
        recipe = {
            "method": self.method,
            "preset": self.preset,
            "settings": self.settings,
            "software_version": self.software_version,
            "guide_series_uid": self.guide_series_uid,
        }
        return json.dumps(recipe, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def is_own_output(ds: Dataset, uid_root: str = GENERIC_ROOT) -> bool:
    """Whether this instance was made by a dicomnode: then it must not be processed again (derived-PET rule 38).

    Told by ContributingEquipmentSequence, purpose 109102 DCM, with our name (PS3.3 C.12.1.1.5), and by the site's own
    root in SeriesInstanceUID; the generic root 2.25 is anybody's and tells nothing.
    """
    for item in ds.get("ContributingEquipmentSequence") or ():
        purposes = item.get("PurposeOfReferenceCodeSequence") or ()
        codes = {(code.get("CodeValue"), code.get("CodingSchemeDesignator")) for code in purposes}
        names = (str(item.get("Manufacturer", "")), str(item.get("ManufacturerModelName", "")))
        if ("109102", "DCM") in codes and EQUIPMENT_NAME in (name.strip().lower() for name in names):
            return True
    return uid_root != GENERIC_ROOT and str(ds.get("SeriesInstanceUID", "")).startswith(uid_root + ".")
