"""What runs an order: the seam between the executor and where the computing happens.

A `Runner` starts an order and gives back a `Running`, which the executor listens to. Its messages are JSON objects:

    progress   stage, step, steps, loss: it lives and gets on
    built      report; the checked series lies in FOLDER/derived.tmp
    refused    code, reason, remedy (and perhaps report): trying again would refuse again
    failed     reason, and perhaps a code: "memory" (out of memory), "device" (the GPU failed), "disk" (it is full)
    lost       reason: what ran the order went away, through no fault of the order; not counted as an attempt

All but progress are last words. A run may also end without one; then its `Ending` says how.

`ChildRunner` is the first implementation: one child process on this machine, `python -m dicomnode.pipeline ORDER`. The
child reports by JSON lines on its standard output; it dies with us (PR_SET_PDEATHSIG, end of its standard input).
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dicomnode.logs import get_logger
from dicomnode.process import PARENT_VARIABLE, end, trouble

__all__ = ["LAST_WORDS", "ChildRunner", "Ending", "Runner", "Running"]

LAST_WORDS = ("built", "refused", "failed", "lost")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
GRACE_S = 3.0  # between SIGTERM and SIGKILL
PIPELINE = (sys.executable, "-m", "dicomnode.pipeline")

log = get_logger(__name__)


@dataclass(frozen=True)
class Ending:
    """How a run ended, for the case that it said no last word.

    reason   in words.
    code     "memory": it ran out of memory; "device": the GPU failed; "disk": it is full; "killed": by somebody
             unknown, perhaps for lack of memory; "": otherwise.
    stopped  it was asked to end (SIGTERM), by somebody else than us.
    """

    reason: str
    code: str = ""
    stopped: bool = False


class Running(Protocol):
    """One order that is being worked off."""

    @property
    def ended(self) -> bool:
        """No further message will come."""
        ...

    def read(self, wait_s: float) -> list[dict[str, Any]]:
        """The messages that are there after at most `wait_s`."""
        ...

    def finish(self, *, grace_s: float) -> Ending:
        """End it: by itself within `grace_s`, else by force. Nothing of it runs when this returns."""
        ...


class Runner(Protocol):
    """Starts orders, one at a time."""

    def start(self, job: Mapping[str, Any], order: Mapping[str, Any], folder: Path) -> Running:
        """Start `order` (see `Executor._order`; JSON values) of `job` (its row) in the empty `folder`.

        Raises OSError where it cannot be started: counted as a failed attempt.
        """
        ...


class ChildRunner:
    """Runs orders in child processes of this one, on one device.

    device   "auto", "cpu", "cuda", "cuda:N". Of several GPUs the child sees its own alone.
    threads  CPU threads of the child; 0: as many as its libraries take.
    command  starts the child; it gets the path of its order as last argument.
    """

    def __init__(self, device: str = "auto", threads: int = 0, *, command: Sequence[str] = PIPELINE) -> None:
        self._device, self._threads, self._command = device, threads, tuple(command)

    def start(self, job: Mapping[str, Any], order: Mapping[str, Any], folder: Path) -> Running:
        """Raises OSError where no process can be started."""
        environment = {**os.environ, PARENT_VARIABLE: str(os.getpid())}
        device = self._device
        if device.startswith("cuda:"):
            environment["CUDA_VISIBLE_DEVICES"] = _visible(int(device.removeprefix("cuda:")))
            device = "cuda:0"
        if self._threads:
            environment |= dict.fromkeys(THREAD_VARIABLES, str(self._threads))
        path = folder / "order.json"
        path.write_text(json.dumps({**order, "device": device, "threads": self._threads}), encoding="utf-8")
        return _Child(int(job["id"]), [*self._command, str(path)], folder / "log.txt", environment)


def _visible(index: int) -> str:
    """The `index`-th of the GPUs that we may see, as the child's CUDA_VISIBLE_DEVICES."""
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return names[index] if index < len(names) else str(index)


class _Child:
    """A child process and the JSON lines of its standard output."""

    def __init__(self, job_id: int, command: Sequence[str], messages: Path, environment: Mapping[str, str]) -> None:
        self._job, self._messages = job_id, messages
        self._kills = _kernel_kills()
        with messages.open("wb") as errors:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                                             env=environment, start_new_session=True)
        self._rest, self._ended = b"", False
        log.info("child started", action="child_started", job=job_id, process=self._process.pid)

    @property
    def ended(self) -> bool:
        return self._ended

    def read(self, wait_s: float) -> list[dict[str, Any]]:
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            if not selector.select(wait_s):
                return []
        chunk = os.read(pipe, 65536)
        self._ended = not chunk
        *whole, self._rest = (self._rest + chunk).split(b"\n")
        return [message for line in whole if (message := _message(line)) is not None]

    def finish(self, *, grace_s: float) -> Ending:
        child = self._process
        if grace_s:
            try:
                child.wait(grace_s)
            except subprocess.TimeoutExpired:
                log.warning("the pipeline does not end by itself", action="job_lingers", process=child.pid)
        asked = child.poll() is None
        status = end(child, grace_s=GRACE_S) if asked else child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()
        text = self._messages.read_text(encoding="utf-8", errors="replace").strip()
        if text:
            log.info("messages of the child", action="job_messages", job=self._job, text=text[-4000:])
        return self._ending(status, text, asked=asked)

    def _ending(self, status: int, text: str, *, asked: bool) -> Ending:
        last = text.splitlines()[-1][:300] if text else "it said nothing"
        if status >= 0:
            return Ending(f"the pipeline ended with status {status}: {last}", trouble(text[-4000:]))
        name = signal.Signals(-status).name if -status in {*signal.Signals} else str(-status)
        code, hint = trouble(text[-4000:]), ""
        if status == -signal.SIGKILL and not asked:
            by_kernel = _kernel_kills() > self._kills
            code, hint = ("memory", " for lack of memory") if by_kernel else ("killed", ", perhaps for lack of memory")
        return Ending(f"the pipeline was killed by {name}{hint}: {last}", code,
                      stopped=status == -signal.SIGTERM and not asked)


def _message(line: bytes) -> dict[str, Any] | None:
    """A message of the child; None for what a library printed while it was being loaded."""
    try:
        message = json.loads(line)
    except ValueError:
        message = None
    if isinstance(message, dict) and "kind" in message:
        return message
    log.info("the child printed", action="job_printed", text=line.decode(errors="replace")[:500])
    return None


def _kernel_kills() -> int:
    """How many processes the kernel has killed for lack of memory since it started (proc(5), vmstat: oom_kill)."""
    try:
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except OSError:
        pass
    return 0
