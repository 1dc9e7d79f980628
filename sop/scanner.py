"""What decides the PSF of a PET series besides the patient: scanner, reconstruction, voxel size and radionuclide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace

from pydicom.dataset import Dataset

from sop.errors import Refused
from sop.header import items, numbers, private_text, text, texts

__all__ = ["ScannerKey", "nuclide", "scanner_key"]

GE_CREATOR, GE_GROUP = "GEMS_PETD_01", 0x0009
GE_ITERATIONS, GE_SUBSETS = 0xB2, 0xB3
HALF_LIFE_TOLERANCE = 0.02

# PS3.16 CID 4020: SNOMED CT and SRT codes; half-lives in s where a series names no code (Nucleide-LARA).
NUCLIDES: Mapping[str, tuple[tuple[str, ...], float]] = {
    "F-18": (("77004003", "C-111A1"), 6586.2),
    "Ga-68": (("35337001", "C-131A3"), 4057.7),
    "C-11": (("40565003", "C-105A1"), 1220.8),
    "N-13": (("21576001", "C-107A1"), 597.9),
    "O-15": (("129504001", "C-B1038"), 122.2),
    "Rb-82": (("79197006", "C-159A2"), 76.4),
    "Cu-64": (("3932008", "C-127A2"), 45723.0),
    "Zr-89": (("63360001", "C-168A4"), 282240.0),
    "I-124": (("40937006", "C-114A5"), 360806.0),
}


@dataclass(frozen=True)
class ScannerKey:
    """What series that share a PSF have in common; "" where the header does not say.

    manufacturer, model   Manufacturer and ManufacturerModelName, in capitals, runs of blanks as one.
    device                DeviceSerialNumber, else StationName.
    reconstruction        ReconstructionMethod; Siemens and Philips write iterations and subsets into it.
    kernel                ConvolutionKernel: the filter after (or in) the reconstruction.
    iterations, subsets   NumberOfIterations and NumberOfSubsets, or GE's private elements.
    spacing               "slice x row x column" in mm, two decimals.
    radionuclide          "F-18"; the code or half-life that was written where it is none of the usual ones.
    """

    manufacturer: str = ""
    model: str = ""
    device: str = ""
    reconstruction: str = ""
    kernel: str = ""
    iterations: str = ""
    subsets: str = ""
    spacing: str = ""
    radionuclide: str = ""

    @property
    def missing(self) -> tuple[str, ...]:
        """What a key needs and this one lacks: without them it would match the series of other scanners."""
        return tuple(name for name in ("model", "reconstruction", "spacing", "radionuclide")
                     if not getattr(self, name))

    def __str__(self) -> str:
        """For people: "GE MEDICAL SYSTEMS DISCOVERY ST, OSEM, 3.27 x 4.69 x 4.69 mm, F-18"."""
        rounds = f"{self.iterations} iterations {self.subsets} subsets" if self.iterations or self.subsets else ""
        method = f"{self.reconstruction} {self.kernel}".strip()
        parts = (f"{self.manufacturer} {self.model}".strip(), self.device, method, rounds,
                 f"{self.spacing} mm" if self.spacing else "", self.radionuclide)
        return ", ".join(part for part in parts if part) or "unknown scanner"

    def as_dict(self) -> dict[str, str]:
        return asdict(self)

    def with_values(self, values: Mapping[str, str]) -> ScannerKey:
        """This key with some parts replaced by what a person says. Raises ValueError for an unknown part."""
        known = {field.name for field in fields(self)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"a scanner key has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        named = {name.upper(): name for name in NUCLIDES}
        tidy = {name: _tidy(value) for name, value in values.items()}
        if "radionuclide" in tidy:
            tidy["radionuclide"] = named.get(tidy["radionuclide"], tidy["radionuclide"])
        return replace(self, **tidy)


def scanner_key(header: Dataset) -> ScannerKey:
    """The key of one PET image's header. What is absent or damaged is "": `missing` tells."""
    return ScannerKey(
        manufacturer=_text(header, "Manufacturer"),
        model=_text(header, "ManufacturerModelName"),
        device=_text(header, "DeviceSerialNumber") or _text(header, "StationName"),
        reconstruction=_text(header, "ReconstructionMethod"),
        kernel=_many(header, "ConvolutionKernel"),
        iterations=_text(header, "NumberOfIterations") or _ge(header, GE_ITERATIONS),
        subsets=_text(header, "NumberOfSubsets") or _ge(header, GE_SUBSETS),
        spacing=_spacing(header),
        radionuclide=nuclide(header),
    )


def nuclide(header: Dataset) -> str:
    """The radionuclide: by RadionuclideCodeSequence, else by RadionuclideHalfLife; "" where neither is there."""
    try:
        tracers = items(header, "RadiopharmaceuticalInformationSequence")
        codes = [code for tracer in tracers for code in items(tracer, "RadionuclideCodeSequence")]
    except Refused:
        return ""
    for code in codes:
        value = _text(code, "CodeValue")
        if value:
            return next((name for name, (known, _) in NUCLIDES.items() if value in known), value)
    for tracer in tracers:
        try:
            half_life = numbers(tracer, "RadionuclideHalfLife", 1)[0]
        except Refused:
            continue
        if half_life > 0:
            return next((name for name, (_, s) in NUCLIDES.items() if abs(half_life / s - 1) < HALF_LIFE_TOLERANCE),
                        f"T1/2 {half_life:.4g} s")
    return ""


def _tidy(value: str) -> str:
    return " ".join(value.replace("\0", " ").split()).upper() if not value.startswith("T1/2") else value


def _text(header: Dataset, keyword: str) -> str:
    try:
        return _tidy(text(header, keyword))
    except Refused:
        return ""


def _many(header: Dataset, keyword: str) -> str:
    try:
        return _tidy("\\".join(texts(header, keyword)))
    except Refused:
        return ""


def _ge(header: Dataset, element: int) -> str:
    """A whole number of GE's private block; "" where it is not there or is bytes of an unknown VR."""
    try:
        value = private_text(header, GE_GROUP, GE_CREATOR, element)
    except Refused:
        return ""
    return value if value.isdecimal() else ""


def _spacing(header: Dataset) -> str:
    try:
        rows, columns = numbers(header, "PixelSpacing", 2)
        thickness = numbers(header, "SliceThickness", 1)[0]
    except Refused:
        return ""
    return f"{thickness:.2f} x {rows:.2f} x {columns:.2f}"
