"""The part of a report about one result: figures, regions, profiles, gates, checks, uncertainty.

Everything comes from the job's report in the ledger, which stays when the files are purged.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from zipfile import BadZipFile

from pydicom import dcmread
from pydicom.errors import InvalidDicomError

from dicomnode import looks
from dicomnode.ledger import Ledger
from dicomnode.reporting.blocks import Block, Cell, Chart, Facts, Line, Paragraph, Picture, Section, Table, mark, number
from dicomnode.spool import Spool
from dicomnode.wording import PSF_IS, activity, change, figure, gate_words, psf, unit_note, uptake, volume, widths

__all__ = ["checks", "patient", "sections"]

Json = Mapping[str, Any]


def patient(ledger: Ledger, spool: Spool, study: str) -> str:
    """Name and Patient ID from one object of the study; "" where none is left on disk (the ledger has no names)."""
    for row in ledger.query("SELECT path FROM instance WHERE study_uid = ? ORDER BY received_at", (study,)):
        try:
            header = dcmread(spool.absolute(row["path"]), specific_tags=["PatientName", "PatientID"])
        except (OSError, EOFError, InvalidDicomError):
            continue
        name = str(header.get("PatientName", "")).split("=")[0].replace("^", " ").strip()
        number_of = str(header.get("PatientID", "")).strip()
        return ", ".join(filter(None, [name, f"ID {number_of}" if number_of else ""]))
    return ""


def sections(job: Json, row: Json, spool: Spool, heading: str, *, footer: str) -> Iterator[Section]:
    """The parts about the result of one job; none where it has no report yet.

    job      as of dicomnode.views.show; row: the same job's row of the ledger.
    heading, footer  stand in the pictures.
    """
    report = job["report"]
    if not report:
        return
    yield Section("Result", tuple(_result(report)), level=3)
    if job["derived_series"]:
        yield Section("Pictures", tuple(_pictures(report, row, spool, heading, footer)), level=3)
    measures = report.get("looks") or {}
    if "regions" in measures:
        yield Section("Regions of highest uptake", tuple(_regions(measures)), level=3)
        yield Section("Profiles through them", tuple(_profiles(measures)), level=3)
    yield Section("Safeguards", tuple(_safeguards(report)), level=3)


def _pictures(report: Json, row: Json, spool: Spool, heading: str, footer: str) -> Iterator[Block]:
    """What dicomnode.qcpictures draws, but for the regions, which the report has as table and charts."""
    folder = spool.absolute(row["derived_path"]) if row["derived_path"] else None
    if folder is None or not folder.is_dir():
        yield Paragraph("The pictures were removed with the derived files ([retention]); the figures are kept."
                        if row["purged_at"] else "The derived files, and the pictures with them, are not on disk.")
        return
    try:
        seen = looks.load(folder / looks.LOOKS_FILE)
    except FileNotFoundError:
        why = (report.get("looks") or {}).get("problem", "the series was built by a version that made none")
        yield Paragraph(f"There are no pictures: {why}.")
        return
    except (ValueError, OSError, EOFError, KeyError, BadZipFile, zlib.error) as error:
        yield Paragraph(f"The pictures cannot be read: {error}. Remedy: `dicomnode repair --dry-run` looks what else "
                        "is damaged.")
        return
    from dicomnode import qcpictures  # loads matplotlib

    for picture in qcpictures.draw(seen, heading, regions=False, footer=footer):
        rows, columns = picture.rgb.shape[:2]
        yield Picture(picture.title, _alt(picture.name, seen.measures), picture.png(), (columns, rows))


def _alt(name: str, measures: Json) -> str:
    unit = measures["unit"]
    if name == "mips":
        return ("Maximum intensity projections before and after, all on the grey scale from 0 "
                f"to {figure(measures['top'])} {unit}; numbers mark the regions of highest uptake.")
    if name == "kernel":
        return ("The kernel seen along its three axes, and its profiles: full width at half maximum "
                f"{widths(measures['kernel']['fwhm_mm'])}.")
    told = f"Residual: root mean square {figure(measures['residual_rms'])} {unit}."
    spread = measures["uncertainty"]
    return told if spread is None else f"{told} Uncertainty: median {figure(spread['median_percent'])} %."


def _result(report: Json) -> Iterator[Block]:
    metrics, measures = report.get("metrics", {}), report.get("looks") or {}
    yield Facts.of([
        ("Kernel FWHM", _kernel(metrics, measures)),
        ("PSF FWHM", _psf(metrics)),
        ("Change of total activity", activity(metrics.get("activity_change"))),
        ("Residual", _residual(metrics, measures)),
        ("Uncertainty", _uncertainty(measures)),
        ("Region deblurred", _region(report)),
        ("Settings", _settings(report.get("settings", {}))),
    ])


def _kernel(metrics: Json, measures: Json) -> str:
    """FWHM of the kernel that is kept; of a job without looks as its method tells it, where that is the same."""
    if measures.get("kernel", ...) is None:
        return "none: this method has no kernel"
    if "kernel" in measures:
        return f"{widths(measures['kernel']['fwhm_mm'])} (at half maximum, on the PET's voxels)"
    return "" if psf(metrics) else widths([metrics.get(f"kernel_fwhm_{axis}_mm") for axis in "dhw"])


def _psf(metrics: Json) -> str:
    found = psf(metrics)
    return f"{found} ({PSF_IS})" if found else ""


def _uncertainty(measures: Json) -> str:
    spread = measures.get("uncertainty")
    return "" if spread is None else (f"median {figure(spread['median_percent'])} %, 90th percentile "
                                      f"{figure(spread['p90_percent'])} % (standard deviation, where there is uptake)")


def _residual(metrics: Json, measures: Json) -> str:
    if metrics.get("residual") is not None:
        return f"{figure(metrics['residual'], '%')} of the maximum (root mean square, after blurring again)"
    if "residual_rms" not in measures:
        return ""
    return f"{figure(measures['residual_rms'])} {measures['unit']} (source minus {measures['residual_of']})"


def _region(report: Json) -> str:
    settings = report.get("settings", {})
    box = str(settings.get("region_box") or "").removeprefix("box:").replace(",", ", ")
    return ": ".join(filter(None, [str(settings.get("region") or ""),
                                   f"voxels {box} of the source (slice, row, column)" if box else ""]))


def _settings(settings: Json) -> str:
    return ", ".join(f"{name} {_plain(value)}" for name, value in sorted(settings.items())
                     if value not in ("", None) and name not in ("preset", "region", "region_box"))


def _plain(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " × ".join(_plain(item) for item in value)
    return str(value)


def _regions(measures: Json) -> Iterator[Block]:
    """Before, after and change of the maximum, mean and peak of each region."""
    unit = measures["unit"]
    name = "SUV" if unit.startswith("SUV") else ""
    if measures["unit_note"]:
        yield Paragraph(unit_note(unit, measures["unit_note"]))
    if not measures["regions"]:
        yield Paragraph("No region stands out of its surroundings.")
        return
    columns = [("Region", 8.5), ("Centre x, y, z (mm)", 14.0), ("Volume (mL)", 9.5)]
    for kind in ("max", "mean", "peak"):
        columns += [(f"{name}{kind} before", 11.0), ("after", 8.0), ("change", 11.0)]
    yield Table.of(f"Uptake in {unit}", columns, (_one_region(one) for one in measures["regions"]))


def _one_region(one: Json) -> Iterator[Cell]:
    yield Cell(str(one["label"]))
    yield number(", ".join(f"{c:.0f}" for c in one["centre_mm"]))
    yield number(volume(one["volume_ml"]))
    for kind in ("max", "mean", "peak"):
        before, after = one["before"].get(kind), one["after"].get(kind)
        yield number(uptake(before))
        yield number(uptake(after))
        yield number(change(before, after))


def _profiles(measures: Json) -> Iterator[Block]:
    unit = measures["unit"]
    for one in measures["profiles"]:
        title = one["label"]
        tops = max(one["before"]), max(one["after"])
        yield Chart(
            title, f"{title}: the highest value is {figure(tops[0])} {unit} before and {figure(tops[1])} {unit} after",
            "mm from the centre", unit,
            (Line("before", "before", tuple(one["before_mm"]), tuple(one["before"])),
             Line("after", "after", tuple(one["after_mm"]), tuple(one["after"]))))
    if not measures["profiles"]:
        yield Paragraph("No profile: there is no region to draw a line through.")


def _safeguards(report: Json) -> Iterator[Block]:
    gates, check = report.get("gates", []), report.get("check")
    if gates:
        shut = sum(not gate["ok"] for gate in gates)
        yield Table.of(f"Gates: {len(gates) - shut} of {len(gates)} passed",
                       (("Gate", 20), ("What is measured", 40), ("Measured", 14), ("Limit", 14), ("", 12)),
                       (_gate(gate) for gate in sorted(gates, key=lambda gate: bool(gate["ok"]))))
    if check is None:
        yield Paragraph("The written files were not checked: the gates did not let the result pass." if gates else
                        "No safeguard was reached.")
        return
    items = check["items"]
    failed = [item for item in items if not item["ok"]]
    told = (f"Checks of the written files, by other code than wrote them: {len(items) - len(failed)} of {len(items)} "
            "passed")
    yield Paragraph(f"{told}. All of them are listed further below." if not failed else f"{told}. Failed:")
    if failed:
        yield checks(failed)


def checks(items: Sequence[Json]) -> Table:
    """Items of sop.check as a table."""
    return Table.of("Checks of the derived series against its source",
                    (("Check", 22), ("What was found", 66), ("", 12)),
                    ([item["name"], item["message"], _passed(item)] for item in items))


def _gate(gate: Json) -> list[Cell | object]:
    words, measured, limit = gate_words(gate)
    return [gate["name"], words, number(measured), number(limit), _passed(gate)]


def _passed(item: Json) -> Cell:
    return mark("passed", "good") if item["ok"] else mark("failed", "bad")
