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
    disk full  the same, after a wait that doubles: a night with a full disk must not hold every study
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
from hashlib import sha256
from pathlib import Path
from typing import Any

from dicomnode import __version__, companions, identity
from dicomnode.config import Config, Route
from dicomnode.errors import NotFound, TransitionRefused
from dicomnode.ledger import Ledger
from dicomnode.logs import get_logger
from dicomnode.process import trouble
from dicomnode.psflibrary import keep_found
from dicomnode.runner import LAST_WORDS, ChildRunner, Runner, Running
from dicomnode.spool import Spool, fsync_dir
from dicomnode.spoolcheck import DAMAGED
from dicomnode.states import OTHER_IMAGE

__all__ = ["Executor", "RECIPE", "REPORT_FILE", "report_in"]

REPORT_FILE = "report.json"
#: What the report on disk tells of its job under "job", so that a ledger that was lost can know it again (rebuild.py).
RECIPE = ("series_uid", "study_uid", "guide_series_uid", "route", "method", "preset", "settings", "send_to", "inputs",
          "priority", "urgent", "created_at")
DISK_FULL = "disk-full"
NOT_MADE = "companion"  # code of an event: something wanted beside the derived series could not be made
LOST_LIMIT = 100  # a job that was running each time the whole node died so often is not tried again unseen
FULL_LIMIT = 48  # so often a full disk ends a job before a person is asked: about two days
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
                self._hold(job, "worker-lost", f"the worker died {times} times while this job ran. Remedy: look "
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
            except sqlite3.OperationalError as error:
                # Other devices' jobs go on. Its lease runs out; who takes it up then finds what was kept of it.
                log.error("what became of a job cannot be written into the ledger", action="conclude_failed",
                          job=job["id"], error=str(error), again_s=LEDGER_WAIT_S)
                stop.wait(LEDGER_WAIT_S)
            finally:
                self.job_id = None

    def run_job(self, job: dict[str, Any], stop: threading.Event) -> None:
        """Run one claimed job to its next state. Raises sqlite3.OperationalError where that cannot be written."""
        with self._ledger.transaction() as db:
            db.execute("UPDATE job SET device = ? WHERE id = ?", (self.device, job["id"]))
        # Of its own for each attempt: one whose lease ran out may still be ending.
        folder = self._spool.data_dir / "work" / f"{job['id']}.{job['attempts']}"
        try:
            self._attempt(job, folder, stop)
        except (TransitionRefused, NotFound) as error:
            log.info("job was taken away", action="job_taken", job=job["id"], reason=str(error))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _attempt(self, job: dict[str, Any], folder: Path, stop: threading.Event) -> None:
        if self._adopt(job):
            return
        if job["attempts"] > self._config.work.attempts:
            self._hold(job, "attempts", f"{job['reason'] or 'every attempt failed'}; attempts used up. Remedy: "
                       f"look at the log, then `dicomnode retry job:{job['id']}`")
            return
        try:
            order = self._order(job)
            if missing := len(job["inputs"]) - len(order["digests"]):
                self._hold(job, DAMAGED, f"{missing} of its {len(job['inputs'])} input objects are lost. Remedy: send "
                           "series and CT again; the job goes on by itself")
                return
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o700)
            outcome = self._run(job, order, folder, stop)
            self._conclude(job, folder, outcome)
        except OSError as error:
            self._failed(job, f"cannot prepare or keep the work of the job: {error}", trouble(str(error)))

    # --- the order

    def _order(self, job: dict[str, Any]) -> dict[str, Any]:
        """All that the pipeline needs to know, but its device; it opens neither the ledger nor the configuration."""
        guide = job["guide_series_uid"]
        route = self._config.named_route(job["route"])
        derived, node = self._config.derived, self._config.node
        return {
            "pet_files": self._files(job["series_uid"], job["inputs"]),
            "guide_files": self._files(guide, job["inputs"]) if guide else [],
            "digests": self._digests(job),
            "guide_required": route is not None and route.guide == "require",
            "method": job["method"],
            "preset": job["preset"],
            "settings": {**job["settings"], **({"memory_gb": job["memory_gb"]} if job["memory_gb"] else {})},
            "checkpoints": str(self._checkpoints(job)),
            "also": list(route.also) if route else [],
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

    def _digests(self, job: dict[str, Any]) -> dict[str, str]:
        """File -> SHA-256 of the data set in it, as it was received."""
        wanted = frozenset(job["inputs"])
        return {str(self._spool.absolute(row["path"])): row["sha256"]
                for uid in (job["series_uid"], job["guide_series_uid"]) if uid
                for row in self._ledger.instances(uid) if row["sop_instance_uid"] in wanted}

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
            if problem := outcome["report"].get("looks", {}).get("problem"):
                log.warning("a derived series goes on without pictures", action="looks_missing", job=job["id"],
                            reason=problem)
            self._keep(job, folder / "derived.tmp", outcome["report"])
        elif kind == "refused" and outcome["code"] == "method" and job["memory_gb"]:
            self._hold(job, "memory", f"{outcome['reason']}. {MORE_MEMORY} `dicomnode retry job:{job['id']}`")
        elif kind == "refused":
            self._hold(job, outcome["code"], f"{outcome['reason']}. Remedy: {outcome['remedy']}",
                       report=outcome.get("report"))
        elif kind in ("failed", "hung"):
            self._failed(job, outcome["reason"], outcome.get("code", ""))
        elif kind == "lost":
            self._again(job, outcome["reason"], code=outcome.get("code", "runner-lost"))
        elif kind == "stopped":
            self._set(job, "queued", code="stopped", progress=None, reason="the worker was stopped",
                      attempts=max(0, job["attempts"] - 1))
        log.info("job ended", action="job_ended", job=job["id"], outcome=kind, reason=outcome.get("reason", ""))

    def _keep(self, job: dict[str, Any], written: Path, report: dict[str, Any]) -> None:
        """Make the checked series durable under derived/JOB, then enter it: repeating this after a crash is safe."""
        for path in written.rglob("*"):
            self._beat()
            if path.is_dir():
                fsync_dir(path)
            else:
                _fsync_file(path)
        report = {**report, "identity": job["identity"], "files_sha256": self._digest(written)}
        told = {**report, "job": {key: job[key] for key in RECIPE}}
        (written / REPORT_FILE).write_text(json.dumps(told, indent=1), encoding="utf-8")
        _fsync_file(written / REPORT_FILE)
        fsync_dir(written)
        target = self._spool.data_dir / "derived" / str(job["id"])
        with self._ledger.transaction():  # what another worker has made of the job meanwhile is not replaced
            self._require_ours(job)
            if target.exists():
                shutil.rmtree(target)
            os.replace(written, target)
            fsync_dir(target.parent)
        self._enter(job, target, report)

    def _digest(self, folder: Path) -> str:
        """SHA-256 over the derived objects, in the order of their names."""
        digest = sha256()
        for path in sorted(folder.glob("*.dcm")):
            self._beat()
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def _adopt(self, job: dict[str, Any]) -> bool:
        """Whether derived/JOB was finished by an earlier attempt that died before it could enter it."""
        target = self._spool.data_dir / "derived" / str(job["id"])
        report = report_in(target)
        if report is None:
            return False
        report.pop("job", None)  # the ledger knows it
        whole = (report["identity"] == job["identity"]
                 and len(list(target.glob("*.dcm"))) == report["derived_instances"]
                 and report.get("files_sha256") in (None, self._digest(target))
                 and companions.whole(target, report))
        if whole:
            self._enter(job, target, report)
        return whole

    def _enter(self, job: dict[str, Any], target: Path, report: dict[str, Any]) -> None:
        """The derived series, its deliveries and what it says of the PSF, in one transaction."""
        now = self._clock()
        with self._ledger.transaction():
            if self._differs_from_sent(job, report):
                self._hold_other_image(job, report)
                return
            ours = self._ledger.built(job["id"], self.name, now=now, report=report,
                                      derived_series_uid=report["derived_series_uid"],
                                      derived_path=self._spool.relative(target),
                                      derived_instances=report["derived_instances"])
            if ours:
                keep_found(self._ledger, job, report, software_version=__version__, now=now)
                self._tell_left_out(job, report, now)
        if not ours:
            log.info("job was taken away after it was built", action="job_taken", job=job["id"])

    def _tell_left_out(self, job: Mapping[str, Any], report: Mapping[str, Any], now: float) -> None:
        """What the route wanted beside the derived series and could not be made: in the history and the log."""
        for of, why in report.get("also", {}).get("left_out", {}).items():
            self._ledger.event("job", now=now, study_uid=job["study_uid"], series_uid=job["series_uid"],
                               job_id=job["id"], code=NOT_MADE,
                               reason=f"{of} could not be made, the derived series goes out without: {why}")
            log.warning("not made beside a derived series", action="companion_left_out", job=job["id"], kind=of,
                        reason=why)

    def _sent_to(self, job: Mapping[str, Any]) -> list[str]:
        """The peers that have answered to any instance of the job's derived series."""
        return [delivery["peer"] for delivery in self._ledger.deliveries(job["id"])
                if self._ledger.statuses(delivery["id"])]

    def _differs_from_sent(self, job: Mapping[str, Any], report: Mapping[str, Any]) -> bool:
        """Whether a series that was computed anew is not the one of which a peer has something already."""
        old = job["report"] or {}
        if job["derived_series_uid"] is None or not self._sent_to(job):
            return False
        return bool(job["derived_series_uid"] != report["derived_series_uid"]
                    or old.get("files_sha256", "") not in ("", report.get("files_sha256", ""))
                    or companions.changed(old, report))

    def _hold_other_image(self, job: dict[str, Any], report: Mapping[str, Any]) -> None:
        """One UID never means two images, and no peer gets a second series unasked.

        The row keeps what was sent; the new one lies in derived/JOB, and only `operate.release` sends it.
        """
        uid = report["derived_series_uid"]
        named = "other bytes under the same UIDs" if uid == job["derived_series_uid"] else f"another series, {uid}"
        self._hold(job, OTHER_IMAGE, f"series {job['derived_series_uid']} was sent to {', '.join(self._sent_to(job))}, "
                   f"wholly or in part, and its files were lost; computed again it is {named} (less memory, another "
                   "machine or configuration). Remedy: put its files back and `dicomnode retry job:"
                   f"{job['id']}`; or have it removed there, then `dicomnode release job:{job['id']}` sends the new "
                   "one to every peer", derived_path=None)

    def _require_ours(self, job: Mapping[str, Any]) -> None:
        """Raises TransitionRefused where another worker has the job by now: its lease had run out."""
        row = self._ledger.job(job["id"])
        if row["state"] == "running" and (row["lease_owner"], row["attempts"]) != (job["lease_owner"], job["attempts"]):
            raise TransitionRefused(f"{row['lease_owner']} has taken up job {job['id']}")

    def _set(self, job: Mapping[str, Any], state: str, **columns: Any) -> None:
        with self._ledger.transaction():
            self._require_ours(job)
            self._ledger.set_job(job["id"], state, now=self._clock(), **columns)

    def _hold(self, job: Mapping[str, Any], code: str, reason: str, **columns: Any) -> None:
        """For a person; a later `retry` begins with all the memory that the settings allow, if nothing was sent."""
        if not self._sent_to(job):
            columns["memory_gb"] = None
        self._set(job, "held", code=code, reason=reason, **columns)
        log.warning("job held", action="job_held", job=job["id"], code=code, reason=reason)

    def _again(self, job: dict[str, Any], reason: str, *, code: str, wait_s: float | None = None) -> None:
        """What ran the job is gone: queued again after retry_s (or `wait_s`), the attempt not counted."""
        self._set(job, "queued", code=code, reason=reason, progress=None, attempts=max(0, job["attempts"] - 1),
                  run_after=self._clock() + (self._config.work.retry_s if wait_s is None else wait_s))

    def _failed(self, job: dict[str, Any], reason: str, code: str = "") -> None:
        """Another attempt later, or held once all are used up. code: "memory", "device", "disk", "killed" or ""."""
        attempts, work = job["attempts"], self._config.work
        if code == "disk" and (times := self._ledger.count_events(job["id"], code=DISK_FULL)) < FULL_LIMIT:
            self._again(job, f"{reason}: it is tried again when there may be room. Remedy: free disk space",
                        code=DISK_FULL, wait_s=min(LONGEST_WAIT_S, work.retry_s * 2.0 ** min(times, 20)))
            return
        if attempts >= work.attempts:
            remedy = REMEDIES.get(code, "Remedy: look at the log, then")
            self._hold(job, code if code in ("memory", "device") else "attempts",
                       f"{reason} (attempt {attempts} of {work.attempts}). {remedy} `dicomnode retry job:{job['id']}`")
            return
        less = self._less_memory(job, code)
        wait = min(LONGEST_WAIT_S, work.retry_s * 2.0 ** (attempts - 1))
        again = f"again in {wait:g} s" + (f" with {less:g} GB" if less else "")
        self._set(job, "failed", code=code or "attempt", run_after=self._clock() + wait,
                  memory_gb=less or job["memory_gb"],
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


def report_in(folder: Path) -> dict[str, Any] | None:
    """report.json of a derived folder; None where there is none, or the disk has damaged it."""
    try:
        report = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    fits = (isinstance(report, dict) and isinstance(report.get("identity"), str)
            and isinstance(report.get("derived_series_uid"), str) and isinstance(report.get("derived_instances"), int))
    return report if fits else None


def _fsync_file(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
