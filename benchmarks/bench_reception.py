"""Reception side by side in one run: our receiver, a bare pynetdicom handler that fsyncs, Orthanc; the disk's floor.

    python benchmarks/bench_reception.py [--senders 4] [--instances 100] [--rounds 2] [--only ours,bare,orthanc,floor]

Each sender is DCMTK's storescu on one association (TCP_NODELAY=1, PDUs of 128 KiB) with CT slices of 512 x 512. The
floor is a plain loop: write, fsync, rename, fsync the folder. Orthanc fsyncs its files (SyncStorageArea); its
index is SQLite with its own pragmas, which no setting changes. The receivers take turns, so that a busy machine slows
all of them; "CPU ms" is the receiver's processor time for an instance and depends least on the rest of the machine.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.peers import DCMTK_ENV, Orthanc, ReceiverProcess, associate, free_port, wait_until

_BARE = """
import os, socket, sys
from pynetdicom import AE, AllStoragePresentationContexts, evt
folder = sys.argv[2]
def store(event):
    name = os.path.join(folder, event.request.AffectedSOPInstanceUID)
    with open(name + ".part", "wb") as file:
        file.write(event.encoded_dataset())
        file.flush()
        os.fsync(file.fileno())
    os.rename(name + ".part", name)
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
    return 0x0000
ae = AE("NBDNODE")
ae.maximum_pdu_size = 131072
ae.supported_contexts = AllStoragePresentationContexts
nodelay = lambda event: event.assoc.dul.socket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
ae.start_server(("127.0.0.1", int(sys.argv[1])), evt_handlers=[(evt.EVT_C_STORE, store), (evt.EVT_CONN_OPEN, nodelay)])
"""


def ct_slices(folder: Path, *, senders: int, instances: int) -> list[Path]:
    """One folder for each sender, of `instances` CT slices with 512 x 512 random 12-bit pixels."""
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 4096, (512, 512), dtype=np.uint16).tobytes()
    folders = []
    for sender in range(senders):
        share = folder / f"sender{sender}"
        share.mkdir(parents=True)
        for number in range(instances):
            _ct_slice(sender, number, pixels).save_as(share / f"{number:04d}.dcm", enforce_file_format=True)
        folders.append(share)
    return folders


def _ct_slice(sender: int, number: int, pixels: bytes) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, f"1.2.826.0.1.3680043.10.99.{sender}.{number}"
    ds.StudyDate, ds.StudyTime, ds.Modality, ds.AccessionNumber = "20260101", "120000", "CT", f"A{sender}"
    ds.PatientName, ds.PatientID, ds.StudyID = "Bench^Mark", "BENCH", "1"
    ds.SeriesDescription = "CT 512 x 512"
    ds.StudyInstanceUID = f"1.2.826.0.1.3680043.10.98.{sender}"
    ds.SeriesInstanceUID = f"1.2.826.0.1.3680043.10.97.{sender}"
    ds.SeriesNumber, ds.InstanceNumber = "1", str(number)
    ds.ImagePositionPatient, ds.ImageOrientationPatient = [0, 0, 2 * number], [1, 0, 0, 0, 1, 0]
    ds.FrameOfReferenceUID = f"1.2.826.0.1.3680043.10.96.{sender}"
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows = ds.Columns = 512
    ds.PixelSpacing = [1, 1]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.add_new("PixelData", "OW", pixels)
    return ds


def send(port: int, folders: list[Path], *, called: str) -> float:
    """Seconds for all senders at once, each on one association."""
    command = ["/usr/bin/storescu", "-R", "+sd", "-aet", "SCANNER", "-aec", called, "--max-send-pdu", "131072",
               "127.0.0.1", str(port)]
    start = time.perf_counter()
    running = [subprocess.Popen([*command, str(folder)], env=DCMTK_ENV, stdout=subprocess.DEVNULL,
                                stderr=subprocess.PIPE) for folder in folders]
    failures = [(process.communicate()[1], process.returncode) for process in running]
    seconds = time.perf_counter() - start
    for text, code in failures:
        assert code == 0, text.decode()[-500:]
    return seconds


def latencies(port: int, *, called: str, seconds: float = 3.0) -> list[float]:
    """Seconds from request to response of single C-STOREs, one sender, for about `seconds`."""
    pixels = bytes(512 * 512 * 2)
    assoc = associate(port, [(CTImageStorage, [ExplicitVRLittleEndian])], called=called)
    assert assoc.is_established
    times, until, number = [], time.perf_counter() + seconds, 0
    while time.perf_counter() < until:
        dataset = _ct_slice(1000, number, pixels)
        start = time.perf_counter()
        status = assoc.send_c_store(dataset)
        times.append(time.perf_counter() - start)
        assert status.Status == 0x0000, status
        number += 1
    assoc.release()
    return times


Action = Callable[[int, str, int], None]  # port, called AE title, process id


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ours(folder: Path, action: Action) -> None:
    with ReceiverProcess(folder) as receiver:
        assert receiver.process is not None
        action(receiver.port, "NBDNODE", receiver.process.pid)
        print(f"    our receiver's memory after the run: {receiver.memory_mb():.0f} MB", file=sys.stderr)


def bare(folder: Path, action: Action) -> None:
    folder.mkdir(parents=True)
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", _BARE, str(port), str(folder)])
    try:
        contexts = [(CTImageStorage, [ExplicitVRLittleEndian])]
        first = wait_until("the bare handler", lambda: (a := associate(port, contexts)).is_established and a)
        first.release()
        action(port, "NBDNODE", process.pid)
    finally:
        process.kill()
        process.wait()


def orthanc(folder: Path, action: Action) -> None:
    with Orthanc(folder, settings={"SyncStorageArea": True, "StorageCompression": False, "ConcurrentJobs": 1,
                                   "MaximumPduLength": 131072, "DicomThreadsCount": 4}) as server:
        assert server.process is not None
        action(server.port, server.ae_title, server.process.pid)


def floor(folder: Path, size: int, count: int) -> float:
    """Seconds for `count` files of `size` bytes by a plain loop: write, fsync, rename, fsync the folder."""
    folder.mkdir(parents=True)
    data = os.urandom(size)
    start = time.perf_counter()
    for number in range(count):
        part, name = folder / f"{number}.part", folder / str(number)
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.rename(name)
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--senders", type=int, default=4)
    parser.add_argument("--instances", type=int, default=100, help="for each sender")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latency-s", type=float, default=3.0, help="how long single C-STOREs are timed each round")
    parser.add_argument("--only", default="ours,bare,orthanc,floor")
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to be measured")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="reception-", dir=options.folder))
    try:
        _measure(options, root)
    finally:
        shutil.rmtree(root, ignore_errors=True)


@dataclass
class Figures:
    """Of one receiver, over the rounds."""

    seconds: list[float] = field(default_factory=list)
    single: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def row(self, name: str, megabytes: float, count: int) -> str:
        best, median = min(self.seconds), statistics.median(self.seconds)
        text = f"| {name} | {megabytes / best:.0f} | {megabytes / median:.0f} | {count / best:.0f} |"
        if not self.single:
            return f"{text} | | |"
        cuts = statistics.quantiles(self.single, n=20)
        return f"{text} {1000 * min(self.cpu) / count:.1f} | {1000 * cuts[9]:.1f} | {1000 * cuts[18]:.1f} |"


def _measure(options: argparse.Namespace, root: Path) -> None:
    folders = ct_slices(root / "in", senders=options.senders, instances=options.instances)
    files = [path for folder in folders for path in folder.iterdir()]
    size = files[0].stat().st_size
    receivers = {"ours": ours, "bare": bare, "orthanc": orthanc}
    found = {name: Figures() for name in options.only.split(",")}
    load = os.getloadavg()[0]
    for round_ in range(options.rounds):
        for name, figures in found.items():
            folder = root / f"{name}{round_}"

            def action(port: int, called: str, pid: int, figures: Figures = figures) -> None:
                before = cpu_seconds(pid)
                figures.seconds.append(send(port, folders, called=called))
                figures.cpu.append(cpu_seconds(pid) - before)
                figures.single += latencies(port, called=called, seconds=options.latency_s)

            if name == "floor":
                figures.seconds.append(floor(folder, size, len(files)))
            else:
                receivers[name](folder, action)
            shutil.rmtree(folder, ignore_errors=True)
    print(f"{platform.platform()}, {os.cpu_count()} cores, load at start {load:.1f}; {options.senders} senders, "
          f"{len(files)} CT slices of {size / 1e6:.3f} MB, {options.rounds} rounds")
    print("| receiver | MB/s (best) | MB/s (median) | instances/s (best) | CPU ms | C-STORE p50 ms | p95 ms |")
    print("|---|---|---|---|---|---|---|")
    for name, figures in found.items():
        print(figures.row(name, len(files) * size / 1e6, len(files)))


if __name__ == "__main__":
    main()
