"""What fits tonight: waiting jobs in the order in which they will be claimed, by how long such jobs took here.

The measurements are the jobs in the ledger that ran without a break: seconds from claim to built, by method, preset and
kind of device. A job is compared with those of like size (bytes received of its PET series, within LIKE); where none is
alike, with all of its kind, in proportion to size. Median and spread (1.4826 x the median absolute deviation, which is
the standard deviation where errors are normal) are robust: one night with a busy machine spoils nothing.

A forecast is a plan of the devices, no promise: it knows nothing of studies still to come or of failures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from dicomnode.config import Config
from dicomnode.ledger import Ledger
from dicomnode.views import timestamp
from dicomnode.windows import Openings

__all__ = ["Durations", "Estimate", "Expected", "Measured", "Running", "Waiting", "forecast", "plan", "reasons",
           "waits"]

LIKE = 1.5     # sizes within this factor are alike
ENOUGH = 3     # measurements of like size, before those of other sizes are looked at
RECENT = 200   # measurements of a kind that count: older ones are of other software and machines
SHOWN = 500   # jobs planned ahead
MAD_TO_SD = 1.4826


@dataclass(frozen=True)
class Measured:
    """One finished job: size in bytes, duration in seconds, `device` "cpu" or "cuda"."""

    method: str
    preset: str
    device: str
    size: int
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """Seconds expected, their spread (one standard deviation), and from how many measurements."""

    seconds: float
    spread_s: float
    jobs: int


@dataclass(frozen=True)
class Waiting:
    job: int
    route: str
    method: str
    preset: str
    size: int
    run_after: float
    urgent: bool = False


@dataclass(frozen=True)
class Running:
    job: int
    method: str
    preset: str
    size: int
    started_at: float
    device: str = ""


@dataclass(frozen=True)
class Expected:
    """When a waiting job starts and ends; `latest` is its end if it and those before it take one spread longer.

    verdict: fits; past-end (starts in the window, ends after it); not-tonight (starts in a later window);
    unknown (nothing was measured: of it, then it has a start, or of what runs before it, then it has none).
    """

    job: int
    verdict: str
    text: str
    start: float | None = None
    end: float | None = None
    latest: float | None = None


class Durations:
    """How long jobs took; give the newest last."""

    def __init__(self, measured: Iterable[Measured]) -> None:
        self._of: dict[tuple[str, str, str], list[Measured]] = {}
        self.newest_device = ""
        for one in measured:
            self._of.setdefault((one.method, one.preset, one.device), []).append(one)
            self.newest_device = one.device

    def expect(self, method: str, preset: str, device: str, size: int) -> Estimate | None:
        """None: no such job was measured on such a device."""
        known = self._of.get((method, preset, device), [])[-RECENT:]
        if not known:
            return None
        like = [one.seconds for one in known if size / LIKE <= one.size <= size * LIKE]
        if len(like) < min(ENOUGH, len(known)):
            like = [one.seconds * size / max(1, one.size) for one in known]
        middle = median(like)
        return Estimate(middle, MAD_TO_SD * median(abs(seconds - middle) for seconds in like), len(like))

    def table(self) -> list[dict[str, Any]]:
        """What is known, for people: per method, preset and device the number of jobs, median and spread."""
        rows = []
        for (method, preset, device), some in sorted(self._of.items()):
            middle = median(one.seconds for one in some)
            spread = MAD_TO_SD * median(abs(one.seconds - middle) for one in some)
            rows.append({"method": method, "preset": preset, "device": device, "jobs": len(some),
                         "median_s": round(middle, 1), "spread_s": round(spread, 1)})
        return rows


@dataclass
class _Lane:
    """A device, and when it is free again; infinite after a job of which nothing is known."""

    device: str
    free_at: float
    latest: float
    blocked_by: int | None = field(default=None)

    def take(self, start: float, estimate: Estimate | None, job: int) -> None:
        if estimate is None:
            self.free_at, self.blocked_by = math.inf, job
            return
        self.latest = max(start, self.latest) + estimate.seconds + estimate.spread_s
        self.free_at = start + estimate.seconds


def plan(waiting: Sequence[Waiting], running: Sequence[Running], devices: Sequence[str], durations: Durations,
         openings: Openings, *, now: float) -> list[Expected]:
    """What becomes of each waiting job (in the order of claims) on `devices` ("cpu", "cuda:0", "auto"), in parallel."""
    lanes = [_Lane(device, now, now) for device in devices]
    for busy in running:
        _occupy(lanes, busy, durations, now)
    left, found = list(waiting), list[Expected]()
    while left:
        lane = min(lanes, key=lambda one: one.free_at)
        if lane.free_at == math.inf:
            found += [Expected(job.job, "unknown", f"no measurement of job {lane.blocked_by}, which runs before it")
                      for job in left]
            break
        may = {route: openings.of(route).is_open(lane.free_at) for route in {job.route for job in left}}
        job = next((job for job in left if job.run_after <= lane.free_at and (job.urgent or may[job.route])), None)
        if job is None:
            begin = _earliest(left, openings, lane.free_at)
            lane.free_at, lane.latest = begin, max(begin, lane.latest)
            continue
        left.remove(job)
        estimate = durations.expect(job.method, job.preset, _kind(lane.device, durations), job.size)
        start = lane.free_at
        lane.take(start, estimate, job.job)
        found.append(_expected(job, openings, start, estimate, lane, now=now))
    return found


def _occupy(lanes: Sequence[_Lane], job: Running, durations: Durations, now: float) -> None:
    """A running job keeps its device: until its expected end; one that is overdue may end at any moment."""
    free = [lane for lane in lanes if lane.free_at == now]
    lane = next((lane for lane in free if lane.device == job.device), free[0] if free else None)
    if lane is None:
        return
    estimate = durations.expect(job.method, job.preset, _kind(lane.device, durations), job.size)
    lane.latest = job.started_at
    lane.take(job.started_at, estimate, job.job)
    lane.free_at, lane.latest = max(now + 1, lane.free_at), max(now + 1, lane.latest)


def _kind(device: str, durations: Durations) -> str:
    """"cpu" or "cuda"; for "auto" what the newest measured job ran on."""
    return durations.newest_device if device in ("auto", "") else device.partition(":")[0]


def _earliest(waiting: Sequence[Waiting], openings: Openings, moment: float) -> float:
    """When the first of them may start."""
    urgent = [max(moment, job.run_after) for job in waiting if job.urgent]
    others = {(job.route, max(moment, job.run_after)) for job in waiting if not job.urgent}
    return min([*urgent, *(openings.of(route).opens_at(begin) for route, begin in others)])


def _expected(job: Waiting, openings: Openings, start: float, estimate: Estimate | None, lane: _Lane, *,
              now: float) -> Expected:
    windows = openings.of(job.route)
    closes = math.inf if job.urgent else windows.closes_at(now)
    told = windows.text(start, now=now)
    if start >= closes:
        verdict = "not-tonight"
        text = f"does not fit before the window closes at {windows.text(closes, now=now)}; starts about {told}"
    else:
        verdict, text = "fits", f"starts about {told}"
    if estimate is None:
        text += f"; no measurement of {job.method} {job.preset} on this device yet"
        return Expected(job.job, verdict if verdict == "not-tonight" else "unknown", text, start)
    end = lane.free_at
    text += f", ends about {windows.text(end, now=now)}"
    if verdict == "fits" and end > closes:
        verdict, text = "past-end", f"{text}, after the window closes at {windows.text(closes, now=now)}"
    elif verdict == "fits" and lane.latest > closes:
        text += f", perhaps after the window closes at {windows.text(closes, now=now)}"
    return Expected(job.job, verdict, text, start, end, lane.latest)


def waits(row: Mapping[str, Any], openings: Openings, *, now: float) -> str:
    """Why a job (state, route, urgent, run_after) that is queued or failed does not run yet; "" where it may."""
    if row["state"] not in ("queued", "failed"):
        return ""
    windows = openings.of(row["route"])
    if not row["urgent"] and not windows.is_open(now):
        return f"window opens {windows.text(windows.opens_at(now), now=now)}"
    if row["run_after"] > now:
        return f"tried again {windows.text(row['run_after'], now=now)}"
    return "urgent: before all others" if row["urgent"] else "for its turn"


# --- from the ledger


def reasons(ledger: Ledger, config: Config, *, now: float) -> dict[int, str]:
    """Number of each waiting job -> why it does not run yet."""
    openings = Openings(config.schedule, config.route)
    return {row["id"]: waits(row, openings, now=now) for row in map(dict, ledger.query(
        "SELECT id, state, route, urgent, run_after FROM job WHERE state IN ('queued', 'failed')"))}


_SIZE = "(SELECT coalesce(sum(bytes), 0) FROM instance WHERE instance.series_uid = job.series_uid) AS size"
_MEASURED = f"""
SELECT method, preset, json_extract(report, '$.device') AS device, built_at - started_at AS seconds, {_SIZE}
  FROM job
 WHERE built_at IS NOT NULL AND started_at IS NOT NULL AND built_at > started_at AND json_valid(report)
   AND (SELECT count(*) FROM event WHERE event.series_uid = job.series_uid AND event.job_id = job.id
        AND event.to_state = 'running') < 2
 ORDER BY job.id DESC LIMIT {5 * RECENT}"""  # a job that went on from a checkpoint took longer than its last run
_WAITING = f"""
SELECT id AS job, route, method, preset, run_after, urgent, {_SIZE} FROM job WHERE state IN ('queued', 'failed')
 ORDER BY urgent DESC, priority DESC, id LIMIT {SHOWN}"""
_RUNNING = f"""
SELECT id AS job, method, preset, started_at, coalesce(device, '') AS device, {_SIZE}
  FROM job WHERE state = 'running' ORDER BY id"""


def forecast(ledger: Ledger, config: Config, *, now: float) -> dict[str, Any]:
    """The plan as a JSON value: devices, counts by verdict, the jobs in order of their start, and the measurements.

    `running`: when each running job is expected to end; no end where nothing of its kind was measured.
    """
    durations = Durations(Measured(row["method"], row["preset"], str(row["device"] or "").partition(":")[0],
                                   row["size"], row["seconds"]) for row in reversed(ledger.query(_MEASURED)))
    waiting = [Waiting(**{**dict(row), "urgent": bool(row["urgent"])}) for row in ledger.query(_WAITING)]
    running = [Running(**dict(row)) for row in ledger.query(_RUNNING)]
    work = config.work
    devices = ["auto"] * work.dask_jobs if work.executor == "dask" else list(work.devices) or [work.device]
    found = plan(waiting, running, devices, durations, Openings(config.schedule, config.route), now=now)
    verdicts = [one.verdict for one in found]
    return {
        "at": timestamp(now),
        "timezone": config.schedule.timezone,
        "devices": devices,
        "running": [{"job": one.job, **_ends(one, durations)} for one in running],
        "counts": {name: verdicts.count(name) for name in ("fits", "past-end", "not-tonight", "unknown")},
        "jobs": [{"job": one.job, "verdict": one.verdict, "start": timestamp(one.start), "end": timestamp(one.end),
                  "latest": timestamp(one.latest), "text": one.text} for one in found],
        "measured": durations.table(),
    }


def _ends(job: Running, durations: Durations) -> dict[str, str | None]:
    estimate = durations.expect(job.method, job.preset, _kind(job.device, durations), job.size)
    if estimate is None:
        return {"end": None, "latest": None}
    end = job.started_at + estimate.seconds
    return {"end": timestamp(end), "latest": timestamp(end + estimate.spread_s)}
