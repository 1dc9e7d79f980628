"""The demo: a synthetic PET and CT through a whole node on this machine, and what comes back.

Writes the phantom as DICOM, starts `dicomnode serve` and a receiving peer on free loopback ports, sends the study by
C-STORE as a scanner would, waits for the derived series, verifies it from the received files, and draws the picture.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dicomnode.config import Peer
from dicomnode.errors import ConfigError, NodeError
from dicomnode.ledger import Ledger
from dicomnode.views import jobs

if TYPE_CHECKING:
    from pynetdicom.events import Event
    from rich.console import Console

    from deconv.phantoms import Phantom
    from sop.phantom import PhantomStudy

__all__ = ["run"]

SIZE = (24, 48, 48)
FWHM_MM = 6.0
SEED = 3
START_S, STOP_S, GIVE_UP_S = 90.0, 30.0, 1800.0
MARK = "demo.json"
CONTENT = ("source", "received", "node", "demo.png", MARK)
CONFIG = """\
# Written by `dicomnode demo`. conf/dicomnode.toml shows every key.
[node]
ae_title = "NBDNODE"
host = "127.0.0.1"
port = {node_port}
data_dir = {data_dir}

[reception]
low_disk_mb = 64

[completeness]
quiet_s = 1

[[peer]]
name = "demo"
ae_title = "DEMO"
host = "127.0.0.1"
port = {peer_port}

[[route]]
name = "demo"
when = {{ Modality = "PT" }}
method = "{method}"
preset = "{preset}"
send_to = ["demo"]
also = ["report", "kernel", "pictures"]
"""


def run(out_dir: Path, *, method: str, preset: str, console: Console) -> dict[str, Any]:
    """Run the demo into `out_dir` and tell `console`; the figures as JSON values.

    Raises ConfigError where the folder holds something else, NodeError where the study is not delivered or the derived
    series does not pass its verification.
    """
    from dicomnode import phantomstudy

    started = time.monotonic()
    out_dir = out_dir.resolve()
    _make_room(out_dir)
    phantom = phantomstudy.make("spheres", size=SIZE, seed=SEED, fwhm_mm=FWHM_MM)
    study = phantomstudy.write(phantom, out_dir / "source", seed=SEED)
    console.print(f"1  Wrote a synthetic study: {len(study.pet)} PET and {len(study.ct)} CT images, "
                  f"blurred by {FWHM_MM:g} mm")
    with _peer(out_dir / "received") as peer_port, _node(out_dir / "node", method, preset, peer_port) as node_port:
        console.print(f"2  A node listens on port {node_port}, a receiving peer on port {peer_port}")
        _send(study, node_port)
        console.print("3  Sent the study by C-STORE, CT first, images in random order")
        job = _wait(out_dir / "node" / "data", study.pet_series_uid, console)
    seconds = time.monotonic() - started
    received = sorted((out_dir / "received").glob("*.dcm"))
    beside = list((out_dir / "received" / "also").glob("*.dcm"))
    console.print(f"4  The derived series came back: {len(received)} images; beside it {len(beside)} objects: report, "
                  "SUV mapping, kernel, pictures")
    result = _judge(out_dir, phantom, study, received, job)
    result |= {"seconds": round(seconds, 1), "method": method, "preset": preset, "folder": str(out_dir)}
    (out_dir / MARK).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _tell(console, result)
    if not result["verified"]["ok"]:
        raise NodeError("the derived series does not pass its verification; see the list above")
    return result


def _make_room(out_dir: Path) -> None:
    """An earlier demo may be replaced; anything else may not."""
    if out_dir.exists() and not (out_dir.is_dir() and ((out_dir / MARK).is_file() or not any(out_dir.iterdir()))):
        raise ConfigError(f"{out_dir} holds something that is not a demo. Remedy: name a new folder.")
    for name in CONTENT:
        path = out_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / MARK).write_text("{}\n", encoding="utf-8")


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _peer(folder: Path) -> Iterator[int]:
    """A Storage SCP that keeps what it is sent as files in `folder`, what is no PET below `also`; yields its port."""
    from pynetdicom import AE, AllStoragePresentationContexts, evt
    from pynetdicom.sop_class import PositronEmissionTomographyImageStorage, Verification  # type: ignore[attr-defined]

    from dicomnode.requesting import set_nodelay

    (folder / "also").mkdir(parents=True)

    def keep(event: Event) -> int:
        dataset = event.dataset
        pet = dataset.SOPClassUID == PositronEmissionTomographyImageStorage
        path = (folder if pet else folder / "also") / f"{dataset.SOPInstanceUID}.dcm"
        path.write_bytes(event.encoded_dataset())
        return 0x0000

    ae = AE(ae_title="DEMO")
    ae.supported_contexts = AllStoragePresentationContexts
    ae.add_supported_context(Verification)
    server = ae.start_server(("127.0.0.1", 0), block=False,
                             evt_handlers=[(evt.EVT_C_STORE, keep), (evt.EVT_CONN_OPEN, set_nodelay)])
    assert server is not None  # block=False
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()


@contextmanager
def _node(folder: Path, method: str, preset: str, peer_port: int) -> Iterator[int]:
    """`dicomnode serve` as a process of its own; yields its port once it is ready."""
    folder.mkdir(parents=True)
    port, config, log = _free_port(), folder / "dicomnode.toml", folder / "node.log"
    config.write_text(CONFIG.format(node_port=port, peer_port=peer_port, method=method, preset=preset,
                                    data_dir=json.dumps(str(folder / "data"))), encoding="utf-8")
    with log.open("wb") as messages, subprocess.Popen(
        [sys.executable, "-m", "dicomnode", "serve", "--config", str(config)], stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=messages,
    ) as process:
        assert process.stdout is not None
        too_late = threading.Timer(START_S, process.kill)
        too_late.start()
        try:
            line = process.stdout.readline().strip()
            too_late.cancel()
            if line != b"ready":
                raise NodeError(f"the node did not start; its log {log} ends: {log.read_text(errors='replace')[-500:]}")
            yield port
        finally:
            too_late.cancel()
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _send(study: PhantomStudy, node_port: int) -> None:
    from dicomnode import scu

    node = Peer(name="node", ae_title="NBDNODE", host="127.0.0.1", port=node_port)
    for files in (study.ct, study.pet):
        mixed = random.Random(SEED).sample(files, len(files))
        answers = scu.send(node, mixed, calling_ae="DEMO", connect_timeout_s=10, dimse_timeout_s=60,
                           on_answer=lambda answer: None)
        refused = [answer for answer in answers if not answer.stored]
        if refused:
            raise NodeError(f"the node answered C-STORE with 0x{refused[0].status:04X}: {refused[0].comment}")


def _wait(data_dir: Path, series_uid: str, console: Console) -> dict[str, Any]:
    """Follow the series in the ledger until it is delivered; its job row."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    until = time.monotonic() + GIVE_UP_S
    columns = (TextColumn("   {task.description:<36}"), BarColumn(), TimeElapsedColumn())
    with Ledger(data_dir / "ledger.sqlite3") as ledger, Progress(
            *columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("received", total=None)
        while time.monotonic() < until:
            row = next((row for row in jobs(ledger, series_uid) if row["series"] == series_uid), None)
            if row is not None and row["state"] == "delivered":
                return ledger.job(row["job"])
            if row is not None and row["state"] in ("held", "ignored", "cancelled"):
                raise NodeError(f"the PET series is {row['state']}: {row['reason']}")
            progress = row and row["state"] == "running" and row["progress"]
            if row is not None and progress:
                bar.update(task, description=f"running: {progress['stage']}", completed=progress["step"],
                           total=progress["steps"])
            elif row is not None:
                bar.update(task, description=row["state"], total=None)
            time.sleep(0.3)
    raise NodeError(f"the derived series did not come within {GIVE_UP_S / 60:.0f} minutes. Remedy: look into "
                    f"{data_dir.parent / 'node.log'}")


def _judge(out_dir: Path, phantom: Phantom, study: PhantomStudy, received: list[Path],
           job: dict[str, Any]) -> dict[str, Any]:
    """Verify the received files, measure them against the truth, and draw the picture."""
    import numpy as np

    from dicomnode.figures import figures
    from dicomnode.pictures import phantom_picture
    from dicomnode.pipeline import KERNEL_FILE
    from sop.check import check_derived
    from sop.read import read_series
    from sop.suv import suv_factors

    kernel_file = out_dir / "node" / "data" / job["derived_path"] / KERNEL_FILE
    kernel = np.load(kernel_file) if kernel_file.is_file() else None
    source, info = read_series(study.pet)
    derived, derived_info = read_series(received)
    spacing = (float(source.spacing[0]), float(source.spacing[1]), float(source.spacing[2]))
    checked = check_derived(list(study.pet), received, kernel=kernel, kernel_spacing=spacing)
    result = figures(phantom, source, derived, kernel, suv_factor=suv_factors(info).require())
    phantom_picture(out_dir / "demo.png", phantom, source, derived, kernel,
                    title=f"Synthetic spheres, blurred by {phantom.fwhm_mm[0]:g} mm · {job['method']}, "
                          f"preset {job['preset']} · research use only")
    return {**result, "verified": checked.to_json(), "picture": str(out_dir / "demo.png"),
            "derived_series": derived_info.series, "derived_instances": len(received)}


def _tell(console: Console, result: dict[str, Any]) -> None:
    """The figures as tables, and where everything lies."""
    from rich.table import Table

    recovery = Table(title="Recovery (1 is perfect)", title_justify="left", header_style="bold")
    for name in ("sphere", "mean before", "mean after", "max before", "max after"):
        recovery.add_column(name, justify="right")
    for row in result["spheres"]:
        before, after = row["before"], row["after"]
        recovery.add_row(f"{row['diameter_mm']:g} mm", f"{before['mean']:.2f}", f"{after['mean']:.2f}",
                         f"{before['max']:.2f}", f"{after['max']:.2f}")
    console.print(recovery)
    found, nrmse, suv = result["kernel_fwhm_mm"], result["nrmse"], result["suv_max"]
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_row("error against the truth (NRMSE)", f"{nrmse['before']:.3f} before, {nrmse['after']:.3f} after")
    facts.add_row("SUVmax", f"{suv['before']:.1f} before, {suv['after']:.1f} after, {suv['truth']:.1f} true")
    facts.add_row("total activity", f"changed by {100 * result['activity_change']:+.4f} %")
    if found is not None:
        facts.add_row("kernel FWHM", f"{found[0]:.1f} × {found[1]:.1f} × {found[2]:.1f} mm found, "
                                     f"{result['true_fwhm_mm'][0]:.1f} mm true, on these voxels")
    items = result["verified"]["items"]
    failed = [item for item in items if not item["ok"]]
    verdict = "[green]passed[/]" if not failed else "[red]failed[/]"
    facts.add_row("verification", f"{verdict}: {len(items) - len(failed)} of {len(items)} checks")
    facts.add_row("time", f"{result['seconds']:.0f} s from phantom to delivery")
    console.print(facts)
    for item in failed:
        console.print(f"   {item['name']}: {item['message']}", markup=False)
    folder = result["folder"]
    console.print(f"\nPicture  {result['picture']}\nDICOM    {folder}/source (sent), {folder}/received (derived)\n"
                  f"History  dicomnode show PHANTOM --config {folder}/node/dicomnode.toml\n"
                  f"Page     dicomnode web --config {folder}/node/dicomnode.toml   runs it; with --link, in another "
                  "terminal, the address to open", soft_wrap=True)
