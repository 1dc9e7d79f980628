"""Jobs: one at a time is claimed, worked off by a `Runner`, and moved to its next state; nothing it does ends the node.

The executor claims a job, makes its order and the folder work/JOB, has a runner start it (runner.py: a child process,
unless something else is given) and listens. It renews the job's lease while that lives, and ends it when the job is
taken away, or when it says nothing new for `hang_s`.

What is said, or how it ends, becomes the job's next state:

    built      moved to derived/JOB and entered with its deliveries
    refused    held for a person, with reason and remedy: trying again would refuse again
    failed, died, hung     another attempt after a wait that doubles; held once `attempts` are used up
    out of memory, GPU fault   the same, each with half the memory where the method can do with less (`memory_gb`)
    lost       what ran it went away: queued again after a wait, not counted as an attempt
    we are told to stop    queued again, not counted as an attempt

The pipeline may keep the state of a long method in checkpoints/JOB. It outlives child, worker and the machine's power,
so that the next attempt goes on where this one was; it goes when the job is built or refused (else
`schedule.sweep_work`).
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dicomnode import __version__, identity
from dicomnode.config import Config, Route
from dicomnode.errors import NotFound, TransitionRefused
from dicomnode.ledger import Ledger
from dicomnode.logs import get_logger
from dicomnode.psflibrary import keep_found
from dicomnode.runner import LAST_WORDS, ChildRunner, Runner, Running
from dicomnode.spool import Spool, fsync_dir

__all__ = ["Executor", "REPORT_FILE"]

REPORT_FILE = "report.json"
LOST_LIMIT = 100  # a job that was running each time the whole node died so often is not tried again unseen
LONGEST_WAIT_S = 3600.0  # between two attempts
LEDGER_WAIT_S = 10.0
POLL_S = 0.25
GRACE_S = 3.0  # to leave by itself after its last word
MORE_MEMORY = "Remedy: free memory, use a larger machine or choose a smaller region in the route's settings, then"
REMEDIES = {"memory": MORE_MEMORY, "killed": MORE_MEMORY,
            "device": "Remedy: look at the GPU (nvidia-smi, the kernel's log for Xid), then"}
FullSettings = Callable[[str, str, Mapping[str, Any]], Mapping[str, Any]]

log = get_logger(__name__)


class Executor:
    """Runs one job at a time.

    device     what it is called in the ledger; None: work.device.   name  None: host:pid:device.
    runner     works the orders off; None: a child process on that device.
    may_start  whether jobs of the route with that name may start now; None: always.
    beat       called again and again while it gets on, also while a job runs.
    full_settings  all settings of a method's preset; asks a child process unless told otherwise.
    """

    def __init__(self, config: Config, ledger: Ledger, spool: Spool, *, device: str | None = None, name: str = "",
                 runner: Runner | None = None, may_start: Callable[[str], bool] | None = None,
                 beat: Callable[[], None] = lambda: None, full_settings: FullSettings = identity.full_settings,
                 clock: Callable[[], float] = time.time) -> None:
        self._config, self._ledger, self._spool, self._clock = config, ledger, spool, clock
        self._may_start, self._beat, self._full_settings = may_start, beat, full_settings
        self.device = device or config.work.device
        self.name = name or f"{os.uname().nodename}:{os.getpid()}:{self.device}"
        self.job_id: int | None = None
        self._runner = runner or ChildRunner(self.device, config.work.threads)

    def reconfigure(self, config: Config, *, runner: Runner, may_start: Callable[[str], bool] | None) -> None:
        """For the jobs to come; one that runs goes on as it was started."""
        self._config, self._runner, self._may_start = config, runner, may_start

    def recover(self) -> int:
        """At start, when no other worker can be alive: what is still `running` was lost with the last one; how many.

        Such a job is queued again and the attempt is not counted: at once, but one that is lost again lets others go
        first, for it may be what ends the worker. One that is lost again and again is held.
        """
        lost = self._ledger.running_jobs()
        for job in lost:
            times = self._ledger.count_events(job["id"], code="worker-lost") + 1
            if times > LOST_LIMIT:
                self._hold(job["id"], "worker-lost", f"the worker died {times} times while this job ran. Remedy: look "
                           f"at memory and the log, then `dicomnode retry job:{job['id']}`")
                continue
            now, wait = self._clock(), 0.0
            if times > 1 and self._others_wait(job["id"], now):
                wait = min(LONGEST_WAIT_S, self._config.work.retry_s * 2.0 ** (times - 2))
            self._ledger.set_job(job["id"], "queued", now=now, code="worker-lost", run_after=now + wait,
                                 reason="the worker ended while the job ran", attempts=max(0, job["attempts"] - 1))
        return len(lost)

    def _others_wait(self, job_id: int, now: float) -> bool:
        return bool(self._ledger.query("SELECT 1 FROM job WHERE state IN ('queued', 'failed') AND run_after <= ? "
                                       "AND id != ? LIMIT 1", (now, job_id)))

    def run(self, stop: threading.Event, retire: threading.Event | None = None) -> None:
        """Claim and run jobs until `stop` is set, which puts a running job back, or `retire`, which lets it end."""
        while not (stop.is_set() or (retire is not None and retire.is_set())):
            self._beat()
            try:
                job = self._ledger.claim(self.name, now=self._clock(), lease_s=self._config.work.lease_s,
                                         may_start=self._may_start)
            except sqlite3.OperationalError as error:  # disk full, or locked for long: no reason to end the worker
                log.error("no job can be claimed, the ledger cannot be written", action="claim_failed",
                          error=str(error), again_s=LEDGER_WAIT_S)
                stop.wait(LEDGER_WAIT_S)
                continue
            if job is None:
                stop.wait(0.5)
                continue
            self.job_id = job["id"]
            try:
                self.run_job(job, stop)
            finally:
                self.job_id = None

    def run_job(self, job: dict[str, Any], stop: threading.Event) -> None:
        """Run one claimed job to its next state."""
        with self._ledger.transaction() as db:
            db.execute("UPDATE job SET device = ? WHERE id = ?", (self.device, job["id"]))
        if self._adopt(job):
            return
        if job["attempts"] > self._config.work.attempts:
            self._hold(job["id"], "attempts", f"{job['reason'] or 'every attempt failed'}; attempts used up. Remedy: "
                       f"look at the log, then `dicomnode retry job:{job['id']}`")
            return
        folder = self._spool.data_dir / "work" / str(job["id"])
        try:
            order = self._order(job)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o700)
            outcome = self._run(job, order, folder, stop)
            self._conclude(job, folder, outcome)
        except (TransitionRefused, NotFound) as error:
            log.info("job was taken away", action="job_taken", job=job["id"], reason=str(error))
        except OSError as error:
            self._failed(job, f"cannot prepare or keep the work of the job: {error}")
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    # --- the order

    def _order(self, job: dict[str, Any]) -> dict[str, Any]:
        """All that the pipeline needs to know, but its device; it opens neither the ledger nor the configuration."""
        guide = job["guide_series_uid"]
        route = self._config.named_route(job["route"])
        derived, node = self._config.derived, self._config.node
        return {
            "pet_files": self._files(job["series_uid"], job["inputs"]),
            "guide_files": self._files(guide, job["inputs"]) if guide else [],
            "guide_required": route is not None and route.guide == "require",
            "method": job["method"],
            "preset": job["preset"],
            "settings": {**job["settings"], **({"memory_gb": job["memory_gb"]} if job["memory_gb"] else {})},
            "checkpoints": str(self._checkpoints(job)),
            # The time of the job, not of the attempt: a repeat writes the same bytes under the same UIDs.
            "now": job["created_at"],
            "derivation": {
                "software_version": __version__,
                "uid_root": node.uid_root,
                "series_description": self._description(job, route),
                "series_number_offset": derived.series_number_offset,
                "taken_series_numbers": self._taken_numbers(job),
                "research_use": derived.research_use,
                "institution": node.institution,
                "station": node.station_name,
            },
        }

    def _checkpoints(self, job: dict[str, Any]) -> Path:
        return self._spool.data_dir / "checkpoints" / str(job["id"])

    def _description(self, job: dict[str, Any], route: Route | None) -> str:
        """The route's or the site's template; a series that replaces one already sent says so."""
        template = (route.series_description if route else None) or self._config.derived.series_description
        replaced = [old for old in self._ledger.jobs_of_series(job["series_uid"])
                    if old["id"] < job["id"] and old["state"] == "superseded"
                    and any(self._ledger.statuses(delivery["id"]) for delivery in self._ledger.deliveries(old["id"]))]
        return f"{template} (update {len(replaced)})" if replaced else template

    def _files(self, series_uid: str, inputs: Sequence[str]) -> list[str]:
        """What has come of a series since the job was made is not part of it."""
        wanted = frozenset(inputs)
        return [str(self._spool.absolute(row["path"])) for row in self._ledger.instances(series_uid)
                if row["sop_instance_uid"] in wanted]

    def _taken_numbers(self, job: dict[str, Any]) -> list[int]:
        """Series numbers of the study's other series, our own derived one coming back excepted."""
        return sorted({int(row["series_number"]) for row in self._ledger.series_of_study(job["study_uid"])
                       if row["series_number"].strip().isdecimal() and row["code"] != "own-output"})

    # --- the run

    def _run(self, job: dict[str, Any], order: Mapping[str, Any], folder: Path,
             stop: threading.Event) -> dict[str, Any]:
        """Have the order worked off; its last word, or what its end amounts to."""
        log.info("job started", action="job_started", job=job["id"], attempt=job["attempts"], device=self.device)
        running = self._runner.start(job, order, folder)
        verdict: dict[str, Any] | None = {"kind": "error"}
        try:
            verdict = self._listen(job, running, stop)
        finally:
            leaves = verdict is None or verdict["kind"] in LAST_WORDS
            ending = running.finish(grace_s=GRACE_S if leaves else 0.0)
        if verdict is not None:
            return verdict
        if ending.stopped and stop.wait(1.0):
            return {"kind": "stopped"}  # a service manager ends all processes at once, and the child was faster
        return {"kind": "failed", "reason": ending.reason, "code": ending.code}

    def _listen(self, job: dict[str, Any], running: Running, stop: threading.Event) -> dict[str, Any] | None:
        """Read the messages, renew the lease, watch for a hang. None where it ended without a last word."""
        work = self._config.work
        heard_at = renewed_at = time.monotonic()
        progress: dict[str, Any] | None = None
        stage = written = ""
        while True:
            self._beat()
            for message in running.read(POLL_S):
                if message["kind"] != "progress":
                    return message
                heard_at, stage = time.monotonic(), message["stage"]
                progress = {key: message[key] for key in ("stage", "step", "steps", "loss")}
            if running.ended:
                return None
            if stop.is_set():
                return {"kind": "stopped"}
            now = time.monotonic()
            if now - heard_at > work.hang_s:
                return {"kind": "hung", "reason": f"hung: no progress for {work.hang_s:g} s"}
            if now - renewed_at > 1.0 or stage != written:
                renewed_at, written = now, stage
                try:
                    ours = self._ledger.renew(job["id"], self.name, now=self._clock(), lease_s=work.lease_s,
                                              progress=progress)
                except sqlite3.OperationalError as error:  # disk full, or locked for long: no reason to end the job
                    log.warning("a lease cannot be renewed, the ledger cannot be written", action="renew_failed",
                                job=job["id"], error=str(error))
                    renewed_at = now + LEDGER_WAIT_S
                    continue
                if not ours:
                    return {"kind": "taken"}
                progress = None

    # --- what comes of it

    def _conclude(self, job: dict[str, Any], folder: Path, outcome: Mapping[str, Any]) -> None:
        kind = outcome["kind"]
        if kind in ("built", "refused"):  # nothing is left to go on with
            shutil.rmtree(self._checkpoints(job), ignore_errors=True)
        if kind == "built":
            self._keep(job, folder / "derived.tmp", outcome["report"])
        elif kind == "refused" and outcome["code"] == "method" and job["memory_gb"]:
            self._hold(job["id"], "memory", f"{outcome['reason']}. {MORE_MEMORY} `dicomnode retry job:{job['id']}`")
        elif kind == "refused":
            self._hold(job["id"], outcome["code"], f"{outcome['reason']}. Remedy: {outcome['remedy']}",
                       report=outcome.get("report"))
        elif kind in ("failed", "hung"):
            self._failed(job, outcome["reason"], outcome.get("code", ""))
        elif kind == "lost":
            self._again(job, outcome["reason"], code=outcome.get("code", "runner-lost"))
        elif kind == "stopped":
            self._ledger.set_job(job["id"], "queued", now=self._clock(), code="stopped", progress=None,
                                 reason="the worker was stopped", attempts=max(0, job["attempts"] - 1))
        log.info("job ended", action="job_ended", job=job["id"], outcome=kind, reason=outcome.get("reason", ""))

    def _keep(self, job: dict[str, Any], written: Path, report: dict[str, Any]) -> None:
        """Make the checked series durable under derived/JOB, then enter it: repeating this after a crash is safe."""
        report = {**report, "identity": job["identity"]}
        (written / REPORT_FILE).write_text(json.dumps(report, indent=1), encoding="utf-8")
        for path in written.iterdir():
            self._beat()
            _fsync_file(path)
        fsync_dir(written)
        target = self._spool.data_dir / "derived" / str(job["id"])
        if target.exists():
            shutil.rmtree(target)
        os.replace(written, target)
        fsync_dir(target.parent)
        self._enter(job, target, report)

    def _adopt(self, job: dict[str, Any]) -> bool:
        """Whether derived/JOB was finished by an earlier attempt that died before it could enter it."""
        target = self._spool.data_dir / "derived" / str(job["id"])
        try:
            report = json.loads((target / REPORT_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        whole = report["identity"] == job["identity"] and len(list(target.glob("*.dcm"))) == report["derived_instances"]
        if whole:
            self._enter(job, target, report)
        return whole

    def _enter(self, job: dict[str, Any], target: Path, report: dict[str, Any]) -> None:
        """The derived series, its deliveries and what it says of the PSF, in one transaction."""
        now = self._clock()
        with self._ledger.transaction():
            ours = self._ledger.built(job["id"], self.name, now=now, report=report,
                                      derived_series_uid=report["derived_series_uid"],
                                      derived_path=self._spool.relative(target),
                                      derived_instances=report["derived_instances"])
            if ours:
                keep_found(self._ledger, job, report, software_version=__version__, now=now)
        if not ours:
            log.info("job was taken away after it was built", action="job_taken", job=job["id"])

    def _hold(self, job_id: int, code: str, reason: str, **columns: Any) -> None:
        """For a person; a later `retry` begins with all the memory that the settings allow."""
        self._ledger.set_job(job_id, "held", now=self._clock(), code=code, reason=reason, memory_gb=None, **columns)
        log.warning("job held", action="job_held", job=job_id, code=code, reason=reason)

    def _again(self, job: dict[str, Any], reason: str, *, code: str) -> None:
        """What ran the job is gone: queued again after retry_s, the attempt not counted."""
        now = self._clock()
        self._ledger.set_job(job["id"], "queued", now=now, code=code, reason=reason, progress=None,
                             run_after=now + self._config.work.retry_s, attempts=max(0, job["attempts"] - 1))

    def _failed(self, job: dict[str, Any], reason: str, code: str = "") -> None:
        """Another attempt later, or held once all are used up. code: "memory", "device", "killed" (runner.py) or ""."""
        attempts, work = job["attempts"], self._config.work
        if attempts >= work.attempts:
            remedy = REMEDIES.get(code, "Remedy: look at the log, then")
            self._hold(job["id"], code if code in ("memory", "device") else "attempts",
                       f"{reason} (attempt {attempts} of {work.attempts}). {remedy} `dicomnode retry job:{job['id']}`")
            return
        less = self._less_memory(job, code)
        wait = min(LONGEST_WAIT_S, work.retry_s * 2.0 ** (attempts - 1))
        again = f"again in {wait:g} s" + (f" with {less:g} GB" if less else "")
        self._ledger.set_job(job["id"], "failed", now=self._clock(), code=code or "attempt",
                             run_after=self._clock() + wait, memory_gb=less or job["memory_gb"],
                             reason=f"{reason} (attempt {attempts} of {work.attempts}; {again})")
        log.warning("attempt failed", action="job_failed", job=job["id"], attempt=attempts, reason=reason)

    def _less_memory(self, job: dict[str, Any], code: str) -> float | None:
        """What the next attempt may use: half, where memory lacked or the GPU failed and the method can do with less.

        Who kills a child is unknown, unless it was the kernel: only a second time it is taken for a lack of memory.
        """
        again = job["attempts"] > 1 and self._ledger.count_events(job["id"], code="killed") > 0
        if code not in ("memory", "device") and not (code == "killed" and again):
            return None
        try:
            settings = self._full_settings(job["method"], job["preset"], job["settings"])
        except (identity.SettingsRefused, identity.SettingsUnknown) as error:
            log.warning("the next attempt may use as much memory", action="memory_unknown", job=job["id"],
                        reason=str(error))
            return None
        present = job["memory_gb"] or settings.get("memory_gb")
        return None if present is None else float(present) / 2


def _fsync_file(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
