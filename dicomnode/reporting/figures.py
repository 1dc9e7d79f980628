"""The part of a report about one result: figures, regions, profiles, gates, checks, uncertainty.

Everything comes from the job's report in the ledger, which stays when the files are purged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydicom import dcmread
from pydicom.errors import InvalidDicomError

from dicomnode.ledger import Ledger
from dicomnode.reporting.blocks import Block, Cell, Chart, Facts, Line, Paragraph, Section, Table, mark, number
from dicomnode.reporting.words import AXES, GATES, figure, percent
from dicomnode.spool import Spool

__all__ = ["checks", "patient", "sections"]

Json = Mapping[str, Any]


def patient(ledger: Ledger, spool: Spool, study: str) -> str:
    """Name and Patient ID from one object of the study; "" where none is left on disk (the ledger has no names)."""
    for row in ledger.query("SELECT path FROM instance WHERE study_uid = ? ORDER BY received_at", (study,)):
        try:
            header = dcmread(spool.absolute(row["path"]), specific_tags=["PatientName", "PatientID"])
        except (FileNotFoundError, InvalidDicomError):
            continue
        name = str(header.get("PatientName", "")).split("=")[0].replace("^", " ").strip()
        number_of = str(header.get("PatientID", "")).strip()
        return ", ".join(filter(None, [name, f"ID {number_of}" if number_of else ""]))
    return ""


def sections(job: Json, row: Json, spool: Spool) -> Iterator[Section]:
    """The parts about the result of one job; none where it has no report yet.

    job   as of dicomnode.views.show; row: the same job's row of the ledger.
    """
    report = job["report"]
    if not report:
        return
    yield Section("Result", tuple(_result(report)), level=3)
    looks = report.get("looks")
    if looks:
        yield Section("Regions of highest uptake", tuple(_regions(looks)), level=3)
        yield Section("Profiles", tuple(_profiles(looks)), level=3)
    yield Section("Safeguards", tuple(_safeguards(report)), level=3)


def _result(report: Json) -> Iterator[Block]:
    metrics, looks = report.get("metrics", {}), report.get("looks") or {}
    yield Facts.of([
        ("Kernel FWHM", _kernel(report, looks)),
        ("Known to", _spread(metrics)),
        ("Change of total activity", percent(metrics.get("activity_change"), 3)),
        ("Residual", f"{figure(metrics.get('residual'), '%')} of the maximum, after blurring again"),
        ("Median uncertainty", _uncertainty(looks)),
        ("Region deblurred", _region(report)),
        ("Settings", _settings(report.get("settings", {}))),
    ])


def _kernel(report: Json, looks: Json) -> str:
    """Along slice, row and column, mm."""
    metrics, kernel = report.get("metrics", {}), looks.get("kernel") or {}
    widths = [metrics.get(f"kernel_fwhm_{axis}_mm") for axis in "dhw"]
    if None in widths:
        widths = list(kernel.get("fwhm_mm") or [])
    if not widths:
        return "none: this method has no kernel"
    return ", ".join(f"{width:.2f} mm {axis}" for width, axis in zip(widths, AXES, strict=True))


def _spread(metrics: Json) -> str:
    spreads = [metrics.get(f"psf_log_sd_{axis}") for axis in "dhw"]
    return ", ".join(f"± {100 * spread:.1f} % {axis}" for spread, axis in zip(spreads, AXES, strict=True)
                     if spread is not None)


def _uncertainty(looks: Json) -> str:
    median = (looks.get("uncertainty") or {}).get("median_percent")
    return "" if median is None else f"{figure(median)} % (one standard deviation, where there is uptake)"


def _region(report: Json) -> str:
    settings = report.get("settings", {})
    return " ".join(filter(None, [str(settings.get("region", "")), str(settings.get("region_box", ""))]))


def _settings(settings: Json) -> str:
    return ", ".join(f"{name} {_plain(value)}" for name, value in sorted(settings.items())
                     if value not in ("", None) and name not in ("preset", "region", "region_box"))


def _plain(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " × ".join(_plain(item) for item in value)
    return str(value)


def _regions(looks: Json) -> Iterator[Block]:
    """Before, after and change of the maximum, mean and peak of each region."""
    unit = looks["unit"]
    name = "SUV" if unit.startswith("SUV") else ""
    if not looks["regions"]:
        yield Paragraph("No region stands out of its surroundings.")
        return
    columns = [("Region", 8.0), ("Centre x, y, z (mm)", 18.0), ("Volume (mL)", 10.0)]
    for kind in ("max", "mean", "peak"):
        columns += [(f"{name}{kind} before", 11.0), ("after", 9.0), ("change", 10.0)]
    yield Table.of(f"Uptake in {unit}", columns, (_one_region(one) for one in looks["regions"]))


def _one_region(one: Json) -> Iterator[Cell]:
    yield Cell(str(one["label"]))
    yield number(", ".join(f"{c:.0f}" for c in one["centre_mm"]))
    yield number(figure(one["volume_ml"]))
    for kind in ("max", "mean", "peak"):
        before, after = one["before"].get(kind), one["after"].get(kind)
        yield number(figure(before))
        yield number(figure(after))
        yield number(percent(after / before - 1.0 if before and after is not None else None))


def _profiles(looks: Json) -> Iterator[Block]:
    unit = looks["unit"]
    for one in looks["profiles"]:
        title = f"Profile {one['label']}, {one['axis']}"
        tops = max(one["before"]), max(one["after"])
        yield Chart(
            title, f"{title}: the highest value is {figure(tops[0])} {unit} before and {figure(tops[1])} {unit} after",
            "mm", unit,
            (Line("before", "before", tuple(one["before_mm"]), tuple(one["before"])),
             Line("after", "after", tuple(one["after_mm"]), tuple(one["after"]))))
    if not looks["profiles"]:
        yield Paragraph("No profile: there is no region to draw a line through.")


def _safeguards(report: Json) -> Iterator[Block]:
    gates, check = report.get("gates", []), report.get("check")
    if gates:
        shut = sum(not gate["ok"] for gate in gates)
        yield Table.of(f"Gates: {len(gates) - shut} of {len(gates)} passed",
                       (("Gate", 20), ("What is measured", 40), ("Measured", 14), ("Limit", 14), ("", 12)),
                       (_gate(gate) for gate in gates))
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
    meaning, unit = GATES.get(gate["name"], ("", ""))
    return [gate["name"], meaning, number(figure(gate["measured"], unit)), number(figure(gate["limit"], unit)),
            _passed(gate)]


def _passed(item: Json) -> Cell:
    return mark("passed", "good") if item["ok"] else mark("failed", "bad")
