"""This machine: data directory, disk, port, clock, time zone, packages, devices, methods."""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from dicomnode.acceptance.finding import Finding
from dicomnode.acceptance.peers import echo
from dicomnode.config import Config, Peer
from dicomnode.errors import Exit, PeerUnreachable

__all__ = ["clock", "clock_is_kept", "data_dir", "devices", "methods", "packages", "port", "time_zone"]

EARLIEST = 1_735_689_600.0  # 2025-01-01: a clock before that was never set


def data_dir(config: Config) -> Iterator[Finding]:
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


def port(config: Config) -> Iterator[Finding]:
    """Free, or taken by a node that answers C-ECHO under our AE title."""
    node = config.node
    if not config.tls.plain:
        yield _tls_port(config)
        return
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
        echo(Peer(name="this node", ae_title=node.ae_title, host=host, port=node.port), config)
    except PeerUnreachable as error:
        if "rejects the association" in str(error):
            yield Finding("port", "ok", f"a DICOM node listens on {address}; it does not take our own AE title")
        else:
            yield Finding("port", "problem", f"{address} is taken and does not answer C-ECHO: {error}",
                          "stop the program that holds the port, or change node.port")
        return
    yield Finding("port", "ok", f"the node answers C-ECHO on {address}")


def _tls_port(config: Config) -> Finding:
    """Free, or taken: whose it is cannot be asked without a certificate that we accept ourselves."""
    address = f"{config.node.host or '0.0.0.0'}:{config.tls.port}"
    try:
        with socket.create_server((config.node.host, config.tls.port or 0)):
            return Finding("port", "ok", f"{address} (TLS alone) is free: the node is not running")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return Finding("port", "ok", f"{address} (TLS alone) is taken: by the node, if it runs")
        return Finding("port", "problem", f"cannot listen on {address}: {error}", "mend node.host or tls.port")


def clock(now: float) -> Iterator[Finding]:
    if now < EARLIEST:
        yield Finding("clock", "problem", f"the clock says {time.strftime('%Y-%m-%d %H:%M', time.gmtime(now))} UTC",
                      "set the clock; enable systemd-timesyncd or chrony")
        return
    yield Finding("clock", "ok", time.strftime("%Y-%m-%d %H:%M %Z (UTC%z)", time.localtime(now)))


def clock_is_kept() -> Iterator[Finding]:
    """Whether something keeps the clock right: what systemd knows of it (timedatectl(1)), nothing where it is not."""
    program = shutil.which("timedatectl")
    if program is None:
        return
    try:
        done = subprocess.run([program, "show", "--property=NTPSynchronized", "--value"], capture_output=True,
                              text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return
    said = done.stdout.strip()
    if said == "yes":
        yield Finding("clock is kept", "ok", "synchronised (timedatectl)")
    else:
        told = (done.stderr.strip() or "no answer").splitlines()[0]
        why = "not synchronised" if said == "no" else f"cannot be told: {told}"
        yield Finding("clock is kept", "warning", why, "enable systemd-timesyncd or chrony")


def time_zone(config: Config, now: float) -> Iterator[Finding]:
    """Times of day are meant in schedule.timezone, whatever zone the machine is in."""
    name = config.schedule.timezone
    there = datetime.fromtimestamp(now, ZoneInfo(name))
    here = datetime.fromtimestamp(now).astimezone()
    text = f"times of day are in {name}, where it is {there:%H:%M}"
    schedule = config.schedule
    used = schedule.windows or schedule.retrieve_at or config.alerts.urls_file or any(
        route.windows for route in config.route)
    if there.utcoffset() == here.utcoffset() or not used:
        yield Finding("time zone", "ok", text)
    else:
        yield Finding("time zone", "warning", f"{text}; this machine's own clock shows {here:%H:%M}",
                      "set schedule.timezone to the zone that windows and times are meant in")


def packages(config: Config) -> Iterator[Finding]:
    """What the configuration needs beyond the base installation."""
    wanted = {"distributed": "dask"} if config.work.executor == "dask" else {}
    if any(peer.stow_url for peer in config.peer):
        wanted["dicomweb_client"] = "dicomweb"
    for module, extra in wanted.items():
        if importlib.util.find_spec(module) is None:
            yield Finding(f"package {module}", "problem", "is not installed", f"pip install 'dicomnode[{extra}]'")
        else:
            yield Finding(f"package {module}", "ok", "is installed")


def devices(config: Config) -> Iterator[Finding]:
    """Every device that jobs are to run on here: there, and it computes."""
    try:
        import torch
    except ImportError as error:
        yield Finding("device", "problem", f"torch cannot be loaded: {error}", "install the package's requirements")
        return
    for wanted in config.work.devices or (config.work.device,):
        yield _device(config, wanted, torch)


def _device(config: Config, wanted: str, torch: Any) -> Finding:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(wanted.partition(":")[2] or 0)
    if wanted.startswith("cuda") and index >= count:
        return Finding("device", "problem",
                       f"work asks for {wanted!r}, torch {torch.__version__} sees {count} CUDA devices",
                       'install the NVIDIA driver and the CUDA build of torch (README), or set work.device = "cpu"')
    if not count or wanted == "cpu":
        threads = config.work.threads or torch.get_num_threads()
        return Finding("device", "ok", f"CPU, {threads} threads, torch {torch.__version__}")
    try:
        total = float(torch.ones(1000, device=f"cuda:{index}").sum())
        memory = torch.cuda.mem_get_info(index)[0] / 1e9
    except RuntimeError as error:
        return Finding("device", "problem", f"cuda:{index} does not compute: {str(error).splitlines()[0]}",
                       "look at nvidia-smi: driver, other programs, a device that fell off the bus")
    if total != 1000.0:
        return Finding("device", "problem", f"cuda:{index} adds a thousand ones to {total}", "have the device replaced")
    return Finding("device", "ok", f"{torch.cuda.get_device_name(index)} (cuda:{index}), {memory:.0f} GB free, "
                                   f"torch {torch.__version__}")


def methods(config: Config) -> Iterator[Finding]:
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
