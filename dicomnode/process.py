"""Processes: end with the parent, end on SIGTERM, tell the service manager. Linux; needs the standard library only.

    tie_to_parent   the kernel kills us when the parent dies, however it dies (prctl(2), PR_SET_PDEATHSIG)
    die_first       the kernel takes us first where memory runs out
    stop_on_signals SIGTERM and SIGINT set an event
    on_hangup       SIGHUP calls a function
    notify          one line to systemd's socket (sd_notify(3)): READY=1, WATCHDOG=1, STOPPING=1
    end             SIGTERM to a process group, then SIGKILL
    trouble         what a message says of memory, GPU and disk
    Pulse           which threads of this process have shown that they get on, and which are late
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

__all__ = ["PARENT_VARIABLE", "Pulse", "die_first", "end", "notify", "on_hangup", "stop_on_signals",
           "tie_to_parent", "trouble", "watchdog_interval_s"]

PARENT_VARIABLE = "DICOMNODE_PARENT"  # process id of the supervisor, handed to its children
LACKS_MEMORY = ("MemoryError", "out of memory", "bad_alloc", "can't allocate memory", "Cannot allocate memory",
                "failed to map segment", "ALLOC_FAILED")
GPU_FAULTS = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS", "cuDNN error", "CUFFT_", "cuFFT error")
FULL_DISK = ("No space left on device", "Disk quota exceeded")  # ENOSPC, EDQUOT in words
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def tie_to_parent() -> None:
    """Die (SIGKILL) when the parent named in the environment dies; nothing where none is named.

    A parent that died before this call is noticed too: then we leave at once, with status 1.
    """
    parent = os.environ.get(PARENT_VARIABLE, "")
    if not parent:
        return
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != int(parent):
        os._exit(1)


def die_first() -> None:
    """Have the kernel choose us before others where memory runs out (proc(5), oom_score_adj): a job can be repeated,
    the receiver must live. Without /proc nothing changes."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("800", encoding="ascii")


def stop_on_signals() -> threading.Event:
    """An event that SIGTERM or SIGINT sets. To be called in the main thread."""
    stop = threading.Event()

    def set_stop(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, set_stop)
    return stop


def on_hangup(call: Callable[[], None]) -> None:
    """Have SIGHUP call `call`, which must do no more than set a flag. To be called in the main thread."""
    def called(_number: int, _frame: FrameType | None) -> None:
        call()

    signal.signal(signal.SIGHUP, called)


def notify(state: str) -> bool:
    """Send `state` to the service manager; False where there is none (NOTIFY_SOCKET unset or gone)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]  # abstract socket
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(state.encode(), address)
    except OSError:
        return False
    return True


def watchdog_interval_s() -> float | None:
    """Seconds between WATCHDOG=1 notices, half of what systemd allows (sd_watchdog_enabled(3)); None without one."""
    microseconds, process_id = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not microseconds.isdecimal() or (process_id and process_id != str(os.getpid())):
        return None
    return int(microseconds) / 2e6


def end(child: subprocess.Popen, *, grace_s: float) -> int:
    """End the process group of `child` (started with start_new_session) and reap it; its return code."""
    for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, None)):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            pass  # all of it has ended already
        try:
            return child.wait(wait_s)
        except subprocess.TimeoutExpired:
            continue
    return child.wait()


def trouble(text: str) -> str:
    """What an error message or the end of a log says: "disk" (it is full), "memory", "device" (the GPU) or "".

    >>> trouble("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB")
    'memory'
    >>> trouble("RuntimeError: CUDA error: an illegal memory access was encountered")
    'device'
    >>> trouble("OSError: [Errno 28] No space left on device: 'derived.tmp/1.dcm'")
    'disk'
    """
    if any(words in text for words in FULL_DISK):
        return "disk"
    if any(words in text for words in LACKS_MEMORY):
        return "memory"
    return "device" if any(words in text for words in GPU_FAULTS) else ""


class Pulse:
    """Signs of life of the threads of one process, in memory. A thread that hangs gives none.

    `expect` names a thread and how long it may be silent; it calls `beat` as it gets on. Limits are to be generous: a
    disk that is slow, or a ledger that others lock, is no hang.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._heard: dict[str, tuple[float, float]] = {}  # name -> (last beat, how long it may be silent)

    def expect(self, name: str, within_s: float) -> None:
        """From now on a beat is due every `within_s` seconds."""
        with self._lock:
            self._heard[name] = (self._clock(), within_s)

    def beat(self, name: str) -> None:
        """The thread gets on; nothing where it is not expected (any more)."""
        with self._lock:
            if name in self._heard:
                self._heard[name] = (self._clock(), self._heard[name][1])

    def forget(self, name: str) -> None:
        """The thread ends in good order."""
        with self._lock:
            self._heard.pop(name, None)

    def silent_s(self, name: str) -> float:
        """Seconds since the last beat; 0 for one that is not expected."""
        with self._lock:
            return max(0.0, self._clock() - self._heard[name][0]) if name in self._heard else 0.0

    def late(self) -> dict[str, float]:
        """The threads that were silent for too long, and for how many seconds."""
        with self._lock:
            now = self._clock()
            return {name: now - at for name, (at, within_s) in self._heard.items() if now - at > within_s}
