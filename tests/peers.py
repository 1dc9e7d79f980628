"""The ends of associations, on free loopback ports: our receiver as a process, DCMTK, Orthanc, a storage peer."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Self

from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import UID
from pynetdicom import AE, AllStoragePresentationContexts, build_context, evt
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from dicomnode.config import Config, parse
from dicomnode.ledger import Ledger

# DCMTK waits 40 ms an instance for Nagle's algorithm otherwise.
DCMTK_ENV = {**os.environ, "TCP_NODELAY": "1"}
REPOSITORY = Path(__file__).resolve().parents[1]
_RECEIVE = """
import signal, sys, threading
from pathlib import Path
from dicomnode.config import load
from dicomnode.receive import run
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
run(load(Path(sys.argv[1])), stop=stop, ready=lambda: print("ready", flush=True))
"""


def free_port() -> int:
    """A port nobody listens on at this moment."""
    with contextlib.closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_until(what: str, condition: Callable[[], Any], *, timeout_s: float = 30.0) -> Any:
    """The first true value of `condition`; fails the test, naming `what`, where none comes in time."""
    until = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < until, f"waited {timeout_s} s in vain for: {what}"
        time.sleep(0.05)
    return value


class ReceiverProcess:
    """The receiving process alone, as the node runs it. `peers` and `reception` are TOML; SCANNER may send."""

    ae_title = "NBDNODE"
    command: tuple[str, ...] = ("-c", _RECEIVE)
    PEERS = '[[peer]]\nname = "SCANNER"\nae_title = "SCANNER"\nhost = "127.0.0.1"\n'

    def __init__(self, folder: Path, *, peers: str = PEERS, reception: str = "low_disk_mb = 1", node: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.port = folder, free_port()
        self.data_dir = folder / "data"
        self.config_path = folder / "node.toml"
        self.config_path.write_text(
            f'[node]\nae_title = "{self.ae_title}"\nhost = "127.0.0.1"\nport = {self.port}\n'
            f'data_dir = "{self.data_dir}"\n{node}\n[reception]\n{reception}\n{peers}', encoding="utf-8")
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def config(self) -> Config:
        return parse(self.config_path.read_text(encoding="utf-8"))

    def start(self) -> None:
        """Returns once it accepts associations."""
        with (self.folder / "node.log").open("a") as log:
            self.process = subprocess.Popen([sys.executable, *self.command, str(self.config_path)], cwd=REPOSITORY,
                                            stdout=subprocess.PIPE, stderr=log, text=True,
                                            env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.strip() == "ready", f"it said {line!r}; its log:\n{self.log()[-3000:]}"

    def stop(self, *, timeout_s: float = 20.0) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            if self.process.stdout is not None:
                self.process.stdout.close()

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def log(self) -> str:
        return (self.folder / "node.log").read_text(encoding="utf-8", errors="replace")

    def memory_mb(self) -> float:
        """Resident memory."""
        assert self.process is not None
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 1024
        raise AssertionError("the receiver is gone")

    def ledger(self) -> Ledger:
        """A Ledger on the receiver's file; close it."""
        return Ledger(self.data_dir / "ledger.sqlite3")


class ReceiveCommand(ReceiverProcess):
    """The same by its command, as systemd starts it: `dicomnode receive`."""

    command = ("-m", "dicomnode", "receive", "--config")


def storescu(port: int, files: Sequence[Path], *, calling: str = "SCANNER", called: str = "NBDNODE",
             options: Sequence[str] = ("-R",), timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    """DCMTK's storescu, one association; `-R`: propose only the contexts that the files need."""
    return subprocess.run(
        ["/usr/bin/storescu", "-v", *options, "-aet", calling, "-aec", called, "127.0.0.1", str(port),
         *map(str, files)],
        capture_output=True, text=True, env=DCMTK_ENV, timeout=timeout_s)


def echoscu(port: int, *, calling: str = "SCANNER", called: str = "NBDNODE") -> subprocess.CompletedProcess[str]:
    """DCMTK's echoscu."""
    return subprocess.run(["/usr/bin/echoscu", "-v", "-aet", calling, "-aec", called, "127.0.0.1", str(port)],
                          capture_output=True, text=True, env=DCMTK_ENV, timeout=30)


def associate(port: int, contexts: Sequence[tuple[str, Sequence[str]]], *, calling: str = "SCANNER",
              called: str = "NBDNODE", source: str = "127.0.0.1") -> Association:
    """A pynetdicom association offering (SOP Class UID, transfer syntax UIDs); see `.is_established`."""
    ae = AE(calling)
    ae.maximum_pdu_size = 131072
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 30
    requested = [build_context(uid, list(syntaxes)) for uid, syntaxes in contexts]
    for _ in range(5):
        association = ae.associate("127.0.0.1", port, requested, ae_title=called, bind_address=(source, 0))
        # pynetdicom's requestor takes a rejection for an abort when the answer is there before it looks at its socket.
        if not association.is_aborted:
            break
    return association


def encoded(dataset: Dataset) -> bytes:
    """The data set as it travels, in the transfer syntax of its file meta information."""
    buffer = DicomBytesIO()
    syntax = dataset.file_meta.TransferSyntaxUID
    buffer.is_implicit_VR, buffer.is_little_endian = syntax.is_implicit_VR, syntax.is_little_endian
    write_dataset(buffer, dataset)
    return bytes(buffer.getvalue())


def store_encoded(assoc: Association, sop_class_uid: str, sop_instance_uid: str, data_set: bytes) -> Any:
    """C-STORE of these very bytes, fit or unfit; the response (Status, ErrorComment), None where none came."""
    context = next(cx for cx in assoc.accepted_contexts if cx.abstract_syntax == sop_class_uid)
    request = C_STORE()
    request.MessageID, request.Priority = 1, 2
    request.AffectedSOPClassUID = sop_class_uid
    request._affected_sop_instance_uid = UID(sop_instance_uid)  # past the check: also what is not a UID
    request.DataSet = BytesIO(data_set)
    assoc._reactor_checkpoint.clear()
    while not assoc._is_paused:
        time.sleep(0.0001)
    try:
        assoc.dimse.send_msg(request, context.context_id or 0)
        _, response = assoc.dimse.get_msg(block=True)
        return response
    finally:
        assoc._reactor_checkpoint.set()


class StoragePeer:
    """A Storage SCP in this process: answers C-ECHO and C-STORE, keeps what comes.

    `status(dataset)` decides the answer (0x0000 unless told otherwise); datasets lists what was answered with success
    or a warning, in order.
    """

    def __init__(self, ae_title: str = "PACS", *, port: int | None = None,
                 status: Callable[[Dataset], int] = lambda _: 0x0000) -> None:
        self.ae_title, self.port = ae_title, port or free_port()
        self.datasets: list[Dataset] = []
        self.associations = 0
        self._status, self._lock = status, threading.Lock()
        self._server: Any = None

    def __enter__(self) -> StoragePeer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        ae = AE(self.ae_title)
        ae.maximum_pdu_size = 131072
        ae.supported_contexts = [*AllStoragePresentationContexts, build_context(Verification)]
        self._server = ae.start_server(("127.0.0.1", self.port), block=False, evt_handlers=[
            (evt.EVT_C_STORE, self._store), (evt.EVT_C_ECHO, lambda event: 0x0000), (evt.EVT_ACCEPTED, self._accepted)])

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server = None

    def _accepted(self, event: evt.Event) -> None:
        with self._lock:
            self.associations += 1

    def _store(self, event: evt.Event) -> int:
        dataset = event.dataset
        dataset.file_meta = event.file_meta
        status = self._status(dataset)
        if status == 0x0000 or 0xB000 <= status <= 0xBFFF:
            with self._lock:
                self.datasets.append(dataset)
        return status


class Orthanc:
    """A real Orthanc with its storage in `folder`; `settings` are added to its configuration."""

    def __init__(self, folder: Path, *, ae_title: str = "ORTHANC", settings: dict[str, Any] | None = None) -> None:
        self.folder, self.ae_title = folder, ae_title
        self.port, self.http_port = free_port(), free_port()
        self.settings = settings or {}
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Orthanc:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Returns once it answers; it accepts any calling AE title."""
        self.folder.mkdir(parents=True, exist_ok=True)
        configuration = self.folder / "orthanc.json"
        configuration.write_text(json.dumps({
            "Name": self.ae_title, "StorageDirectory": str(self.folder / "storage"),
            "IndexDirectory": str(self.folder / "storage"), "DicomAet": self.ae_title, "DicomPort": self.port,
            "HttpPort": self.http_port, "RemoteAccessAllowed": False, "AuthenticationEnabled": False,
            "DicomAlwaysAllowStore": True, "DicomAlwaysAllowEcho": True, "DicomCheckCalledAet": False,
            "UnknownSopClassAccepted": True, "OverwriteInstances": False, "Plugins": [], **self.settings,
        }))
        executable = shutil.which("Orthanc", path="/usr/sbin:/usr/bin:/usr/local/bin:/usr/local/sbin")
        assert executable is not None, "Orthanc is not installed: apt-get install orthanc"
        with (self.folder / "orthanc.log").open("ab") as log:
            self.process = subprocess.Popen([executable, str(configuration)], stdout=log, stderr=log, env=DCMTK_ENV)
        wait_until("Orthanc to start", self._answers, timeout_s=60)

    def stop(self) -> None:
        assert self.process is not None
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def get(self, path: str) -> Any:
        """GET of its REST interface, JSON decoded."""
        return json.loads(self._read(path))

    def count_instances(self, series_uid: str) -> int:
        return len(self._series_instances(series_uid))

    def download_series(self, series_uid: str, folder: Path) -> list[Path]:
        """The stored files of a series, byte for byte."""
        folder.mkdir(parents=True, exist_ok=True)
        files = []
        for number, instance in enumerate(self._series_instances(series_uid)):
            files.append(folder / f"{number:05d}.dcm")
            files[-1].write_bytes(self._read(f"/instances/{instance}/file"))
        return files

    def _series_instances(self, series_uid: str) -> list[str]:
        body = json.dumps({"Level": "Series", "Query": {"SeriesInstanceUID": series_uid}, "Expand": True}).encode()
        found = json.loads(self._read("/tools/find", body))
        return [instance for series in found for instance in series["Instances"]]

    def _read(self, path: str, body: bytes | None = None) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}{path}", data=body, timeout=30) as response:
            return bytes(response.read())

    def _answers(self) -> bool:
        assert self.process is not None and self.process.poll() is None, "Orthanc ended at start; see orthanc.log"
        try:
            self.get("/system")
        except OSError:
            return False
        return True
