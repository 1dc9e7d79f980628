"""What goes out beside a derived series: made with it, sent with it, gone with it, and never in its way."""

from __future__ import annotations

import io
import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pynetdicom import AE, evt
from pynetdicom.sop_class import PositronEmissionTomographyImageStorage  # type: ignore[attr-defined]
from rich.console import Console

from dicomnode import commitment, companions, operate, views
from dicomnode.cli.tables import print_study
from dicomnode.executor import RECIPE, REPORT_FILE, Executor
from dicomnode.ledger import Ledger
from dicomnode.proof import Prover
from dicomnode.query import Asking
from dicomnode.rebuild import _is_whole
from dicomnode.repair import repair
from dicomnode.retention import Purger
from dicomnode.runner import ChildRunner
from dicomnode.services.catalogue import Catalogue
from dicomnode.services.findscp import read_query
from sop.derivation import is_own_output
from tests.dciodvfy import entity_errors, iod_errors
from tests.node.companion_jobs import ALL, ROUTE, built, made, source
from tests.node.line import PET_ROUTE, Line, full_settings_here
from tests.node.spoolpeers import identifier
from tests.node.test_commitment import PET, Archive
from tests.node.test_delivery import FAST, deliver, states
from tests.node.test_executor import PRELUDE, attempt, queued
from tests.node.test_pipeline import run
from tests.peers import StoragePeer


@pytest.fixture
def peer() -> Iterator[StoragePeer]:
    with StoragePeer() as peer:
        yield peer


class PetOnly:
    """A peer that negotiates PET alone."""

    def __init__(self) -> None:
        self.stored: list[str] = []
        ae = AE("PACS")
        ae.add_supported_context(PositronEmissionTomographyImageStorage)
        self._server: Any = ae.start_server(("127.0.0.1", 0), block=False,
                                            evt_handlers=[(evt.EVT_C_STORE, self._store)])
        self.port = int(self._server.socket.getsockname()[1])

    def _store(self, event: evt.Event) -> int:
        self.stored.append(str(event.request.AffectedSOPInstanceUID))
        return 0x0000

    def __enter__(self) -> PetOnly:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()


def objects() -> list[Path]:
    return sorted((made()[0] / companions.ALSO_FOLDER).glob("*.dcm"))


# --- making them


def test_all_that_the_route_wants_lies_beside_the_derived_series(tmp_path: Path) -> None:
    """Report with its mapping, kernel and pictures, each a series of its own, told in the report, without a fault."""
    folder, report = made()
    also = report["also"]
    assert (also["wanted"], also["left_out"]) == (list(ALL), {})
    assert [(one["kind"], one["of"], one["modality"]) for one in also["series"]] == [
        ("mapping", "report", "RWV"), ("report", "report", "SR"), ("kernel", "kernel", "OT"),
        ("pictures", "pictures", "OT")]
    assert companions.whole(folder, report) and len(objects()) == companions.instances(also["series"])
    for one in also["series"]:
        assert one["instances"] == len(one["files"])
        ds = dcmread(folder / companions.ALSO_FOLDER / next(iter(one["files"])))
        assert (ds.SeriesInstanceUID, ds.SeriesNumber, ds.Modality) == (
            one["series_uid"], one["series_number"], one["modality"])
        assert is_own_output(ds) and ds.StudyInstanceUID == report["source"]["study_uid"]
    assert not [error for path in objects() for error in iod_errors(path, all_of_them=True)]
    assert not entity_errors([*objects(), *folder.glob("*.dcm")], tmp_path)


def test_the_derived_series_is_the_same_with_and_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one byte of the PET depends on what is made beside it, nor does the identity of the job."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    options = {"method": "nearest", "preset": "default"}
    plain = run(tmp_path / "a", source(), **options)
    more = run(tmp_path / "b", source(), **options, also=("report",))
    assert [path.read_bytes() for path in plain.derived.files] == [path.read_bytes() for path in more.derived.files]
    assert "also" not in plain.report
    assert [one["kind"] for one in more.report["also"]["series"]] == ["mapping", "report"]
    identities = []
    for name, route in (("c", PET_ROUTE), ("d", ROUTE)):
        with Line(tmp_path / name, route=route) as line:
            uid = line.receive(source())
            line.now += 31
            line.matcher().tick()
            identities += [job["identity"] for job in line.ledger.jobs_of_series(uid)]
    assert len(identities) == 2 and len(set(identities)) == 1


def test_what_cannot_be_made_is_left_out_whole_and_the_rest_is_there(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault half-way through the report: neither it nor its mapping; the PET, the check and the others stand."""
    def broken(*_: object) -> list[tuple[str, list[bytes]]]:
        raise MemoryError("no room for this picture")

    def half(*_: object) -> Iterator[tuple[str, list[bytes]]]:
        yield "mapping", [b"half"]
        raise ZeroDivisionError("half-way")

    monkeypatch.setitem(companions.MAKERS, "pictures", broken)
    monkeypatch.setitem(companions.MAKERS, "report", half)
    outcome = run(tmp_path, source(), method="nearest", preset="default", also=ALL)
    also = outcome.report["also"]
    assert also["series"] == [] and also["left_out"] == {
        "report": "ZeroDivisionError: half-way", "pictures": "MemoryError: no room for this picture",
        "kernel": "nearest has no kernel"}
    assert len(list((tmp_path / "out").glob("*.dcm"))) == 24 and outcome.report["check"]["ok"]
    assert not (tmp_path / "out" / "also").exists() and not (tmp_path / "out" / "also.tmp").exists()


def test_without_figures_there_is_no_report_but_the_kernel_is_there(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """looks.npz could not be made: what rests on it says so."""
    monkeypatch.setattr("dicomnode.pipeline.make_looks", lambda *_: 1 / 0)
    outcome = run(tmp_path, source(), also=ALL)
    assert [one["kind"] for one in outcome.report["also"]["series"]] == ["kernel"]
    assert set(outcome.report["also"]["left_out"]) == {"report", "pictures"}


def test_a_disk_that_is_full_costs_the_companions_and_not_the_series(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They cannot be put in their place: none is told, none lies there."""
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dicomnode.companions.os.replace", full)
    outcome = run(tmp_path, source(), method="nearest", preset="default", also=("report",))
    assert outcome.report["also"]["series"] == [] and "No space" in outcome.report["also"]["left_out"]["report"]
    assert not list((tmp_path / "out").glob("also*"))


def test_the_executor_orders_what_the_route_wants_and_tells_what_was_left_out(tmp_path: Path) -> None:
    """The order has `also`; what could not be made stands in the history, and the job is built all the same."""
    program = """
wanted = json.loads(order.read_text())["also"]
folder = order.parent / "derived.tmp"
(folder / "also").mkdir(parents=True)
for name in ("0.dcm", "1.dcm", "also/kernel-1.dcm"):
    (folder / name).write_bytes(b"derived")
import hashlib
digest = hashlib.sha256(b"derived").hexdigest()
series = [{"kind": "kernel", "of": "kernel", "series_uid": "2.25.9", "series_number": 9, "description": "d",
           "modality": "OT", "instances": 1, "files": {"kernel-1.dcm": digest}}]
say(kind="built", report={"derived_series_uid": "2.25.77", "derived_instances": 2,
    "also": {"wanted": wanted, "series": series, "left_out": {"report": "ZeroDivisionError: x"}}})
"""
    with Line(tmp_path, route=ROUTE) as line:
        job_id = queued(line)
        executor = Executor(line.config, line.ledger, line.spool, clock=line.clock, full_settings=full_settings_here,
                            runner=ChildRunner(command=_python(program)))
        job = attempt(line, executor)
        assert (job["state"], job["report"]["also"]["wanted"]) == ("built", list(ALL))
        (event,) = [event for event in line.ledger.events() if event["code"] == "companion"]
        assert "report could not be made" in event["reason"] and event["job_id"] == job_id
        shown = views.show(line.ledger, job["study_uid"])["series"][0]["jobs"][0]["also"]
        assert shown["instances"] == 1 and shown["left_out"] == {"report": "ZeroDivisionError: x"}
        folder = line.spool.absolute(job["derived_path"])
        assert _is_whole(folder, 2, job["report"])
        (folder / "also" / "kernel-1.dcm").write_bytes(b"other")
        assert not _is_whole(folder, 2, job["report"]), "a changed companion makes the folder damaged"


def _python(program: str) -> tuple[str, ...]:
    return (sys.executable, "-I", "-c", PRELUDE + program)


def test_a_companion_that_differs_from_what_was_sent_is_noticed() -> None:
    """Computed again, other bytes under the same UIDs: as for the series itself it does not go out unasked."""
    _, report = made()
    other = json.loads(json.dumps(report))
    name = next(iter(other["also"]["series"][0]["files"]))
    other["also"]["series"][0]["files"][name] = "0" * 64
    assert companions.changed(report, other) and not companions.changed(report, report)
    assert not companions.changed({}, report) and not companions.changed(report, {})


# --- delivering them


def test_a_job_is_delivered_when_its_companions_are_too(tmp_path: Path, peer: StoragePeer) -> None:
    """PET first, then what is beside it; all of it stored once; the counts tell them apart."""
    with Line(tmp_path, port=peer.port, toml=FAST, route=ROUTE) as line:
        job_id = built(line)
        deliver(line)
        assert states(line, job_id) == ("delivered", ["delivered"])
        job = views.show(line.ledger, line.ledger.job(job_id)["study_uid"])["series"][0]["jobs"][0]
        assert job["derived_instances"] == 24 and job["also"]["instances"] == len(objects())
        assert job["deliveries"][0]["accepted"] == 24 + len(objects()) == len(peer.datasets)
        assert [ds.Modality for ds in peer.datasets[:24]] == ["PT"] * 24
        sent = {str(ds.SOPInstanceUID): ds for ds in peer.datasets}
        for path in objects():
            ours = dcmread(path)
            assert sent[str(ours.SOPInstanceUID)] == ours


def test_a_companion_that_is_missing_on_disk_holds_the_job_before_anything_is_sent(
        tmp_path: Path, peer: StoragePeer) -> None:
    """Like a lost file of the derived series: never send a part, `retry` computes again."""
    with Line(tmp_path, port=peer.port, toml=FAST, route=ROUTE) as line:
        job_id = built(line)
        (line.spool.data_dir / "derived" / str(job_id) / "also" / "kernel-1.dcm").unlink()
        deliver(line)
        job = line.ledger.job(job_id)
        assert (job["state"], job["code"], peer.datasets) == ("held", "derived-lost", [])
        total = 24 + len(objects())
        assert f"{total - 1} of {total} derived instances are left" in job["reason"]


@pytest.mark.parametrize("lost", [False, True])
def test_retry_after_a_companion_was_lost_computes_again_and_takes_no_folder_that_is_not_whole(
        tmp_path: Path, lost: bool) -> None:
    """An attempt finds what an earlier one left: whole, it is entered as it lies; without a companion, made anew."""
    with Line(tmp_path, route=ROUTE) as line:
        job_id = built(line)
        if lost:
            (line.spool.data_dir / "derived" / str(job_id) / "also" / "report-1.dcm").unlink()
        with line.ledger.transaction() as db:
            db.execute("UPDATE job SET state = 'queued', derived_path = NULL, derived_instances = NULL, inputs = '[]'")
        executor = Executor(line.config, line.ledger, line.spool, clock=line.clock, full_settings=full_settings_here,
                            runner=ChildRunner(command=_python("build()")))
        job = attempt(line, executor)
        assert (job["state"], job["derived_instances"]) == ("built", 2 if lost else 24)


def test_a_peer_that_takes_only_pet_gets_the_pet_and_the_reason_names_the_rest(tmp_path: Path) -> None:
    """Its answers to the PET count; the delivery waits, then is dead with what it does not take and what to do."""
    with PetOnly() as peer, Line(tmp_path, port=peer.port, toml=FAST, route=ROUTE) as line:
        job_id = built(line)
        deliver(line)
        (row,) = line.ledger.deliveries(job_id)
        assert len(peer.stored) == 24 and (row["state"], row["attempts"]) == ("waiting", 1)
        for name in ("Comprehensive 3D SR Storage", "Parametric Map Storage", "Real World Value Mapping Storage",
                     "Secondary Capture Image Storage"):
            assert name in row["reason"]
        assert "take them out of `also` of the route" in row["reason"]
        for _ in range(4):
            line.now = line.ledger.deliveries(job_id)[0]["next_at"]
            deliver(line)
        assert states(line, job_id) == ("held", ["dead"]) and len(peer.stored) == 24, "the PET is not sent again"
        assert "Parametric Map Storage" in line.ledger.job(job_id)["reason"]


def test_taking_the_companions_out_of_the_route_lets_such_a_job_end(tmp_path: Path) -> None:
    """A person changes `also` and says retry: delivered with the PET alone; the peer is not asked for what is gone."""
    with PetOnly() as peer, Line(tmp_path, port=peer.port, toml=FAST, route=ROUTE) as line:
        job_id = built(line)
        for _ in range(5):
            deliver(line)
            line.now = line.ledger.deliveries(job_id)[0]["next_at"]
        assert states(line, job_id) == ("held", ["dead"])
        (tmp_path / "other").mkdir()
        with Line(tmp_path / "other", port=peer.port, toml=FAST) as changed:
            line.config = line.config.model_copy(update={"route": changed.config.route})
        operate.retry(line.ledger, f"job:{job_id}", now=line.now, actor="test")
        deliver(line)
        assert states(line, job_id) == ("delivered", ["delivered"]) and len(peer.stored) == 24
        (row,) = line.ledger.deliveries(job_id)
        assert len(line.ledger.statuses(row["id"])) == 24
        assert sorted(commitment.uncommitted(line.ledger, row["id"])) == sorted(peer.stored)
        told = io.StringIO()
        print_study(Console(file=told, width=300), views.show(line.ledger, line.ledger.job(job_id)["study_uid"]))
        assert "24 of 24 objects accepted" in told.getvalue(), "what is no longer to be sent is not counted"


def test_storage_commitment_covers_the_companions(tmp_path: Path) -> None:
    """Asked for by their own SOP classes; committed only when the peer has named them too."""
    found = {str(ds.SOPInstanceUID): str(ds.SOPClassUID) for ds in map(dcmread, objects())}
    verdicts = {next(iter(found)): 0x0112}
    stores = [PET, *sorted(set(found.values()))]
    with Archive(verdict=lambda uid: verdicts.get(uid, 0), stores=stores) as archive:
        peer = '[[peer]]\nname = "ARCHIVE"\nae_title = "ARCHIVE"\nhost = "127.0.0.1"\nconfirm = "commitment"\n'
        with Line(tmp_path, toml=f"{FAST}{peer}port = {archive.port}\n", route=ROUTE) as line:
            job_id = built(line, send_to=("ARCHIVE",))
            deliver(line)
            assert states(line, job_id) == ("delivered", ["delivered"])
            _prove(line)
            assert states(line, job_id)[1] == ["delivered"], "one companion is not committed"
            for item in archive.requests[0].ReferencedSOPSequence:
                assert found.get(item.ReferencedSOPInstanceUID, PET) == item.ReferencedSOPClassUID
            assert found.keys() <= {item.ReferencedSOPInstanceUID for item in archive.requests[0].ReferencedSOPSequence}
            verdicts.clear()
            for _ in range(3):  # sent again, that one alone, and asked for again
                line.now += 60
                _prove(line)
                deliver(line)
            assert states(line, job_id) == ("committed", ["committed"])
            assert len(archive.stored) == 24 + len(found) + 1


def test_a_count_at_the_peer_asks_for_the_companion_series_too(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """confirm = "find": each series of the job is listed."""
    asked, listed = [], Asking.instances

    def instances(self: Asking, study_uid: str, series_uid: str) -> list[str]:
        asked.append(series_uid)
        return listed(self, study_uid, series_uid)

    monkeypatch.setattr(Asking, "instances", instances)
    with Archive(stores=[PET, *{str(dcmread(path).SOPClassUID) for path in objects()}]) as archive:
        peer = '[[peer]]\nname = "ARCHIVE"\nae_title = "ARCHIVE"\nhost = "127.0.0.1"\nconfirm = "find"\nquery = true\n'
        with Line(tmp_path, toml=f"{FAST}{peer}port = {archive.port}\n", route=ROUTE) as line:
            job_id = built(line, send_to=("ARCHIVE",))
            deliver(line)
            _prove(line)
            assert states(line, job_id) == ("committed", ["committed"])
            total = 24 + len(objects())
            assert f"{total} of {total} instances" in line.ledger.deliveries(job_id)[0]["reason"]
            also = made()[1]["also"]["series"]
            assert asked == [made()[1]["derived_series_uid"], *(one["series_uid"] for one in also)]


def _prove(line: Line) -> None:
    prover = Prover(line.config, line.ledger, line.spool, clock=line.clock, rng=random.Random(0), stay_s=2)
    prover.tick()
    prover.lanes.join(30)


# --- asking for them, getting rid of them, getting them back


def test_query_and_retrieval_know_the_companion_series(tmp_path: Path) -> None:
    """C-FIND lists them with their headers; a series or an instance of them is handed out, and nothing else."""
    with Line(tmp_path, route=ROUTE) as line:
        job_id = built(line)
        catalogue = Catalogue(line.spool, line.ledger)
        study = line.ledger.job(job_id)["study_uid"]
        found = {one.series_uid: one for one in catalogue.series(study_uids=[study])}
        also = made()[1]["also"]["series"]
        assert {one["series_uid"] for one in also} <= set(found) and len(found) == 2 + len(also)
        query = read_query(identifier("SERIES", StudyInstanceUID=study, SeriesInstanceUID="", Modality="",
                                      SeriesDescription="", NumberOfSeriesRelatedInstances=""), patient_root=False)
        told = {entity("SeriesInstanceUID")[0]: (entity("Modality")[0], entity("SeriesDescription")[0],
                                                 entity("NumberOfSeriesRelatedInstances")[0])
                for entity in catalogue.find(query)}
        for one in also:
            assert told[one["series_uid"]] == (one["modality"], one["description"], str(one["instances"]))
            (series,) = catalogue.series(series_uids=[one["series_uid"]])
            names = {stored.path.name for stored in catalogue.objects(series)}
            assert names == set(one["files"])
        get = read_query(identifier("STUDY", StudyInstanceUID=study), patient_root=False, retrieve=True)
        assert len(catalogue.objects_of(get)) == len(source()) + 24 + len(objects())


def test_they_go_with_the_derived_series(tmp_path: Path, peer: StoragePeer) -> None:
    """[retention]: one folder, and the bytes that went count all of it."""
    toml = FAST + "[retention]\nderived_days = 1\n"
    with Line(tmp_path, port=peer.port, toml=toml, route=ROUTE) as line:
        job_id = built(line)
        deliver(line)
        folder = line.spool.absolute(line.ledger.job(job_id)["derived_path"])
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        line.now += 3 * 86400
        Purger(line.config, line.ledger, line.spool, clock=line.clock).tick()
        line.now += 3 * 86400
        assert Purger(line.config, line.ledger, line.spool, clock=line.clock).tick() or not folder.exists()
        assert not folder.exists()
        (event,) = [event for event in line.ledger.events() if event["code"] == "purged" and event["job_id"] == job_id]
        assert f"{size / 2**20:.1f} MiB" in event["reason"]
        assert len(Catalogue(line.spool, line.ledger).series()) == 1


def test_they_are_ignored_when_they_come_back(tmp_path: Path) -> None:
    """Auto-routing returns them: our own output, never processed, and their numbers are not taken ones."""
    with Line(tmp_path) as line:
        series = {line.receive([dcmread(path)]) for path in objects()}
        line.now += 31
        line.matcher().tick()
        assert {line.state(uid) for uid in series} == {("ignored", "own-output")} and len(series) == 4


@pytest.mark.parametrize("flipped", [False, True])
def test_a_lost_ledger_brings_the_job_back_with_its_companions_or_makes_it_again(
        tmp_path: Path, peer: StoragePeer, flipped: bool) -> None:
    """`repair`: from the report of the derived folder. One companion with a flipped bit, and nothing of it is sent."""
    with Line(tmp_path, port=peer.port, toml=FAST, route=ROUTE) as line:
        job_id = built(line)
        job, folder = line.ledger.job(job_id), line.spool.data_dir / "derived" / str(job_id)
        told = json.loads((folder / REPORT_FILE).read_text())
        (folder / REPORT_FILE).write_text(json.dumps({**told, "job": {key: job[key] for key in RECIPE}}))
        if flipped:
            path = folder / "also" / "kernel-1.dcm"
            content = bytearray(path.read_bytes())
            content[-100] ^= 1
            path.write_bytes(content)
        line.ledger.close()
        for path in line.spool.data_dir.glob("ledger.sqlite3*"):
            path.unlink()
        repair(line.spool.data_dir, now=line.now)
        line.ledger = Ledger(line.spool.ledger_path)
        assert line.ledger.job(job_id)["state"] == ("queued" if flipped else "sending")
        deliver(line)
        assert len(peer.datasets) == (0 if flipped else 24 + len(objects()))


@pytest.mark.parametrize("damage", [('"identity"', '"identitx"'), ('"files"', '"filer"'), ('"series"', '"serieq"'),
                                    ('"also": {', '"also": [{}], "x": {'), ("{", "[1, {")])
def test_a_report_that_was_damaged_stops_neither_the_worker_nor_a_repair(
        tmp_path: Path, damage: tuple[str, str]) -> None:
    """What an earlier attempt left and cannot be understood is made anew."""
    with Line(tmp_path, route=ROUTE) as line:
        job_id = built(line)
        path = line.spool.data_dir / "derived" / str(job_id) / REPORT_FILE
        text = path.read_text().replace(*damage, 1) + ("]" if damage[1].startswith("[") else "")
        path.write_text(text)
        report = json.loads(text)
        assert not isinstance(report, dict) or not companions.whole(path.parent, report) or "identity" not in report
        with line.ledger.transaction() as db:
            db.execute("UPDATE job SET state = 'queued', derived_path = NULL, derived_instances = NULL, inputs = '[]'")
        executor = Executor(line.config, line.ledger, line.spool, clock=line.clock, full_settings=full_settings_here,
                            runner=ChildRunner(command=_python("build()")))
        job = attempt(line, executor)
        assert (job["state"], job["derived_instances"]) == ("built", 2)


@pytest.mark.slow
def test_the_node_makes_and_delivers_them_and_a_repeat_gives_the_same_bytes(tmp_path: Path, peer: StoragePeer) -> None:
    """Matched, built by a child process, delivered; built once more in another: pictures too are the same files."""
    route = ROUTE.replace('"nearest"', '"tv"').replace('"default"', '"quick"') + 'guide = "never"\n'
    with Line(tmp_path, port=peer.port, toml=FAST, route=route) as line:
        line.receive(source())
        line.now += 31
        line.matcher().tick()
        found = []
        for _ in range(2):
            executor = Executor(line.config, line.ledger, line.spool, device="cpu", clock=line.clock)
            job = attempt(line, executor)
            assert job["state"] == "built", job["reason"]
            folder = line.spool.absolute(job["derived_path"])
            found.append({path.name: path.read_bytes() for path in folder.rglob("*.dcm")})
            if len(found) == 1:
                shutil.rmtree(folder)
                line.ledger.set_job(job["id"], "queued", now=line.now)
                line.now += 5000
        assert found[0] == found[1] and job["report"]["also"]["left_out"] == {}
        deliver(line)
        assert states(line, job["id"]) == ("delivered", ["delivered"])
        assert len(peer.datasets) == len(found[0]) == 24 + companions.instances(job["report"]["also"]["series"])
