"""What a Dask worker does for a node: one deconvolution, in a child process of the worker. Voxels in, voxels out.

A node sends arrays and settings and nothing else: no DICOM object, no header, no UID and no name leaves it. Reading,
deriving and checking stay with the node (dicomnode.pipeline).

`run` is the task. It starts `python -m dicomnode.remote`, which loads torch, computes and ends, so that a lack of
memory, a GPU fault or a hang ends that child and not the worker; the child dies with the worker. What the task answers
is bytes that only the node reads: the worker passes them on as they come from the child.

    child -> worker, frames of 8 bytes of length and a pickle:
        {"kind": "progress", "stage", "step", "steps", "loss"}
        {"kind": "done", "result": Deconvolution, "device", "threads", "torch"}
        {"kind": "unfit", "reason"}     the method does not take these settings or this volume
        {"kind": "failed", "reason"}    anything else; also made here where the child ends without a last word
    task -> node, a pickle: one of the last three, or {"kind": "version", "version"}: this worker runs another software
"""

from __future__ import annotations

import os
import pickle
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import IO, Any

import deconv
from deconv import Deconvolution, Progress, Volume
from dicomnode import __version__
from dicomnode.process import PARENT_VARIABLE, die_first, end, tie_to_parent

__all__ = ["TOPIC", "Computed", "Order", "compute", "opened", "packed", "run"]

TOPIC = "dicomnode"  # of the Dask events that carry progress to the nodes
PROGRESS_S = 0.5  # least time between two progress messages of one stage
POLL_S = 0.25
GRACE_S = 3.0
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
COMMAND = (sys.executable, "-m", "dicomnode.remote")
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, eq=False)
class Order:
    """What is to be computed. `device` is "cpu", "cuda" or "cuda:N"; `threads` of the CPU, 0: as the library takes."""

    volume: Volume
    guide: Volume | None
    method: str
    preset: str
    overrides: dict[str, Any]
    device: str
    threads: int


@dataclass(frozen=True, eq=False)
class Computed:
    """A result and what of its making decides the last bits: device, CPU threads, version of torch."""

    result: Deconvolution
    device: str
    threads: int
    torch: str


def packed(value: object) -> bytes:
    return pickle.dumps(value, protocol=5)


def opened(data: bytes) -> Any:
    """What `packed` made; the arrays of volumes are locked again. Only for bytes of a cluster that is trusted."""
    return _locked(pickle.loads(data))


def _locked(value: Any) -> Any:
    if isinstance(value, Volume):
        for array in (value.array, value.spacing, value.origin, value.direction):
            array.setflags(write=False)
    elif isinstance(value, Order):
        _locked(value.volume), _locked(value.guide)
    elif isinstance(value, Deconvolution):
        _locked(value.image), _locked(value.uncertainty)
    elif isinstance(value, dict):
        _locked(value.get("result"))
    return value


# --- in the worker


def run(order: bytes, *, version: str, threads: int) -> bytes:
    """The task: compute the packed `Order`; a packed answer (above).

    version  of the node's software; another one here computes nothing, for the UIDs of the derived series name it.
    """
    from distributed import get_worker

    worker = get_worker()
    key = worker.get_current_task()

    def say(**message: Any) -> None:
        worker.log_event(TOPIC, {"key": key, "worker": worker.address, **message})

    def wanted() -> bool:
        task = worker.state.tasks.get(key)  # the scheduler cancels it here when the node gives it up or has gone
        closing = worker.status.name in ("closing", "closed", "failed")  # so it does when the scheduler has gone
        return not closing and task is not None and task.state == "executing"

    if version != __version__:
        return packed({"kind": "version", "version": __version__})
    say(kind="started")
    return compute(order, threads=threads, say=say, wanted=wanted)


def compute(order: bytes, *, threads: int, say: Callable[..., None], wanted: Callable[[], bool],
            command: tuple[str, ...] = COMMAND) -> bytes:
    """Run `order` in a child; its last word. `say` hears of progress; once `wanted` says no the child is ended."""
    environment = {**os.environ, PARENT_VARIABLE: str(os.getpid()), "OMP_WAIT_POLICY": "PASSIVE"}
    if threads:
        environment |= dict.fromkeys(THREAD_VARIABLES, str(threads))
    with tempfile.TemporaryFile() as messages, subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages, env=environment,
        start_new_session=True,
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        feeder = threading.Thread(target=_feed, args=(child.stdin, order), daemon=True)
        feeder.start()
        last: bytes | None = None
        try:
            for frame in _frames(child.stdout.fileno(), wanted):
                message = pickle.loads(frame) if len(frame) < 4096 else {"kind": "done"}  # arrays are not opened here
                if message["kind"] != "progress":
                    last = frame
                    break
                say(**message)
        finally:
            code = end(child, grace_s=GRACE_S) if last is None else _left(child)
            feeder.join(GRACE_S)
        if last is None:
            messages.seek(0)
            last = packed({"kind": "failed", "reason": _death(code, messages.read())})
    return last


def _feed(pipe: IO[bytes], order: bytes) -> None:
    """Write the order; the pipe stays open, its end would tell the child that nobody waits."""
    try:
        pipe.write(_LENGTH.pack(len(order)) + order)
        pipe.flush()
    except BrokenPipeError:
        pass  # the child has ended: its last word, or its end, says why


def _frames(pipe: int, wanted: Callable[[], bool]) -> Iterator[bytes]:
    """The frames of the child as they come; ends at the end of its output, or when the task is not wanted any more."""
    buffer = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while wanted():
            if not selector.select(POLL_S):
                continue
            chunk = os.read(pipe, 1 << 20)
            if not chunk:
                return
            buffer += chunk
            while len(buffer) >= _LENGTH.size:
                until = _LENGTH.size + _LENGTH.unpack_from(buffer)[0]
                if len(buffer) < until:
                    break
                yield bytes(memoryview(buffer)[_LENGTH.size:until])
                del buffer[:until]


def _left(child: subprocess.Popen) -> int:
    """Let a child that has said its last word leave; its status."""
    try:
        return child.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        return end(child, grace_s=GRACE_S)


def _death(code: int, text: bytes) -> str:
    lines = text.decode(errors="replace").strip().splitlines()
    last = lines[-1][:300] if lines else "it said nothing"
    if code < 0:
        hint = ", presumably out of memory" if -code == signal.SIGKILL else ""  # nobody else kills it here
        return f"the computation on the cluster was killed by signal {-code}{hint}: {last}"
    return f"the computation on the cluster ended with status {code}: {last}"


# --- the child of the worker


class _Speaker:
    """Writes frames; progress at most every PROGRESS_S, a new stage at once."""

    def __init__(self, out: IO[bytes], clock: Callable[[], float] = time.monotonic) -> None:
        self._out, self._clock = out, clock
        self._said_at, self._stage = float("-inf"), ""

    def frame(self, **message: Any) -> None:
        data = packed(message)
        self._out.write(_LENGTH.pack(len(data)))
        self._out.write(data)
        self._out.flush()

    def step(self, progress: Progress) -> None:
        if progress.stage != self._stage or self._clock() - self._said_at >= PROGRESS_S:
            self._said_at, self._stage = self._clock(), progress.stage
            self.frame(kind="progress", **asdict(progress))


def _computed(order: Order, speaker: _Speaker) -> dict[str, Any]:
    try:
        door = deconv.method(order.method)
        settings = door.settings(order.preset, **order.overrides)
        import torch  # after what can be refused without it

        if order.threads:
            torch.set_num_threads(order.threads)
        result = door.deconvolve(order.volume, settings, guide=order.guide, device=order.device, on_step=speaker.step)
    except (ValueError, ArithmeticError) as error:
        return {"kind": "unfit", "reason": str(error)}
    return {"kind": "done", "result": result, "device": order.device, "threads": torch.get_num_threads(),
            "torch": str(torch.__version__)}


def _leave_at_end_of_input() -> None:
    """The worker holds our standard input open; when it closes, nobody waits for us any more."""
    while os.read(0, 4096):
        pass
    os._exit(1)


def main() -> int:
    """Read one order from standard input, compute it, write the answer; 0 when a last word was said."""
    tie_to_parent()
    die_first()
    speaker = _Speaker(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)  # what libraries print must not come between our frames
    source = os.fdopen(os.dup(0), "rb", buffering=0)
    order = opened(_exactly(source, _LENGTH.unpack(_exactly(source, _LENGTH.size))[0]))
    threading.Thread(target=_leave_at_end_of_input, daemon=True).start()
    try:
        answer = _computed(order, speaker)
    except Exception as error:
        answer = {"kind": "failed", "reason": f"{type(error).__name__}: {error}"[:500]}
    speaker.frame(**answer)
    return 0


def _exactly(source: IO[bytes], count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        chunk = source.read(min(1 << 20, count - len(data)))
        if not chunk:
            raise EOFError("the worker closed the input before the order was whole")
        data += chunk
    return bytes(data)


if __name__ == "__main__":
    # As dicomnode.remote, not __main__: classes are found again by their module.
    from dicomnode.remote import main as _main

    sys.exit(_main())
