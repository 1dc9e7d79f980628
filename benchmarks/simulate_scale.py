"""A site's days simulated: PET studies come in, wait for a processor, are deblurred and delivered. Tables, a picture.

    python benchmarks/simulate_scale.py [--days 28] [--seed 1] [--image docs/images/scale-out.png]

Discrete events, the same for the same seed. A study passes, in order,

    reception    one link; bytes of PET and CT at RECEPTION_MB_S
    completeness QUIET_S without a new instance
    window       jobs start when it is open; one that runs goes on
    processor    one job at a time on each GPU or core, first come first served; SERVICE_S of its kind
    node         reading, deriving, checking: NODE_CORES at a time on the node
    delivery     one series at a time at DELIVERY_MB_S

Where a time comes from is said beside it: "measured" (docs/benchmarks.md), "floor" (computed, cannot be faster),
"target" (a promise that nobody has measured), "assumed" (a guess about sites). docs/scale.md explains the results.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

HOUR, DAY = 3600.0, 86400.0

# --- arrivals (assumed)
STUDIES_A_DAY = 16  # a scanner and working day: one patient every 40 min from 07:30 to 18:00
OPENS, SLOT_S = 7.5 * HOUR, 40 * 60.0
NO_SHOW = 0.05
READY_S = (35 * 60.0, 0.4)  # from the start of the slot to the first C-STORE: median, sigma of its logarithm
BATCHED = 0.2  # are sent together at noon or in the evening, when somebody has looked at them
BATCH_TIMES = (12.5 * HOUR, 18.5 * HOUR)
WORKING_DAYS = 5  # of seven
HEAD_NECK = 0.3  # share of head-and-neck studies; the others are whole bodies
SPREAD = 0.25  # sigma of the logarithm of a study's size

# --- what a study is
SLICES = 267  # measured: a real whole body, 128 x 128; its derived series has 534 of 256 x 256
PET_MB, CT_MB, DERIVED_MB = 8.8, 140.0, 70.0  # the bytes of these, and of a CT slice of 512 x 512 for each of PET

# --- the node (measured)
RECEPTION_MB_S = 119.0  # a full gigabit link; the receiver alone took 180 (median)
QUIET_S = 30.0
NODE_S = 0.6 + 2.6 + 2.7  # read, derive, check of the real whole body
CLUSTER_S = 5.0  # starting the computation there, 18 MB to it and 140 MB back; its processor waits meanwhile
NODE_CORES = 2
DELIVERY_MB_S = 20.0  # C-STORE of objects of 256 x 256 to a DCMTK peer: 10 to 26 on a busy machine

#: kind of processor and preset -> (seconds of a whole body, of a head and neck, where they come from)
SERVICE_S: dict[str, tuple[float, float, str]] = {
    "best, CPU core": (374.0, 44.0, "measured"),
    "best, GPU": (300.0, 300.0, "target"),
    "paper, GPU": (361.0, 128.0, "floor"),  # 128 s for 64 x 128 x 128; a whole body has 2.8 times its voxels
    "paper, GPU, 3x its floor": (1083.0, 384.0, "assumed"),
}
WINDOWS: dict[str, tuple[float, float]] = {"always": (0.0, 24 * HOUR), "20:00-06:00": (20 * HOUR, 6 * HOUR)}


@dataclass(eq=False)
class Study:
    """Times in seconds since the midnight before the first day; NaN: not yet."""

    day: int
    sent: float
    head_neck: bool
    size: float  # in whole bodies of SLICES
    queued: float = np.nan
    started: float = np.nan
    delivered: float = np.nan


@dataclass
class Station:
    """Servers with one queue, first come first served."""

    name: str
    servers: int
    free: int = field(init=False)
    busy_s: float = 0.0
    longest: int = 0
    queue: deque[tuple[float, Callable[[], None], Callable[[], None]]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.free = self.servers


class Site:
    """The stations of a site and its calendar of events."""

    def __init__(self, processors: int, service: str, window: str) -> None:
        self.whole_s, self.head_s, _ = SERVICE_S[service]
        self.window = WINDOWS[window]
        self.now, self._count = 0.0, itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self.reception, self.processor = Station("reception", 1), Station("processor", processors)
        self.node, self.delivery = Station("node", NODE_CORES), Station("delivery", 1)

    @property
    def stations(self) -> tuple[Station, ...]:
        return self.reception, self.processor, self.node, self.delivery

    def at(self, time: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._count), call))

    def run(self, studies: Sequence[Study]) -> None:
        """Until every study is delivered."""
        for study in studies:
            self.at(study.sent, partial(self._receive, study))
        while self._events:
            self.now, _, call = heapq.heappop(self._events)
            call()

    def opens(self, time: float) -> float:
        """The next moment, `time` or later, at which the window is open."""
        first, last = self.window
        of_day = time % DAY
        inside = first <= of_day < last if first < last else of_day >= first or of_day < last
        return time if inside else time - of_day + first + (DAY if of_day > first else 0.0)

    def _serve(self, station: Station, seconds: float, then: Callable[[], None],
               begin: Callable[[], None] = lambda: None) -> None:
        station.queue.append((seconds, then, begin))
        station.longest = max(station.longest, len(station.queue))
        self._next(station)

    def _next(self, station: Station) -> None:
        while station.free and station.queue:
            opens = self.opens(self.now) if station is self.processor else self.now
            if opens > self.now:
                self.at(opens, lambda: self._next(station))
                return
            seconds, then, begin = station.queue.popleft()
            station.free -= 1
            station.busy_s += seconds
            begin()
            self.at(self.now + seconds, partial(self._done, station, then))

    def _done(self, station: Station, then: Callable[[], None]) -> None:
        station.free += 1
        then()
        self._next(station)

    # --- the path of a study

    def _receive(self, study: Study) -> None:
        self._serve(self.reception, study.size * (PET_MB + CT_MB) / RECEPTION_MB_S,
                    lambda: self.at(self.now + QUIET_S, lambda: self._queue(study)))

    def _queue(self, study: Study) -> None:
        study.queued = self.now
        seconds = (self.head_s if study.head_neck else self.whole_s) * study.size + CLUSTER_S

        def begin() -> None:
            study.started = self.now

        self._serve(self.processor, seconds, lambda: self._derive(study), begin)

    def _derive(self, study: Study) -> None:
        self._serve(self.node, NODE_S * study.size, lambda: self._deliver(study))

    def _deliver(self, study: Study) -> None:
        def end() -> None:
            study.delivered = self.now

        self._serve(self.delivery, study.size * DERIVED_MB / DELIVERY_MB_S, end)


def arrivals(scanners: int, days: int, rng: np.random.Generator) -> list[Study]:
    """The studies of `days` days (the sixth and seventh of a week are free), by the time they are sent."""
    studies = []
    for day, _, slot in itertools.product(range(days), range(scanners), range(STUDIES_A_DAY)):
        ready = OPENS + slot * SLOT_S + READY_S[0] * np.exp(READY_S[1] * rng.standard_normal())
        absent, batched, head_neck = rng.random(3) < (NO_SHOW, BATCHED, HEAD_NECK)
        size = float(np.exp(SPREAD * rng.standard_normal()))
        if batched:
            ready = next((time for time in BATCH_TIMES if time >= ready), ready)
        if day % 7 < WORKING_DAYS and not absent:
            studies.append(Study(day, day * DAY + float(ready), bool(head_neck), size))
    return sorted(studies, key=lambda study: study.sent)


@dataclass(frozen=True)
class Result:
    """What came of one site.

    days        working days.
    wait_s      from queued to started, seconds: median, 95th percentile.   turnaround_s  from sent to delivered.
    by_six      share of a day's studies that were delivered at 06:00 of the next.
    busy        share of the working days that each station worked; of the processors, while the window was open.
                Above 1: they are at it on the weekend too, or for longer than was simulated.
    bottleneck  the station with the largest share.
    """

    scanners: int
    processors: int
    service: str
    window: str
    studies: int
    days: int
    wait_s: tuple[float, float]
    turnaround_s: tuple[float, float]
    by_six: float
    busy: dict[str, float]
    bottleneck: str


def simulate(scanners: int, processors: int, service: str, window: str, *, days: int, seed: int) -> Result:
    """One site for `days` days. The arrivals depend on scanners, days and seed alone, so that results compare."""
    studies = arrivals(scanners, days, np.random.default_rng([seed, scanners]))
    site = Site(processors, service, window)
    site.run(studies)
    waits = np.array([study.started - study.queued for study in studies])
    turns = np.array([study.delivered - study.sent for study in studies])
    by_six = np.mean([study.delivered <= (study.day + 1) * DAY + 6 * HOUR for study in studies])
    working = sum(day % 7 < WORKING_DAYS for day in range(days))
    working_s = working * DAY
    first, last = WINDOWS[window]
    open_share = ((last - first) % DAY or DAY) / DAY
    busy = {station.name: station.busy_s / (station.servers * working_s) for station in site.stations}
    busy["processor"] /= open_share
    return Result(scanners, processors, service, window, len(studies), working, _two(waits), _two(turns),
                  float(by_six), busy, max(busy, key=lambda name: busy[name]))


def _two(values: np.ndarray) -> tuple[float, float]:
    return float(np.median(values)), float(np.percentile(values, 95))


PROCESSORS = (1, 2, 4, 8)
LOOKS = {"measured": "o-", "target": "s--", "floor": "v:", "assumed": "x-."}
SCANNERS = (1, 5, 20)


def tables(results: Sequence[Result]) -> str:
    """Three: jobs at any time; jobs at night; what the stations besides the processors do."""
    anytime = _pivot(results, "always", lambda one: f"{_hours(one.wait_s[0])} / {_hours(one.wait_s[1])}, "
                                                    f"{100 * one.busy['processor']:.0f} %")
    night = _pivot(results, "20:00-06:00", lambda one: f"{100 * one.by_six:.0f} %, {100 * one.busy['processor']:.0f} %")
    lines = ["| scanners | studies a day | reception | node | delivery |", "|" + "---|" * 5]
    for one in {one.scanners: one for one in results}.values():
        shares = " | ".join(f"{100 * one.busy[name]:.2f} %" for name in ("reception", "node", "delivery"))
        lines.append(f"| {one.scanners} | {one.studies / one.days:.0f} | {shares} |")
    return "\n\n".join([
        "Jobs start at any time: wait for a processor, median / 95th percentile; processors busy", anytime,
        "Jobs start 20:00-06:00: delivered by 06:00; processors busy while the window is open", night,
        "Share of a working day that the other stations are busy", "\n".join(lines)])


def _pivot(results: Sequence[Result], window: str, cell: Callable[[Result], str]) -> str:
    """A row for each kind of site that was simulated, a column for each number of processors."""
    numbers = sorted({one.processors for one in results})
    lines = ["| scanners | preset, processor | " + " | ".join(map(str, numbers)) + " |",
             "|" + "---|" * (2 + len(numbers))]
    for scanners, service in dict.fromkeys((one.scanners, one.service) for one in results):
        row = {one.processors: cell(one) for one in results
               if (one.scanners, one.service, one.window) == (scanners, service, window)}
        lines.append(f"| {scanners} | {service} ({SERVICE_S[service][2]}) | "
                     + " | ".join(row[number] for number in numbers) + " |")
    return "\n".join(lines)


def _hours(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 2 * HOUR else f"{seconds / HOUR:.1f} h"


def draw(results: Sequence[Result], path: Path) -> None:
    """Above: 95th percentile of the wait where jobs start at any time; below: done by 06:00 where they run at night."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(SCANNERS), figsize=(11, 6.2), sharex=True, sharey="row", layout="constrained")
    for column, scanners in enumerate(SCANNERS):
        for service in SERVICE_S:
            for row, window in enumerate(WINDOWS):
                chosen = [one for one in results
                          if (one.scanners, one.service, one.window) == (scanners, service, window)]
                values = [max(one.wait_s[1] / 60, 0.5) if row == 0 else 100 * one.by_six for one in chosen]
                axes[row, column].plot([one.processors for one in chosen], values, LOOKS[SERVICE_S[service][2]],
                                       label=f"{service} ({SERVICE_S[service][2]})")
        axes[0, column].set_title(f"{scanners} scanner{'s' if scanners > 1 else ''}")
        axes[1, column].set_xlabel("GPUs, or CPU cores, of the cluster")
    axes[0, 0].set_yscale("log")
    axes[0, 0].set_yticks([0.5, 10, 60, 600, 6000], ["< 1 min", "10 min", "1 h", "10 h", "100 h"])
    axes[0, 0].set_ylabel("jobs start at any time:\n95 % wait less than")
    axes[1, 0].set_ylabel("jobs start 20:00-06:00:\n% delivered by 06:00")
    axes[1, 0].set_xscale("log", base=2)
    axes[1, 0].set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.minorticks_off()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--days", type=int, default=28)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--image", type=Path)
    chosen = parser.parse_args()
    results = [simulate(scanners, processors, service, window, days=chosen.days, seed=chosen.seed)
               for scanners in SCANNERS for service in SERVICE_S for processors in PROCESSORS for window in WINDOWS]
    print(tables(results))
    if chosen.image:
        draw(results, chosen.image)


if __name__ == "__main__":
    main()
