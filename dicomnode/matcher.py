"""From received series to jobs: the glue between ledger, spool and the pure rules of matching.py and routing.py.

`Matcher.tick` looks at every series that is due, decides, and writes the decision in one transaction, unless the series
changed while it was looked at: then the next tick looks again. What was held for a count, a conflict or late input and
then released by a person is processed as it is; eligibility and geometry stay as they are.

Input that changes after its series was sent follows late_input: hold asks a person; ignore keeps the objects and leaves
everything as it was; supersede makes a new job once nothing has come for a time that doubles with each job of the
series, so that a sender that stutters does not make a job of every object.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

from deconv import GUIDED
from dicomnode import __version__, identity
from dicomnode.config import Config, Route
from dicomnode.identity import SettingsRefused, SettingsUnknown
from dicomnode.ledger import Ledger, NewJob
from dicomnode.logs import get_logger
from dicomnode.matching import Arrival, Completeness, choose_guide, completeness, eligible, geometry_of, guide_wait
from dicomnode.memo import forget
from dicomnode.operate import urgent_memo
from dicomnode.psflibrary import PsfMissing, Resolution, resolve, settled, takes_psf
from dicomnode.retention import missing_files
from dicomnode.routing import first_route
from dicomnode.sourcecount import Look, SourceCounts
from dicomnode.spool import Spool
from dicomnode.spoolcheck import DAMAGED, LOST, resume
from sop.bounded import BoundedFile
from sop.pet import is_own_output

__all__ = ["Matcher"]

FullSettings = Callable[[str, str, Mapping[str, Any]], Mapping[str, Any]]

SENT = frozenset({"sending", "delivered", "committed"})
WAITING = frozenset({"queued", "running", "failed"})
OVER = frozenset({"cancelled", "superseded"})
LATE_WAIT_S = 3600.0  # the longest pause before a job follows the ones that a series has

log = get_logger(__name__)


@dataclass(frozen=True)
class _Decision:
    """What becomes of a series: its state, or `complete` with the job to make."""

    state: str
    code: str
    reason: str
    until: float | None = None
    is_guide: bool | None = None
    job: NewJob | None = None


@dataclass(frozen=True)
class _Seen:
    """A series at the moment it was looked at."""

    row: dict[str, Any]
    instances: tuple[dict[str, Any], ...]
    header: Dataset
    missing: int  # so many of the files were removed ([retention])

    @property
    def uid(self) -> str:
        return str(self.row["series_uid"])

    @property
    def sop_instance_uids(self) -> tuple[str, ...]:
        return tuple(sorted(row["sop_instance_uid"] for row in self.instances))

    @property
    def arrivals(self) -> tuple[Arrival, ...]:
        return tuple(Arrival(row["sop_instance_uid"], row["received_at"], row["position"], row["orientation"],
                             row["frames"]) for row in self.instances)


class Matcher:
    """Decides over due series.

    poll_s         how often a PET that waits for its CT is looked at again.
    full_settings  all settings of a method's preset; asks a child process unless told otherwise.
    counts         asks the source of a route (route.source) how many instances of a series it holds.
    """

    def __init__(self, config: Config, ledger: Ledger, spool: Spool, *, clock: Callable[[], float] = time.time,
                 poll_s: float = 2.0, full_settings: FullSettings = identity.full_settings,
                 counts: SourceCounts | None = None) -> None:
        self._config, self._ledger, self._spool, self._clock = config, ledger, spool, clock
        self._poll_s, self._full_settings = poll_s, full_settings
        self._counts = counts or SourceCounts(config, ledger, clock=clock, poll_s=poll_s)

    def prepare(self) -> None:
        """Ask for the settings of every route ahead of time: the first study need not wait, a wrong route shows now."""
        for route in self._config.route:
            try:
                self._full_settings(route.method, route.preset, route.settings)
            except SettingsRefused as error:
                log.error(f"route {route.name} cannot be used", action="route_unusable", reason=str(error))
            except SettingsUnknown as error:  # also where the node is stopped meanwhile
                log.warning(f"the settings of route {route.name} are asked for again with its first series",
                            action="settings_unknown", reason=str(error))

    def tick(self) -> int:
        """Look at every series that is due; how many were."""
        resume(self._ledger, self._spool, now=self._clock())
        due = self._ledger.due_series(now=self._clock(), quiet_s=self._config.completeness.quiet_s)
        # Guides first: a PET and its CT that become quiet together meet in one tick.
        for row in sorted(due, key=lambda row: row["modality"] != "CT"):
            self._look(row)
        return len(due)

    def _look(self, row: dict[str, Any]) -> None:
        try:
            seen = self._see(row)
            decision = self._decide(seen)
        except (OSError, InvalidDicomError) as error:
            decision = _Decision("held", "unreadable", f"a stored instance cannot be read: {error}. Remedy: look at "
                                 "the data directory; `dicomnode retry` looks again")
        except sqlite3.Error:
            raise
        except Exception as error:
            # A series that trips a bug must neither stop the others nor be looked at for ever: a person is told.
            log.exception("series cannot be judged", action="match_error", series=row["series_uid"])
            decision = _Decision("held", "internal", f"{type(error).__name__}: {error}. Remedy: report it with the "
                                 "log; `dicomnode retry` looks again")
        self._commit(row, decision)

    def _see(self, row: dict[str, Any]) -> _Seen:
        """The series with one header; of the middle instance, so that a scout sent ahead does not speak for all."""
        instances = tuple(self._ledger.instances(row["series_uid"]))
        gone = frozenset(missing_files(instances, self._spool.data_dir))
        there = [one for one in instances if one["sop_instance_uid"] not in gone] or instances
        chosen = sorted(there, key=lambda one: one["sop_instance_uid"])[len(there) // 2]
        return _Seen(row, instances, _header(self._spool.absolute(chosen["path"])), len(gone))

    # --- decide

    def _decide(self, seen: _Seen) -> _Decision:
        own = (is_own_output(seen.header, self._config.node.uid_root)
               or self._ledger.job_of_derived(seen.uid) is not None)
        verdict = eligible(seen.header, own_output=own)
        if verdict.kind == "ignored":
            return _Decision("ignored", verdict.code, verdict.reason)
        if verdict.kind == "refused":
            return _Decision("held", verdict.code, f"{verdict.reason}. Remedy: {verdict.remedy}")
        conflicts = self._ledger.conflicts(seen.uid)
        if conflicts and not seen.row["released"]:
            return _Decision("held", "conflict", _conflict_text(conflicts))
        if verdict.kind == "guide":
            return _Decision("ignored", "guide", "kept as guide for PET series of its study", is_guide=True)
        return self._ignore_late(seen) or self._decide_pet(seen)

    def _ignore_late(self, seen: _Seen) -> _Decision | None:
        """Where what came after the series was sent is to be ignored: it need not even be whole with it."""
        if seen.row["released"] or self._late_input(
                first_route(self._config.route, seen.header, calling_ae=seen.row["calling_ae"])) != "ignore":
            return None
        sent = self._sent_jobs(seen.uid)
        late = set(seen.sop_instance_uids) - {uid for job in sent for uid in job["inputs"]}
        if not sent or not late:
            return None
        return _ignoring(seen.uid, f"{len(late)} objects came after job {sent[-1]['id']} was sent")

    def _late_input(self, route: Route | None) -> str:
        return (route.late_input if route else None) or self._config.completeness.late_input

    def _sent_jobs(self, series_uid: str) -> list[dict[str, Any]]:
        return [job for job in self._ledger.jobs_of_series(series_uid)
                if job["state"] not in OVER and self._has_sent(job)]

    def _decide_pet(self, seen: _Seen) -> _Decision:
        if seen.missing:
            return _Decision("held", "input-gone", f"{seen.missing} of {len(seen.instances)} objects were removed "
                             "([retention]) before others came. Remedy: have the whole series sent again, then "
                             f"`dicomnode retry {seen.uid}`; or `dicomnode cancel {seen.uid}`")
        limits = self._config.completeness
        route = first_route(self._config.route, seen.header, calling_ae=seen.row["calling_ae"])
        look = None
        if route is not None and route.source is not None and not seen.row["released"]:
            look = self._counts.look(route.source, seen.row, route=route.name)
        whole = completeness(seen.arrivals, seen.header, now=self._clock(), quiet_s=limits.quiet_s,
                             give_up_h=limits.give_up_h, expected_instances=look.count if look else None)
        if look is not None:
            whole = self._by_source(seen, whole, look)
        if whole.state == "waiting" and (whole.code == "quiet" or not seen.row["released"]):
            return _Decision("waiting", whole.code, whole.reason, until=whole.until)
        if whole.state == "held" and not seen.row["released"]:
            return _Decision("held", whole.code, f"{whole.reason}. Remedy: {whole.remedy}, or "
                             f"`dicomnode release {seen.uid}` to process it as it is")
        if route is None:
            return _Decision("ignored", "no-route", "no route matches. Remedy if one should: add a [[route]], start "
                             f"the node again, then `dicomnode retry {seen.uid}`")
        return self._decide_guide(seen, route, whole.reason)

    def _by_source(self, seen: _Seen, whole: Completeness, look: Look) -> Completeness:
        """What the source adds to the verdict: no series is whole before its count is known and agrees."""
        if whole.code == "quiet" or whole.state == "held" or (whole.state == "complete" and look.count is not None):
            return whole
        limits = self._config.completeness
        give_up = seen.row["last_at"] + limits.give_up_h * 3600
        why = look.reason if whole.state == "complete" else f"{whole.reason}; {look.reason}"
        if whole.state == "complete" and self._clock() >= give_up:
            return Completeness("held", "source-count", f"{why}; nothing new for {limits.give_up_h:g} h",
                                remedy="let the source be reached")
        until = min(look.again_at, give_up)
        return Completeness("waiting", "source-count" if whole.state == "complete" else whole.code, why, until)

    def _decide_guide(self, seen: _Seen, route: Route, whole: str) -> _Decision:
        if route.guide == "never":
            return self._decide_job(seen, route, None, f"{whole}; route {route.name} uses no guide")
        now, limits = self._clock(), self._config.completeness
        completed_at = seen.row["last_at"] + limits.quiet_s
        wait_s = limits.ct_wait_s if route.ct_wait_s is None else route.ct_wait_s
        if (route.method, route.preset) not in GUIDED and route.guide == "prefer":
            wait_s = 0.0
        study = self._ledger.series_of_study(seen.row["study_uid"])
        if any(self._may_become_guide(row, now) for row in study) and now < completed_at + wait_s:
            return _Decision("waiting", "ct", "waiting for a CT of the study that is still arriving",
                             until=min(now + self._poll_s, completed_at + wait_s))
        gone = self._guides_gone(seen) if (route.method, route.preset) in GUIDED else []
        if gone and not seen.row["released"]:
            return _Decision("held", "input-gone", f"CT series {gone[0]} is not whole on disk. Remedy: have it "
                             f"sent again, then `dicomnode retry {seen.uid}`; or `dicomnode release {seen.uid}` "
                             "processes the PET without it")
        guides = {guide.uid: guide for guide in self._guides(seen)}
        pet = geometry_of(seen.arrivals, seen.header)
        choice = choose_guide(pet, [geometry_of(ct.arrivals, ct.header, normal=pet.axis) for ct in guides.values()])
        decision = guide_wait(choice, completed_at=completed_at, now=now, ct_wait_s=wait_s,
                              allow_unguided=route.guide == "prefer" or bool(seen.row["released"]))
        considered = "".join(f"; CT {uid} {why}" for uid, why in choice.considered)
        if decision.state == "waiting" and decision.until is not None:
            return _Decision("waiting", "ct", decision.reason + considered,
                             until=min(now + self._poll_s, decision.until))
        if decision.state == "held":
            return _Decision("held", decision.code, decision.reason + considered)
        guide = guides[choice.series_uid] if choice.series_uid else None
        return self._decide_job(seen, route, guide, f"{whole}; {decision.reason}{considered}")

    def _may_become_guide(self, row: dict[str, Any], now: float) -> bool:
        """A CT that is not judged yet, or a guide to which instances still come."""
        if row["modality"] != "CT":
            return False
        return row["state"] in ("receiving", "waiting") or (
            bool(row["is_guide"]) and now < row["last_at"] + self._config.completeness.quiet_s)

    def _guides(self, seen: _Seen) -> list[_Seen]:
        gone = self._guides_gone(seen)
        return [self._see(row) for row in self._guide_rows(seen) if row["series_uid"] not in gone]

    def _guides_gone(self, seen: _Seen) -> list[str]:
        return [row["series_uid"] for row in self._guide_rows(seen)
                if row["state"] == "held"
                or missing_files(self._ledger.instances(row["series_uid"]), self._spool.data_dir)]

    def _guide_rows(self, seen: _Seen) -> list[dict[str, Any]]:
        return [row for row in self._ledger.series_of_study(seen.row["study_uid"])
                if row["is_guide"] and (row["state"] == "ignored" or row["code"] in (DAMAGED, LOST))]

    def _decide_job(self, seen: _Seen, route: Route, guide: _Seen | None, why: str) -> _Decision:
        # A CT that the method does not look at is noted with the job, but decides nothing about the image.
        guide_inputs = guide.sop_instance_uids if guide and (route.method, route.preset) in GUIDED else ()

        def digest(settings: Mapping[str, Any]) -> str:
            return identity.job_identity(
                inputs=seen.sop_instance_uids, guide_inputs=guide_inputs, method=route.method,
                settings=self._full_settings(route.method, route.preset, settings), software_version=__version__)

        try:
            psf = self._psf(seen, route, digest)
            settings = {**route.settings, **psf.overrides}
            made = digest(settings)
        except PsfMissing as error:
            return _Decision("held", "psf", f"route {route.name}: {error}. Remedy: `dicomnode calibrate` on a phantom "
                             "of this scanner and reconstruction, or another `psf` in the route, then `dicomnode "
                             f"retry {seen.uid}`")
        except SettingsRefused as error:
            return _Decision("held", "settings", f"route {route.name}: {error}. Remedy: mend the route, then "
                             f"`dicomnode retry {seen.uid}`")
        except SettingsUnknown as error:
            log.error("settings cannot be determined", action="settings_unknown", series=seen.uid, reason=str(error))
            return _Decision("waiting", "settings-unknown", str(error), until=self._clock() + self._poll_s)
        job = NewJob(
            identity=made, series_uid=seen.uid, study_uid=seen.row["study_uid"],
            guide_series_uid=guide.uid if guide else None, route=route.name, method=route.method, preset=route.preset,
            settings=settings, send_to=route.send_to, inputs=(*seen.sop_instance_uids, *guide_inputs),
            priority=route.priority, urgent=route.urgent,
        )
        return _Decision("complete", "complete", f"{why}; {psf.why}" if psf.why else why, job=job)

    def _psf(self, seen: _Seen, route: Route, digest: Callable[[Mapping[str, Any]], str]) -> Resolution:
        """The PSF of an earlier job on the same input, else what the library knows now."""
        if not takes_psf(route.method, route.preset) and route.psf != "measured":
            return Resolution({}, "")
        before = settled(self._ledger, seen.uid, policy=route.psf, method=route.method, preset=route.preset,
                         settings=route.settings, same=digest)
        return before or resolve(self._ledger, seen.header, policy=route.psf, method=route.method, preset=route.preset,
                                 settings=route.settings)

    # --- act

    def _commit(self, seen: dict[str, Any], decision: _Decision) -> None:
        """Write the decision, if the series is still as it was seen."""
        uid = seen["series_uid"]
        with self._ledger.transaction():
            row = self._ledger.series(uid)
            if any(row[key] != seen[key] for key in ("state", "code", "instances", "last_at", "released")):
                return
            if decision.job is not None:
                decision = self._late(row, decision)
            self._ledger.set_series(uid, decision.state, now=self._clock(), code=decision.code, reason=decision.reason,
                                    until=decision.until, is_guide=decision.is_guide)
            if decision.job is not None:
                self._make(decision.job)
        if (decision.state, decision.code) != (row["state"], row["code"]):
            log.info("series judged", action="series_judged", series=uid, state=decision.state, code=decision.code,
                     reason=decision.reason)

    def _late(self, row: dict[str, Any], decision: _Decision) -> _Decision:
        """Other inputs than those of jobs that the series has: late_input decides over a series that is out already."""
        assert decision.job is not None
        uid, identity = row["series_uid"], decision.job.identity
        before = [job for job in self._ledger.jobs_of_series(uid) if job["identity"] != identity]
        out = [job for job in self._sent_jobs(uid) if job["identity"] != identity]
        if not before or row["released"]:
            return decision
        policy = self._late_input(self._config.named_route(decision.job.route))
        changed = f"input changed after job {before[-1]['id']} was made"
        if out:
            changed = (f"input changed after job {out[-1]['id']} was sent: {len(out[-1]['inputs'])} instances then, "
                       f"{len(decision.job.inputs)} now")
        if out and policy == "hold":
            return replace(decision, state="held", code="late-input", job=None, reason=f"{changed}. Remedy: `dicomnode "
                           f"release {uid}` makes a new derived series that supersedes the one sent")
        if out and policy == "ignore":
            return _ignoring(uid, changed)
        pause = min(LATE_WAIT_S, self._config.completeness.quiet_s * 2.0 ** min(len(before) - (not out), 40))
        until = row["last_at"] + pause
        if self._clock() >= until:
            return decision
        return replace(decision, state="waiting", code="late-input", until=until, job=None, reason=f"{changed}; a new "
                       f"job follows when nothing has come for {pause:g} s")

    def _has_sent(self, job: dict[str, Any]) -> bool:
        return job["state"] in SENT or any(
            self._ledger.statuses(delivery["id"]) for delivery in self._ledger.deliveries(job["id"]))

    def _make(self, new: NewJob) -> None:
        """Queue the job; unfinished or released earlier ones of the series are superseded by it."""
        now, before = self._clock(), self._ledger.jobs_of_series(new.series_uid)
        wished = forget(self._ledger, urgent_memo(new.series_uid))
        wished = wished or any(job["urgent"] for job in before if job["state"] in WAITING)
        job_id = self._ledger.add_job(replace(new, urgent=new.urgent or wished), now=now)
        for job in before:
            if job["id"] != job_id and job["state"] not in OVER:
                self._ledger.set_job(job["id"], "superseded", now=now, code="late-input",
                                     reason=f"superseded by job {job_id}: other input")
        # What a person released is done with: what comes after this job is late input again.
        self._ledger.set_series(new.series_uid, "matched", now=now, released=False)


def _conflict_text(conflicts: Sequence[dict[str, Any]]) -> str:
    uids = sorted({row["sop_instance_uid"] for row in conflicts})
    more = f" and {len(uids) - 1} more" if len(uids) > 1 else ""
    return (f"other bytes came under known SOP Instance UID {uids[0]}{more}; the first ones are in use. Remedy: find "
            f"out which are right; `dicomnode release {conflicts[0]['series_uid']}` goes on with the first")


def _ignoring(series_uid: str, what: str) -> _Decision:
    """Everything stays as it was."""
    return _Decision("matched", "late-input", f"{what}; kept, not used (late_input). Remedy if it should be used: "
                     f"`dicomnode release {series_uid}` makes a new derived series that supersedes the one sent")


def _header(path: Path) -> Dataset:
    """Raises OSError, InvalidDicomError."""
    try:
        with BoundedFile(path) as file:
            return dcmread(file, stop_before_pixels=True)
    except (OSError, InvalidDicomError):
        raise
    except Exception as error:  # a damaged file makes the parser raise nearly anything
        raise InvalidDicomError(f"{path.name} is damaged ({type(error).__name__})") from error
