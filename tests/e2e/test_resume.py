"""A long job of the method that ships goes on where it was, however worker and child end, and ends in the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.deconv.scene import measured, truth
from tests.factories import pet_series
from tests.node.line import Line
from tests.peers import REPOSITORY, wait_until

#: Small, but of many tiles: each takes a second or two.
ROUTE = """
[[route]]
name = "all-pet"
when = { Modality = "PT" }
method = "nbd"
preset = "best"
settings = { region = "whole", iterations = 120, windows = 1, skew_iterations = 2, memory_gb = 0.017 }
psf = "blind"
send_to = ["PACS"]
"""
TOML = "[work]\nattempts = 5\nretry_s = 0.1\nthreads = 1\n"
WORKER = """
import sys
from dicomnode.config import Config
from dicomnode.process import stop_on_signals
from dicomnode.work import run
run(Config.model_validate_json(sys.argv[1]), stop=stop_on_signals(), ready=lambda: None)
"""


SHAPE, SPACING = (112, 12, 12), (3.27, 4.6875, 4.6875)


def _activity() -> NDArray[np.float32]:
    """Organs in a background of bands, as a scanner of 6 mm sees them."""
    activity = truth(SHAPE, background=0.2) + 3e3 * (np.arange(2 * SHAPE[0]) // 16 % 2)[:, None, None]
    return measured(activity, (6.0, 6.0, 6.0), spacing=SPACING).array


class Scene:
    """One job in a data directory, and workers on it as processes."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.line = Line(folder, toml=TOML, route=ROUTE)
        uid = self.line.receive(pet_series(slices=SHAPE[0], rows=SHAPE[1], columns=SHAPE[2], values=_activity(),
                                           spacing=SPACING))
        self.line.now += 31
        self.line.matcher().tick()
        (job,) = self.line.ledger.jobs_of_series(uid)
        self.job_id = int(job["id"])
        self.steps: dict[tuple[str, int], list[int]] = {}  # of stage "image", by run: worker and attempt
        self.process: subprocess.Popen[bytes] | None = None

    def job(self) -> dict[str, Any]:
        return self.line.ledger.job(self.job_id)

    def tiles(self) -> int:
        return len(list((self.line.spool.data_dir / "checkpoints" / str(self.job_id)).glob("tile-*.checkpoint")))

    def work(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", WORKER, self.line.config.model_dump_json()],
                                        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def until(self, what: str, condition: Callable[[], Any]) -> None:
        """Wait, and write down the progress that the job shows."""
        def looked() -> Any:
            job = self.job()
            if job["state"] == "running" and job["progress"] and job["progress"]["stage"] == "image":
                run = self.steps.setdefault((job["lease_owner"], job["attempts"]), [])
                run.append(job["progress"]["step"])
            assert job["state"] != "held", job["reason"]
            return condition()

        wait_until(what, looked, timeout_s=90)

    def end(self, number: int) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(30)

    def child(self) -> int:
        assert self.process is not None
        (pid,) = [int(pid) for path in Path(f"/proc/{self.process.pid}/task").glob("*/children")
                  for pid in path.read_text().split()
                  if b"dicomnode.pipeline" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return pid

    def derived(self) -> dict[str, bytes]:
        folder = self.line.spool.absolute(self.job()["derived_path"])
        return {path.name: path.read_bytes() for path in folder.glob("*.dcm")}

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.line.ledger.close()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_best_goes_on_after_sigterm_and_after_kill_of_worker_and_child_to_the_same_bits(tmp_path: Path) -> None:
    """SIGTERM, kill -9 of the worker, kill -9 of the child, each in the middle: no tile is lost, progress only grows,
    the files are those of a run that nobody disturbed."""
    disturbed, calm = Scene(tmp_path / "disturbed"), Scene(tmp_path / "calm")
    try:
        reference = threading.Thread(target=_undisturbed, args=(calm,))
        reference.start()
        disturbed.work()
        kept = []
        for number, whom in enumerate(("SIGTERM", "kill -9 of the worker", "kill -9 of the child"), start=1):
            disturbed.until(f"tile {number}", partial(_has_tiles, disturbed, number))
            kept.append(disturbed.tiles())
            if whom == "SIGTERM":
                assert disturbed.end(signal.SIGTERM) == 0
                assert (disturbed.job()["state"], disturbed.job()["attempts"]) == ("queued", 0)
            elif whom == "kill -9 of the worker":
                disturbed.end(signal.SIGKILL)
            else:
                os.kill(disturbed.child(), signal.SIGKILL)
            assert disturbed.tiles() >= kept[-1]
            if number < 3:
                disturbed.work()
        disturbed.until("the series", lambda: disturbed.job()["state"] in ("built", "sending"))
        reference.join()
        assert disturbed.job()["attempts"] == 2, "only the child's own end counts"
        _progress_grew(disturbed, kept)
        assert disturbed.derived() == calm.derived() and len(calm.derived()) == 2 * SHAPE[0]
    finally:
        disturbed.close()
        calm.close()


def _has_tiles(scene: Scene, count: int) -> bool:
    return scene.tiles() >= count


def _undisturbed(scene: Scene) -> None:
    scene.work()
    scene.until("the series", lambda: scene.job()["state"] in ("built", "sending"))
    scene.end(signal.SIGTERM)


def _progress_grew(scene: Scene, kept: list[int]) -> None:
    """Each start shows at once what the tiles that were kept are worth."""
    tiles = int(scene.job()["report"]["metrics"]["tiles"])
    assert kept == sorted(kept) and kept[-1] < tiles, "the last disturbance came too late to be one"
    runs = list(scene.steps.values())
    assert len(runs) == 4
    for done, steps in zip([0, *kept], runs, strict=True):
        assert steps == sorted(steps)
        assert steps[0] >= done * 480 // tiles, "480 steps are the whole image"
