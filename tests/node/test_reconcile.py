"""The morning's reconciliation: every study of the night is accounted for, with the reason of whatever is missing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dicomnode import reconcile
from dicomnode.cli.app import app
from dicomnode.memo import set_memo
from dicomnode.query import days_of
from dicomnode.reconcile import Reconciliation, StudyLine, asked_key, problem_key
from dicomnode.sources import Sources, SourceSeries
from tests.factories import ct_series, pet_series
from tests.node.line import Line
from tests.node.source_peer import Site, SourcePeer

PEERS = ('[[peer]]\nname = "ARCHIVE"\nae_title = "ARCHIVE"\nhost = "127.0.0.1"\nport = 1\nquery = true\n'
         'confirm = "commitment"\n')
MORNING = 1578034800.0  # 2020-01-03 07:00 UTC
DAY = date(2020, 1, 3)
PET_UID, STUDY = str(pet_series()[0].SeriesInstanceUID), str(pet_series()[0].StudyInstanceUID)


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    """A node with a source ARCHIVE, on the morning after the studies of tests/factories.py."""
    with Line(tmp_path, toml=PEERS) as line:
        line.now = MORNING - 3600
        yield line


def saw(line: Line, **changes: Any) -> None:
    """The source lists a PET series of 8 images that a route wants, unless `changes` say otherwise."""
    values = {"source": "ARCHIVE", "study_uid": STUDY, "series_uid": PET_UID, "study_date": "20200102",
              "modality": "PT", "accession_number": "A1", "instances": 8, "wanted": True, "reason": "route all-pet"}
    Sources(line.ledger).saw(SourceSeries(**{**values, **changes}), now=line.now, next_at=line.now)


def report(line: Line) -> Reconciliation:
    line.now = MORNING
    return reconcile.report(line.ledger, line.config, day=DAY, now=line.now)


def only_line(line: Line, source: str = "ARCHIVE") -> StudyLine:
    (found,) = [one for one in report(line).sources if one.source == source]
    (study,) = found.studies
    return study


def numbers(study: StudyLine) -> tuple[int, ...]:
    return study.eligible, study.received, study.processed, study.delivered, study.committed


def queue(line: Line) -> int:
    """The PET came and is matched: its job."""
    line.receive(pet_series())
    line.now += 60
    line.matcher().tick()
    (job,) = line.ledger.jobs_of_series(PET_UID)
    return int(job["id"])


def build(line: Line, *, peers: tuple[str, ...] = ("PACS",)) -> int:
    job_id = queue(line)
    with line.ledger.transaction() as db:
        db.execute("UPDATE job SET send_to = ? WHERE id = ?", (json.dumps(peers), job_id))
    line.ledger.claim("w", now=line.now, lease_s=60)
    line.ledger.built(job_id, "w", now=line.now, derived_series_uid="2.25.9", derived_path="derived/1",
                      derived_instances=8, report={})
    line.ledger.set_job(job_id, "sending", now=line.now)
    return job_id


def test_a_study_that_did_not_come_says_so_and_why(line: Line) -> None:
    """Named by its accession number; eligible, nothing else."""
    saw(line, reason="C-MOVE was answered with status 0xA801")
    study = only_line(line)
    assert (study.study, numbers(study)) == ("A1", (1, 0, 0, 0, 0))
    assert study.missing == (f"PT series {PET_UID}: 0 of 8 images are here: C-MOVE was answered with status 0xA801",)


def test_a_study_that_came_in_part_says_how_much(line: Line) -> None:
    """Three of eight; what the matcher says of it is there too."""
    saw(line)
    line.receive(pet_series()[:3])
    line.now += 60
    line.matcher().tick()
    study = only_line(line)
    assert numbers(study) == (1, 0, 0, 0, 0) and "3 of 8 images are here" in study.missing[0]
    assert "NumberOfSlices" in study.missing[0]


def test_a_study_that_waits_for_its_job_is_received(line: Line) -> None:
    """Queued: received, not processed."""
    saw(line)
    job_id = queue(line)
    study = only_line(line)
    assert numbers(study) == (1, 1, 0, 0, 0) and f"job {job_id} is queued" in study.missing[0]


def test_a_held_job_and_a_peer_that_does_not_take_it_are_named(line: Line) -> None:
    """Built, and PACS does not answer."""
    saw(line)
    job_id = build(line)
    (delivery,) = line.ledger.deliveries(job_id)
    line.ledger.set_delivery(delivery["id"], "waiting", now=line.now, reason="peer PACS does not answer")
    study = only_line(line)
    assert numbers(study) == (1, 1, 1, 0, 0)
    assert study.missing[0].endswith("to PACS: peer PACS does not answer")


def test_a_delivered_study_has_nothing_missing(line: Line) -> None:
    """The peer need not commit: complete."""
    saw(line)
    (delivery,) = line.ledger.deliveries(build(line))
    line.ledger.set_delivery(delivery["id"], "delivered", now=line.now)
    study = only_line(line)
    assert numbers(study)[:4] == (1, 1, 1, 1) and study.missing == () and report(line).complete


def test_a_delivered_study_whose_peer_has_not_committed_says_so(line: Line) -> None:
    """confirm = "commitment": delivered is not the end."""
    saw(line)
    (delivery,) = line.ledger.deliveries(build(line, peers=("ARCHIVE",)))
    line.ledger.set_delivery(delivery["id"], "delivered", now=line.now)
    study = only_line(line)
    assert numbers(study) == (1, 1, 1, 1, 0) and "ARCHIVE has not committed" in study.missing[0]


def test_what_the_header_showed_to_be_none_of_ours_is_not_eligible(line: Line) -> None:
    """C-FIND could not tell that it is derived; once here it is ignored, and nothing is missing."""
    saw(line)
    line.receive(pet_series(ImageType=["DERIVED", "PRIMARY"]))
    line.now += 60
    line.matcher().tick()
    assert [one.studies for one in report(line).sources] == [()]


def test_what_no_route_wants_is_not_listed(line: Line) -> None:
    """Seen at the source, not wanted."""
    saw(line, wanted=False)
    assert report(line).totals()["eligible"] == 0 and report(line).complete


def test_what_came_by_itself_stands_under_its_sender(line: Line) -> None:
    """No source listed it: the AE title that sent it; named by its UID without an accession number."""
    queue(line)
    study = only_line(line, "SCANNER")
    assert (study.study, numbers(study)) == (STUDY, (1, 1, 0, 0, 0))


def test_a_ct_that_cannot_be_fetched_is_named(line: Line) -> None:
    """The PET is here; its CT is missing."""
    saw(line)
    queue(line)
    saw(line, modality="CT", series_uid="1.2.9", instances=40, reason="lost on tape")
    assert any("CT series 1.2.9: 0 of 40" in why and "lost on tape" in why for why in only_line(line).missing)


def test_a_source_that_could_not_be_asked_makes_the_report_incomplete(line: Line) -> None:
    """Without a single study; the text says so too."""
    set_memo(line.ledger, problem_key("ARCHIVE"), "ARCHIVE does not answer")
    set_memo(line.ledger, asked_key("ARCHIVE"), "0")
    found = report(line)
    assert not found.complete and found.sources[0].asked_at == "1970-01-01T00:00:00Z"
    assert "could not be asked: ARCHIVE does not answer" in found.text()


def test_older_days_are_left_out_but_for_what_is_still_missing(line: Line) -> None:
    """Seen four days ago: the one that came is history, the one that failed is not."""
    line.now = MORNING - 4 * 86400
    saw(line, study_date="20191230", series_uid="1.2.8", study_uid="1.2", accession_number="OLD")
    line.receive(pet_series())
    saw(line, study_date="20191230")
    found = [study.study for source in report(line).sources for study in source.studies]
    assert found == ["OLD"]


def test_text_and_json_tell_the_same(line: Line) -> None:
    """Totals, studies and reasons."""
    saw(line)
    saw(line, study_uid="1.2", series_uid="1.2.8", accession_number="BÄR-2")
    found = report(line)
    value = json.loads(json.dumps(found.as_json()))
    assert value["totals"] == {"eligible": 2, "received": 0, "processed": 0, "delivered": 0, "committed": 0}
    assert [study["study"] for study in value["sources"][0]["studies"]] == ["BÄR-2", "A1"]
    assert "BÄR-2: 1 eligible, 0 received" in found.text()


def test_reports_are_written_whole_and_old_ones_go(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text and JSON of the day; older than 90 days removed; a failure half-way leaves the report of before."""
    folder = line.spool.data_dir / "reports"
    folder.mkdir()
    for day in ("2019-10-04", "2019-10-05"):
        (folder / f"{day}.json").write_text("{}")
    saw(line)
    path = reconcile.write(report(line), line.spool.data_dir)
    assert path.read_text() == report(line).text()
    assert sorted(one.name for one in folder.iterdir()) == ["2019-10-05.json", "2020-01-03.json", "2020-01-03.txt"]

    def full(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    saw(line, reason="other")
    with pytest.raises(OSError, match="disk full"):
        reconcile.write(report(line), line.spool.data_dir)
    assert json.loads((folder / "2020-01-03.json").read_text())["day"] == "2020-01-03"
    assert "other" not in path.read_text()


def test_the_report_of_a_night_is_written_by_the_round(tmp_path: Path) -> None:
    """An hour before the digest: not at the first start, then once a day."""
    with SourcePeer([*pet_series(), *ct_series()]) as source, \
            Site(tmp_path, source.port, schedule='timezone = "Europe/Berlin"') as site:
        source.destination = ("127.0.0.1", site.port)
        nightly = site.nightly()
        nightly._report()
        nightly.serve(site.peer)
        assert not (site.spool.data_dir / "reports").exists()
        site.now = MORNING - 2 * 3600 - 60  # 05:59 in Berlin
        nightly._report()
        assert not (site.spool.data_dir / "reports").exists()
        site.now += 60
        nightly._report()
        value = json.loads((site.spool.data_dir / "reports" / "2020-01-03.json").read_text())
        assert value["totals"]["eligible"] == 1 and value["sources"][0]["source"] == "PACS"


# --- the commands


def run(config: Path, *arguments: str) -> Any:
    return CliRunner().invoke(app, [*arguments, "--config", str(config)])


def test_find_fetch_and_reconcile_from_the_command_line(tmp_path: Path) -> None:
    """The study is found, fetched by its accession number, and accounted for; errors have sentences and codes."""
    datasets = pet_series(AccessionNumber="A7")
    with SourcePeer(datasets) as source, Site(tmp_path, source.port, retrieve="c-get") as site:
        config = tmp_path / "node.toml"
        config.write_text(f'[node]\ndata_dir = "{site.spool.data_dir}"\n[reception]\nlow_disk_mb = 1\n[[peer]]\n'
                          f'name = "PACS"\nae_title = "PACS"\nhost = "127.0.0.1"\nport = {source.port}\nquery = true\n'
                          'retrieve = "c-get"\n')
        (study,) = json.loads(run(config, "find", "PACS", "--date", "2020-01-02", "--json").stdout)
        assert (study["accession_number"], study["study_date"]) == ("A7", "20200102")
        listed = run(config, "find", "PACS", "--study", "A7").stdout
        assert PET_UID in listed and "8 images" in listed
        assert "lists no study of 2020-01-03" in run(config, "find", "PACS", "--date", "2020-01-03").stdout
        fetched = json.loads(run(config, "fetch", "PACS", "A7", "--json").stdout)
        assert (fetched["sent"], fetched["here"]) == (8, 8)
        assert "8 images of it are here" in run(config, "fetch", "PACS", PET_UID).stdout
        unknown = run(config, "fetch", "PACS", "B8")
        assert unknown.exit_code == 2 and "holds no study 'B8'" in unknown.stderr
        told = json.loads(run(config, "reconcile", "--json").stdout)
        assert told["sources"][0]["source"] == "PACS"
        source.stop()
        assert run(config, "find", "PACS").exit_code == 4


@pytest.mark.parametrize(("words", "days"), [
    ("today", (DAY, DAY)), ("yesterday", (date(2020, 1, 2), date(2020, 1, 2))), ("2020-01-01", (date(2020, 1, 1),) * 2),
    ("2020-01-01..2020-01-02", (date(2020, 1, 1), date(2020, 1, 2))), ("yesterday..today", (date(2020, 1, 2), DAY))])
def test_days_as_people_name_them(words: str, days: tuple[date, date]) -> None:
    """One day or a range."""
    assert days_of(words, today=DAY) == days


@pytest.mark.parametrize("words", ["", "tomorrow", "2020-13-01", "2020-01-02..2020-01-01"])
def test_what_is_no_day_is_refused(words: str) -> None:
    """With a sentence."""
    from dicomnode.errors import RefusedInput
    with pytest.raises(RefusedInput):
        days_of(words, today=DAY)
