"""Hostile input driven into the node: files through reception and reading, byte streams into a live receiver."""

from __future__ import annotations

import hashlib
import io
import random
import resource
import select
import socket
import ssl
import struct
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from dicomnode.errors import NodeError
from dicomnode.intake import Intake, Limits, Request, file_meta
from dicomnode.spool import Spool
from sop.errors import Refused
from sop.read import read_series
from tests.factories import ct_series
from tests.fuzzing import Good, conversation, good_series, mutated_data_set, mutated_stream
from tests.peers import ReceiverProcess, associate, encoded, store_encoded

LIMITS = Limits(object_bytes=64 * 2**20, free_bytes=0, unpacked_bytes=64 * 2**20)


@dataclass
class Report:
    """What came of `cases`; `failures` must stay empty."""

    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    slowest: str = ""
    memory_mb: float = 0.0  # by which the process grew
    failures: list[str] = field(default_factory=list)

    def took(self, seconds: float, what: str) -> None:
        if seconds > self.slowest_s:
            self.slowest_s, self.slowest = seconds, what


def _resident_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- files


def fuzz_files(count: int, *, seed: int, folder: Path) -> Report:
    """Each case: one instance of a series mutated, taken in as by C-STORE, and the series read as the pipeline does."""
    report, spool, series = Report(), Spool(folder / "spool"), good_series()
    files = folder / "files"
    files.mkdir(exist_ok=True)
    for good in series:  # whatever is loaded once is loaded now
        _read(good, good.data, files)
    before = _resident_mb()
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        good = series[number % len(series)]
        which, data = mutated_data_set(good, rng)
        name = f"file {number} of seed {seed} ({good.name})"
        changed = (*good.data[:which], data, *good.data[which + 1:])
        for step, run in (("taken in", partial(_take_in, spool, good, which, data, rng)),
                          ("read", partial(_read, good, changed, files))):
            began = time.perf_counter()
            try:
                outcome = run()
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                outcome = "failed"
                report.failures.append(f"{name}, {step}: {traceback.format_exc(limit=-6)}")
            report.took(time.perf_counter() - began, f"{name}, {step}")
            report.outcomes[f"{step}: {outcome}"] += 1
        report.cases += 1
    if left := list(spool.incoming.iterdir()):
        report.failures.append(f"{len(left)} files are left in incoming/")
    report.memory_mb = _resident_mb() - before
    return report


def _take_in(spool: Spool, good: Good, which: int, data: bytes, rng: random.Random) -> str:
    intake = Intake(spool, LIMITS, lambda: Request(good.sop_class_uid, good.sop_instance_uids[which], good.syntax,
                                                   "SCANNER"))
    piece = rng.choice((100, 16384, 2**20))
    try:
        for start in range(0, len(data), piece):
            intake.write(data[start:start + piece])
        intake.index()
        return "indexed"
    except NodeError as error:
        return type(error).__name__
    finally:
        intake.discard()


def _read(good: Good, instances: Sequence[bytes], folder: Path) -> str:
    paths = []
    for number, data in enumerate(instances):
        paths.append(folder / f"{number}.dcm")
        paths[-1].write_bytes(file_meta(Request(good.sop_class_uid, good.sop_instance_uids[number], good.syntax, "S"))
                              + data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read_series(paths)
        except Refused as refused:
            if not (refused.reason and refused.remedy):
                raise AssertionError("refused without a reason or a remedy") from refused
            return refused.code
    return "volume"


# --- byte streams


def fuzz_streams(count: int, receiver: ReceiverProcess, *, seed: int, at_once: int = 8,
                 secure: tuple[int, ssl.SSLContext] | None = None) -> Report:
    """Each case: a connection to the receiver that sends a mutated conversation; then good ones, and the accounts.

    secure   the TLS port and a client's context: the conversations go through TLS.
    """
    report, lock = Report(), threading.Lock()
    template = encoded(ct_series(slices=1, seed=1)[0])
    known = str(ct_series(slices=1, seed=1)[0].SOPInstanceUID)
    _good_object(receiver, 10**6)
    before, threads = receiver.memory_mb(), _threads(receiver)
    cut: set[str] = set()

    def one(number: int) -> None:
        rng = random.Random(f"{seed}/{number}")
        # The same length, so that nothing else in the data set need change.
        uid = f"2.25.{number:0{len(known) - 5}d}".replace("2.25.0", "2.25.9", 1)
        stream = mutated_stream(conversation(uid, template.replace(known.encode(), uid.encode())), rng)
        began = time.perf_counter()
        answer = _send(receiver.port if secure is None else secure[0], stream.parts, secure and secure[1])
        with lock:
            if stream.cut:
                cut.add(uid)
            report.outcomes[answer] += 1
            report.cases += 1
            report.took(time.perf_counter() - began, f"stream {number} of seed {seed}")

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(one, range(count)))
    _account(report, receiver, cut)
    report.memory_mb = receiver.memory_mb() - before
    grown = _threads(receiver) - threads
    if grown > 4:
        report.failures.append(f"{grown} threads are left over")
    return report


def _send(port: int, parts: Sequence[bytes], secure: ssl.SSLContext | None = None) -> str:
    """The first part, whatever comes back for a moment, the others, then our end closed: what the receiver said."""
    said = b""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
        connection = plain if secure is None else secure.wrap_socket(plain, server_hostname="127.0.0.1")
        try:
            for number, part in enumerate(parts):
                if number:
                    select.select([connection], [], [], 1.0)
                connection.sendall(part)
            socket.socket.shutdown(connection, socket.SHUT_WR)  # TLS goes on reading
            while piece := connection.recv(65536):
                said += piece
        except TimeoutError:
            return "silent for 10 s"
        except OSError:
            return "connection reset"
        finally:
            connection.close()
    kinds = []
    while len(said) >= 6:
        kind, length = struct.unpack_from(">BxI", said)
        kinds.append({2: "accepted", 3: "rejected", 4: "data", 6: "released", 7: "aborted"}.get(kind, "?"))
        said = said[6 + length:]
    return " ".join(dict.fromkeys(kinds)) or "closed"


def _account(report: Report, receiver: ReceiverProcess, cut: set[str]) -> None:
    """The receiver lives, answers and stores; every object it keeps is whole; nothing is left over."""
    if receiver.process is None or receiver.process.poll() is not None:
        report.failures.append(f"the receiver ended: {receiver.log()[-3000:]}")
        return
    _good_object(receiver, 10**6 + 1)
    time.sleep(1.5)  # associations whose peer went away end
    if left := list((receiver.data_dir / "incoming").iterdir()):
        report.failures.append(f"{len(left)} files are left in incoming/")
    with receiver.ledger() as ledger:
        rows = ledger.query("SELECT sop_instance_uid, path, bytes, sha256 FROM instance")
    for row in rows:
        data = (receiver.data_dir / row["path"]).read_bytes()
        kept = data[144 + struct.unpack_from("<I", data, 140)[0]:]
        if len(data) != row["bytes"] or hashlib.sha256(kept).hexdigest() != row["sha256"]:
            report.failures.append(f"{row['sop_instance_uid']} is not kept as it came")
        if row["sop_instance_uid"] in cut:
            report.failures.append(f"{row['sop_instance_uid']} is in the ledger, and its peer never sent the end")
    report.outcomes["objects kept"] = len(rows)
    if "Traceback" in receiver.log():
        report.failures.append(receiver.log()[receiver.log().index("Traceback"):][:3000])


def _good_object(receiver: ReceiverProcess, seed: int) -> None:
    """An association, a good object, its bytes on disk."""
    association = associate(receiver.port, [(CTImageStorage, [ExplicitVRLittleEndian])])
    assert association.is_established, "the receiver lets nobody in"
    dataset = ct_series(slices=1, seed=seed)[0]
    data = encoded(dataset)
    answer = store_encoded(association, CTImageStorage, dataset.SOPInstanceUID, data)
    assert answer is not None and answer.Status == 0
    association.release()
    with receiver.ledger() as ledger:
        row = ledger.known(dataset.SOPInstanceUID)
    assert row is not None and io.FileIO(receiver.data_dir / row["path"]).readall().endswith(data)


def _threads(receiver: ReceiverProcess) -> int:
    assert receiver.process is not None
    return len(list(Path(f"/proc/{receiver.process.pid}/task").iterdir()))
