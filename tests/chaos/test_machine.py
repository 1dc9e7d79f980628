"""The machine fails: full disk, a clock that jumps."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.site import account, finished, mounted, route, send_until_acknowledged, storage_peers, studies
from tests.e2e.harness import RunningNode
from tests.peers import StoragePeer, storescu, wait_until

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]
#: What the processes of the node ask for the time of day is moved by the seconds that stand in a file.
CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static long moved(void) {
    long seconds = 0;
    FILE *file = fopen(getenv("CHAOS_CLOCK"), "r");
    if (file) { if (fscanf(file, "%ld", &seconds) != 1) seconds = 0; fclose(file); }
    return seconds;
}
int clock_gettime(clockid_t id, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(id, at);
    if (status == 0 && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) at->tv_sec += moved();
    return status;
}
time_t time(time_t *out) {
    struct timespec at;
    clock_gettime(CLOCK_REALTIME, &at);
    if (out) *out = at.tv_sec;
    return at.tv_sec;
}
int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_disk_that_is_full_again_and_again(tmp_path: Path, tell: Callable[..., None]):
    """On 48 MB: refused with 0xA700 while it is full, also amid jobs; all is delivered once there is room."""
    small = tmp_path / "node" / "data"
    if not mounted(small, 48):
        pytest.skip("this machine does not let root mount a tmpfs")
    sent = studies(tmp_path, 8)
    refused = 0
    try:
        with StoragePeer("PACS") as pacs, RunningNode(
            tmp_path / "node", peers=storage_peers(PACS=pacs), route=route("PACS"), quiet_s=1,
        ) as node:
            node.config_path.write_text(node.config_path.read_text().replace("low_disk_mb = 64", "low_disk_mb = 1"))
            node.stop()
            node.start()
            sender = threading.Thread(target=lambda: [send_until_acknowledged(node.port, s.files) for s in sent])
            sender.start()
            for fill in range(5):
                time.sleep(2.0)
                ballast = small / "ballast"
                try:
                    with ballast.open("wb") as out:
                        while True:
                            out.write(bytes(65536))
                            out.flush()
                except OSError:
                    pass  # full: that is what it is for
                answer = storescu(node.port, [sent[0].files[0]], timeout_s=60)
                refused += "0xa700" in (answer.stdout + answer.stderr).lower() or answer.returncode != 0
                time.sleep(3.0)
                ballast.unlink()
                assert fill < 5
            sender.join(300)
            assert not sender.is_alive()
            for row in node.jobs():
                if row["state"] == "held" and row["job"]:
                    assert node.cli("retry", f"job:{row['job']}").returncode == 0
            wait_until("all studies delivered", finished(node, sent, "delivered"), timeout_s=200)
            tell(times_full=5, probes_refused_while_full=refused, **account(node, sent, {"PACS": pacs.datasets}))
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


@pytest.mark.skipif(shutil.which("cc") is None, reason="the clock is moved by a shim that a C compiler makes")
def test_a_clock_that_jumps(tmp_path: Path, tell: Callable[..., None], monkeypatch: pytest.MonkeyPatch):
    """An hour ahead, two back, a day ahead, a year back, amid studies: all are delivered, nothing is removed."""
    (tmp_path / "clock.c").write_text(CLOCK)
    shim = tmp_path / "clock.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(shim), str(tmp_path / "clock.c"), "-ldl"], check=True)
    clock = tmp_path / "clock"
    clock.write_text("0")
    monkeypatch.setenv("CHAOS_CLOCK", str(clock))
    sent = studies(tmp_path, 10)
    jumps = (3600, -3600, 86400, -365 * 86400, 0)
    with StoragePeer("PACS") as pacs, RunningNode(
        tmp_path / "node", peers=storage_peers(PACS=pacs), route=route("PACS"), quiet_s=1,
    ) as node:
        node.stop()
        monkeypatch.setenv("LD_PRELOAD", str(shim))
        node.start()
        monkeypatch.delenv("LD_PRELOAD")
        for number, study in enumerate(sent):
            half = len(study.files) // 2
            send_until_acknowledged(node.port, study.files[:half])
            staging = tmp_path / "clock.new"
            staging.write_text(str(jumps[number % len(jumps)]))
            staging.replace(clock)
            time.sleep(0.7)
            send_until_acknowledged(node.port, study.files[half:])
        wait_until("all studies delivered", finished(node, sent, "delivered"), timeout_s=240)
        tell(jumps=len(sent), **account(node, sent, {"PACS": pacs.datasets}))
