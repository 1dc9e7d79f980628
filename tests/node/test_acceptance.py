"""`dicomnode check --peers`, the acceptance test of an installation: each thing that can be wrong is named."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from distributed import LocalCluster
from pydicom import dcmread
from pydicom.dataset import Dataset
from pynetdicom import AE, StoragePresentationContexts, build_context, build_role, evt
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    PositronEmissionTomographyImageStorage,
    StorageCommitmentPushModel,
    StorageCommitmentPushModelInstance,
    StudyRootQueryRetrieveInformationModelFind,
    Verification,
)
from typer.testing import CliRunner

from dicomnode import acceptance
from dicomnode.acceptance import committing, here, phantom
from dicomnode.acceptance.finding import Finding
from dicomnode.cli import app
from dicomnode.config import parse
from dicomnode.eligibility import eligible
from dicomnode.ledger import Ledger
from dicomnode.matcher import Matcher
from tests.node.line import Line
from tests.peers import ReceiverProcess, free_port

NOW = 1_800_000_000.0


class Archive:
    """A destination in this process: stores, answers C-FIND at image and study level, commits.

    status: of C-STORE.  lists: whether C-FIND finds what was stored.  commits: "here" (same association), "there"
    (an association of its own to `node_port`), "no" (refuses), "never" (takes the request and is silent), "lost"
    (reports that it does not keep it).
    """

    def __init__(self, *, status: int = 0, lists: bool = True, commits: str = "there", node_port: int = 0) -> None:
        self.port, self.node_port = free_port(), node_port
        self.status, self.lists, self.commits = status, lists, commits
        self.stored: list[Dataset] = []
        self._server: Any = None

    def __enter__(self) -> Archive:
        ae = AE("PACS")
        ae.supported_contexts = [*StoragePresentationContexts, build_context(Verification),
                                 build_context(PositronEmissionTomographyImageStorage),
                                 build_context(StudyRootQueryRetrieveInformationModelFind)]
        if self.commits != "no":
            ae.add_supported_context(StorageCommitmentPushModel)
        self._server = ae.start_server(("127.0.0.1", self.port), block=False, evt_handlers=[
            (evt.EVT_C_STORE, self._store), (evt.EVT_C_FIND, self._find), (evt.EVT_N_ACTION, self._action)])
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()

    def _store(self, event: evt.Event) -> int:
        self.stored.append(event.dataset)
        return self.status

    def _find(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        for ds in self.stored if self.lists else ():
            answer = Dataset()
            answer.QueryRetrieveLevel = event.identifier.QueryRetrieveLevel
            answer.StudyInstanceUID, answer.SOPInstanceUID = ds.StudyInstanceUID, ds.SOPInstanceUID
            yield 0xFF00, answer

    def _action(self, event: evt.Event) -> tuple[int, None]:
        if self.commits != "never":
            threading.Thread(target=self._report, args=(event.assoc, event.action_information), daemon=True).start()
        return 0x0000, None

    def _report(self, association: Any, asked: Dataset) -> None:
        report = Dataset()
        report.TransactionUID = asked.TransactionUID
        kept = "FailedSOPSequence" if self.commits == "lost" else "ReferencedSOPSequence"
        setattr(report, kept, asked.ReferencedSOPSequence)
        if self.commits == "lost":
            report.FailedSOPSequence[0].FailureReason = 0x0112
        if self.commits != "there":
            association.send_n_event_report(report, 2 if self.commits == "lost" else 1, StorageCommitmentPushModel,
                                            StorageCommitmentPushModelInstance)
            return
        own = AE("PACS").associate("127.0.0.1", self.node_port, [build_context(StorageCommitmentPushModel)],
                                   ae_title="NBDNODE",
                                   ext_neg=[build_role(StorageCommitmentPushModel, scp_role=True)])
        if own.is_established:
            own.send_n_event_report(report, 1, StorageCommitmentPushModel, StorageCommitmentPushModelInstance)
            own.release()


def config_file(folder: Path, archive: Archive, *, peer: str = "", toml: str = "", port: int = 0) -> Path:
    path = folder / "node.toml"
    data = folder / "data"
    data.mkdir(mode=0o700, exist_ok=True)
    path.write_text(f'[node]\nport = {port or free_port()}\ndata_dir = "{data}"\n[reception]\nlow_disk_mb = 1\n'
                    '[delivery]\nconnect_timeout_s = 2\ndimse_timeout_s = 5\n'
                    f'{toml}\n[[peer]]\nname = "PACS"\nae_title = "PACS"\nhost = "127.0.0.1"\n'
                    f'port = {archive.port}\n{peer}\n'
                    '[[route]]\nname = "pet"\nwhen = { Modality = "PT" }\nmethod = "cubic"\npreset = "default"\n'
                    'send_to = ["PACS"]\n')
    return path


def found(path: Path, *, with_peers: bool = True) -> dict[str, Finding]:
    every = acceptance.check(path, now=NOW, with_peers=with_peers)
    return {finding.what: finding for finding in every}


# --- the peers


def test_without_peers_nothing_is_stored_anywhere(tmp_path):
    """The plain check asks for C-ECHO alone; it may be run at any time."""
    with Archive() as archive:
        result = found(config_file(tmp_path, archive, peer='confirm = "find"\nquery = true'), with_peers=False)
        assert archive.stored == [] and result["peer PACS"].verdict == "ok"
    assert not {what for what in result if what.startswith(("store", "confirmation", "query"))}


def test_the_phantom_is_stored_found_and_the_source_queried(tmp_path):
    """One instance, which says in every name that it is no patient; the same one at every test."""
    with Archive() as archive:
        path = config_file(tmp_path, archive, peer='confirm = "find"\nquery = true')
        result, again = found(path), found(path)
    assert [result[what].verdict for what in ("store at PACS", "confirmation of PACS", "query of PACS")] == ["ok"] * 3
    assert again["store at PACS"].verdict == "ok"
    first, second = archive.stored
    assert first == second and first.PatientName == "ACCEPTANCE^PHANTOM" and first.Modality == "PT"
    assert "ACCEPTANCE" in first.SeriesDescription and len(first.PixelData) < 1000


def test_a_node_that_gets_the_phantom_back_ignores_it(tmp_path):
    """By auto-routing, for instance: no series is held for it and nothing is processed."""
    with Archive() as archive, Line(tmp_path / "line") as line:
        made = phantom.write(tmp_path, parse(config_file(tmp_path, archive).read_text()))
        ds = dcmread(made.path)
        assert eligible(ds, own_output=False).kind == "ignored"
        uid = line.receive([ds])
        line.now += 3600
        Matcher(line.config, line.ledger, line.spool, clock=line.clock).tick()
        assert line.state(uid)[0] == "ignored"


@pytest.mark.parametrize(("status", "verdict"), [(0xA700, "problem"), (0xB000, "warning"), (0x0111, "ok")])
def test_what_a_destination_answers_is_judged(tmp_path, status, verdict):
    """A refusal is a problem, a warning is told, an instance that is there already is fine."""
    with Archive(status=status) as archive:
        result = found(config_file(tmp_path, archive))["store at PACS"]
    assert result.verdict == verdict and (verdict != "problem" or ("0xA700" in result.text and result.remedy))


def test_a_destination_that_does_not_list_what_it_stored_is_a_problem(tmp_path, monkeypatch):
    """confirm = "find" would never come true."""
    monkeypatch.setattr("dicomnode.acceptance.peers.LOOK_S", 0.01)
    with Archive(lists=False) as archive:
        result = found(config_file(tmp_path, archive, peer='confirm = "find"'))["confirmation of PACS"]
    assert result.verdict == "problem" and "does not find" in result.text


def test_the_exit_code_is_that_of_an_unreachable_peer(tmp_path):
    """4, and the table as JSON names what failed."""
    path = config_file(tmp_path, Archive())
    result = CliRunner().invoke(app, ["check", "--peers", "--json", "--config", str(path)])
    rows = {row["what"]: row for row in json.loads(result.stdout)}
    assert result.exit_code == 4 and rows["peer PACS"]["verdict"] == rows["store at PACS"]["verdict"] == "problem"


# --- storage commitment


@pytest.mark.parametrize("commits", ["here", "there"])
def test_commitment_of_the_phantom_by_either_way(tmp_path, commits):
    """On our association, or on one of the peer's: the test listens where the node would."""
    port = free_port()
    with Archive(commits=commits, node_port=port) as archive:
        result = found(config_file(tmp_path, archive, peer='confirm = "commitment"', port=port))["confirmation of PACS"]
    way = "our association" if commits == "here" else "an association of its own"
    assert result.verdict == "ok" and way in result.text


@pytest.mark.parametrize(("commits", "verdict", "text"), [
    ("no", "problem", "Storage Commitment"), ("never", "warning", "has not reported"), ("lost", "problem", "not keep")])
def test_commitment_that_fails_is_told_with_its_remedy(tmp_path, monkeypatch, commits, verdict, text):
    """Not offered, not answered, or answered by no."""
    monkeypatch.setattr(committing, "REPORT_S", 0.5)
    with Archive(commits=commits) as archive:
        result = found(config_file(tmp_path, archive, peer='confirm = "commitment"'))["confirmation of PACS"]
    assert result.verdict == verdict and text in result.text + result.remedy
    assert result.remedy or "Remedy" in result.text


def test_a_report_to_the_running_node_proves_the_way(tmp_path):
    """The node has the port: it refuses the report of a transaction that it does not know, and records that."""
    peers = '[[peer]]\nname = "PACS"\nae_title = "PACS"\nhost = "127.0.0.1"\n'
    with Archive(commits="there") as archive:
        peers += f'port = {archive.port}\nconfirm = "commitment"\n'
        route = ('[[route]]\nname = "pet"\nwhen = { Modality = "PT" }\nmethod = "cubic"\npreset = "default"\n'
                 'send_to = ["PACS"]\n')
        with ReceiverProcess(tmp_path, peers=peers + route) as receiver:
            archive.node_port = receiver.port
            result = found(receiver.config_path)
    assert result["confirmation of PACS"].verdict == "ok" and "node, which runs" in result["confirmation of PACS"].text


# --- this machine


def test_whoever_may_read_what_is_private_is_named(tmp_path):
    """Data directory and addresses of alerts open to others: problems, each with the chmod that mends it."""
    urls = tmp_path / "alerts"
    urls.write_text("json://127.0.0.1\n")
    urls.chmod(0o644)
    with Archive() as archive:
        path = config_file(tmp_path, archive, toml=f'[alerts]\nurls_file = "{urls}"')
        (tmp_path / "data").chmod(0o755)
        result = found(path, with_peers=False)
        assert result["permissions"].verdict == "problem" and "chmod 700" in result["permissions"].remedy
        assert result["alerts.urls_file"].verdict == "problem" and "chmod" in result["alerts.urls_file"].text
        (tmp_path / "data").chmod(0o700)
        urls.chmod(0o600)
        result = found(path, with_peers=False)
    assert result["alerts.urls_file"].verdict == "ok" and "permissions" not in result


@pytest.mark.parametrize(("days", "verdict"), [(100, "ok"), (20, "warning"), (3, "problem"), (-3, "problem")])
def test_a_certificate_that_ends_soon_is_told(tmp_path, days, verdict):
    """A month before as a warning, a week before as a problem."""
    certificate = tmp_path / "ca.pem"
    certificate.write_bytes(self_signed(days))
    with Archive() as archive:
        result = found(config_file(tmp_path, archive, toml=f'[tls]\nca = "{certificate}"'), with_peers=False)["tls.ca"]
    assert result.verdict == verdict


def self_signed(days: float) -> bytes:
    """A certificate that ends `days` after NOW, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "node")])
    end = datetime.fromtimestamp(NOW, UTC) + timedelta(days=days)
    return (x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
            .serial_number(1).not_valid_before(end - timedelta(days=400)).not_valid_after(end)
            .sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))


def test_a_zone_that_is_not_the_machines_is_told_where_times_of_day_are_used(tmp_path, monkeypatch):
    """A window of 20:00 to 06:00 in UTC, on a machine in Apia, is seldom meant."""
    monkeypatch.setenv("TZ", "Pacific/Apia")
    time.tzset()
    try:
        with Archive() as archive:
            plain = found(config_file(tmp_path, archive), with_peers=False)["time zone"]
            windows = config_file(tmp_path, archive, toml='[schedule]\nwindows = ["20:00-06:00"]')
            used = found(windows, with_peers=False)["time zone"]
    finally:
        monkeypatch.delenv("TZ")
        time.tzset()
    assert (plain.verdict, used.verdict) == ("ok", "warning") and "schedule.timezone" in used.remedy


def test_a_cluster_that_is_not_there_and_an_extra_that_is_missing_are_problems(tmp_path, monkeypatch):
    """work.executor = "dask"."""
    monkeypatch.setattr("dicomnode.acceptance.cluster.CONNECT_S", 0.5)
    toml = f'[work]\nexecutor = "dask"\ndask_scheduler = "tcp://127.0.0.1:{free_port()}"'
    with Archive() as archive:
        path = config_file(tmp_path, archive, toml=toml)
        result = found(path, with_peers=False)
        assert result["cluster"].verdict == "problem" and "does not answer" in result["cluster"].text
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        monkeypatch.setitem(sys.modules, "distributed", None)
        result = found(path, with_peers=False)
    assert result["package distributed"].verdict == "problem" and "cluster" not in result


def test_a_cluster_without_a_fitting_worker_is_told_from_one_with_it(tmp_path):
    """A real scheduler whose worker offers CPU; jobs that ask for a GPU would wait for ever."""
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, protocol="tcp", dashboard_address=None,
                      resources={"CPU": 1}, silence_logs=50) as cluster, Archive() as archive:
        toml = f'[work]\nexecutor = "dask"\ndask_scheduler = "{cluster.scheduler_address}"\ndevice = '
        result = {device: found(config_file(tmp_path, archive, toml=f'{toml}"{device}"'), with_peers=False)["cluster"]
                  for device in ("cpu", "cuda")}
    assert (result["cpu"].verdict, result["cuda"].verdict) == ("ok", "problem")
    assert "GPU=1" in result["cuda"].remedy


class FakeTorch:
    """As much of torch as the check asks of it, with one CUDA device that adds as told."""

    __version__ = "2"

    def __init__(self, total: float | None) -> None:
        self.total, self.cuda = total, self

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def ones(self, *_: object, device: str) -> FakeTorch:
        if self.total is None:
            raise RuntimeError("CUDA error: unspecified launch failure\nlong story")
        return self

    def sum(self) -> float:
        return float(self.total or 0)

    def mem_get_info(self, index: int) -> tuple[int, int]:
        return 80_000_000_000, 80_000_000_000

    def get_device_name(self, index: int) -> str:
        return "a GPU"


@pytest.mark.parametrize(("wanted", "total", "verdict", "text"), [
    ("cuda:0", 1000.0, "ok", "a GPU"), ("auto", 1000.0, "ok", "80 GB free"), ("cuda:1", 1000.0, "problem", "sees 1"),
    ("cuda:0", None, "problem", "launch failure"), ("cuda:0", 999.0, "problem", "999"), ("cpu", None, "ok", "CPU")])
def test_a_device_is_asked_to_compute(tmp_path, monkeypatch, wanted, total, verdict, text):
    """One that is there and fails, or adds wrongly, is a problem before the first study."""
    fake = FakeTorch(total)
    fake.get_num_threads = lambda: 4  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", fake)
    config = parse(f'[work]\ndevice = "{wanted}"')
    (finding,) = here.devices(config)
    assert finding.verdict == verdict and text in finding.text and "long story" not in finding.text


def test_the_check_leaves_the_ledger_as_it_is(tmp_path):
    """It looks; it decides nothing."""
    with Archive() as archive:
        path = config_file(tmp_path, archive)
        with Ledger(tmp_path / "data" / "ledger.sqlite3") as ledger:
            before = ledger.counts()
            found(path)
            assert ledger.counts() == before and ledger.events() == []
