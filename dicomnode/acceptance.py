"""Is everything ready to run? Each finding says what was looked at, the verdict and the remedy.

`dicomnode check` before the first start, after a change of the configuration, and whenever something is wrong.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dicomnode.config import Config, Peer, load
from dicomnode.errors import ConfigError, Exit, NodeError, PeerUnreachable

__all__ = ["Finding", "Verdict", "check", "exit_code"]

Verdict = Literal["ok", "warning", "problem"]
EARLIEST = 1_735_689_600.0  # 2025-01-01: a clock before that was never set


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `exit_code` is what the command line answers where the verdict is "problem"."""

    what: str
    verdict: Verdict
    text: str
    remedy: str = ""
    exit_code: Exit = Exit.FAILED

    def as_json(self) -> dict[str, Any]:
        value = asdict(self)
        del value["exit_code"]
        return value


def exit_code(findings: Sequence[Finding]) -> Exit:
    """DONE without a problem; otherwise the code of the first problem: usage, failed, unreachable."""
    problems = [finding.exit_code for finding in findings if finding.verdict == "problem"]
    return problems[0] if problems else Exit.DONE


def check(config_path: Path, *, now: float) -> list[Finding]:
    """Everything, in the order in which it should be mended. Writes nothing but a probe file in the data directory."""
    try:
        config = load(config_path)
    except ConfigError as error:
        return [Finding("configuration", "problem", str(error), exit_code=Exit.USAGE)]
    peers, routes = len(config.peer), len(config.route)
    found = [Finding("configuration", "ok", f"{config_path}: {peers} peers, {routes} routes")]
    if not routes:
        found.append(Finding("routes", "warning", "no [[route]]: everything is kept, nothing is processed",
                             "add a [[route]]"))
    found += _data_dir(config)
    found += _port(config)
    for peer in config.peer:
        found += _peer(config, peer)
    found += _clock(now)
    found += _device(config)
    found += _methods(config)
    return found


def _data_dir(config: Config) -> Iterator[Finding]:
    folder = config.node.data_dir
    existing = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield Finding("data directory", "problem", f"{folder} cannot be written by this user",
                      f"create it and give it to the node's user (chown), or run as that user; looked at {existing}")
        return
    if existing != folder:
        yield Finding("data directory", "ok", f"{folder} will be created at the first start")
    else:
        yield _write_probe(folder)
    free, watermark = shutil.disk_usage(existing).free // 2**20, config.reception.low_disk_mb
    if free <= watermark:
        yield Finding("disk", "problem", f"{free} MiB free, at or below the watermark of {watermark} MiB: "
                      "every C-STORE is refused", "free space, or lower reception.low_disk_mb")
    elif free < 4 * watermark:
        yield Finding("disk", "warning", f"{free} MiB free, near the watermark of {watermark} MiB", "free space soon")
    else:
        yield Finding("disk", "ok", f"{free / 1024:.1f} GiB free, watermark {watermark / 1024:.1f} GiB")


def _write_probe(folder: Path) -> Finding:
    """Write and fsync a small file: what reception does for every object."""
    probe = folder / f".check-{os.getpid()}"
    try:
        started = time.perf_counter()
        with probe.open("wb") as out:
            out.write(b"probe")
            out.flush()
            os.fsync(out.fileno())
        took_ms = (time.perf_counter() - started) * 1000
    except OSError as error:
        return Finding("data directory", "problem", f"{folder} cannot be written: {error}", "mend the file system")
    finally:
        probe.unlink(missing_ok=True)
    return Finding("data directory", "ok", f"{folder} is writable, fsync in {took_ms:.0f} ms")


def _port(config: Config) -> Iterator[Finding]:
    """Free, or taken by a node that answers C-ECHO under our AE title."""
    node = config.node
    address = f"{node.host or '0.0.0.0'}:{node.port}"
    try:
        with socket.create_server((node.host, node.port)):
            yield Finding("port", "ok", f"{address} is free: the node is not running")
            return
    except OSError as error:
        if error.errno == errno.EACCES:
            yield Finding("port", "problem", f"{address} needs a privilege", "use a port above 1023 (11112 is common)")
            return
        if error.errno != errno.EADDRINUSE:
            yield Finding("port", "problem", f"cannot listen on {address}: {error}", "mend node.host")
            return
    host = "127.0.0.1" if node.host in ("", "0.0.0.0", "::") else node.host
    try:
        _echo(Peer(name="this node", ae_title=node.ae_title, host=host, port=node.port), config)
    except PeerUnreachable as error:
        if "rejects the association" in str(error):
            yield Finding("port", "ok", f"a DICOM node listens on {address}; it does not take our own AE title")
        else:
            yield Finding("port", "problem", f"{address} is taken and does not answer C-ECHO: {error}",
                          "stop the program that holds the port, or change node.port")
        return
    yield Finding("port", "ok", f"the node answers C-ECHO on {address}")


def _echo(peer: Peer, config: Config) -> None:
    from dicomnode import scu

    scu.echo(peer, calling_ae=config.node.ae_title, connect_timeout_s=config.delivery.connect_timeout_s,
             dimse_timeout_s=config.delivery.dimse_timeout_s)


def _peer(config: Config, peer: Peer) -> Iterator[Finding]:
    what = f"peer {peer.name}"
    if peer.port is None:
        yield Finding(what, "ok", f"{peer.ae_title} only sends to us (no port)")
        return
    started = time.perf_counter()
    try:
        _echo(peer, config)
    except NodeError as error:
        yield Finding(what, "problem", str(error), exit_code=Exit.UNREACHABLE)
        return
    yield Finding(what, "ok", f"{peer.ae_title} at {peer.host}:{peer.port} answers C-ECHO in "
                              f"{(time.perf_counter() - started) * 1000:.0f} ms")


def _clock(now: float) -> Iterator[Finding]:
    if now < EARLIEST:
        yield Finding("clock", "problem", f"the clock says {time.strftime('%Y-%m-%d %H:%M', time.gmtime(now))} UTC",
                      "set the clock; enable systemd-timesyncd or chrony")
        return
    yield Finding("clock", "ok", time.strftime("%Y-%m-%d %H:%M %Z (UTC%z)", time.localtime(now)))


def _device(config: Config) -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("device", "problem", f"torch cannot be loaded: {error}", "install the package's requirements")
        return
    wanted = config.work.device
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted.startswith("cuda") and int(wanted.partition(":")[2] or 0) >= devices:
        yield Finding("device", "problem",
                      f"work.device is {wanted!r}, torch {torch.__version__} sees {devices} CUDA devices",
                      'install the NVIDIA driver and the CUDA build of torch (README), or set work.device = "cpu"')
    elif devices and wanted != "cpu":
        index = int(wanted.partition(":")[2] or 0)
        yield Finding("device", "ok", f"{torch.cuda.get_device_name(index)} (cuda:{index}), torch {torch.__version__}")
    else:
        threads = config.work.threads or torch.get_num_threads()
        yield Finding("device", "ok", f"CPU, {threads} threads, torch {torch.__version__}")


def _methods(config: Config) -> Iterator[Finding]:
    import deconv

    for route in config.route:
        what = f"route {route.name}"
        try:
            deconv.method(route.method).settings(route.preset, **route.settings)
        except (ValueError, TypeError) as error:
            yield Finding(what, "problem", f"method {route.method}, preset {route.preset}: {error}",
                          "mend preset or settings of the route", exit_code=Exit.USAGE)
        else:
            yield Finding(what, "ok", f"{route.method}, preset {route.preset}, to {', '.join(route.send_to)}")
