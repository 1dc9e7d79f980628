"""The simulation of a site behind docs/scale.md: it loses no study, obeys windows and queueing theory, and repeats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import simulate_scale as simulation
from benchmarks.simulate_scale import DAY, HOUR, Site, Study

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scale.md"


def run(studies: list[Study], processors: int, window: str = "always", service: str = "best, CPU core") -> Site:
    site = Site(processors, service, window)
    site.run(studies)
    return site


def at(*times: float) -> list[Study]:
    return [Study(int(time // DAY), time, False, 1.0) for time in times]


def test_the_same_seed_gives_the_same_result_and_another_another():
    """What the page shows can be had again."""
    first, again, other = (simulation.simulate(2, 1, "best, CPU core", "always", days=7, seed=seed)
                           for seed in (1, 1, 2))
    assert first == again and first.wait_s != other.wait_s


@given(st.lists(st.floats(0, 3 * DAY), max_size=30), st.integers(1, 4), st.sampled_from(list(simulation.WINDOWS)))
def test_every_study_is_delivered_in_order_and_starts_only_while_the_window_is_open(times, processors, window):
    """Received, queued, started, delivered; 05:59 yes, 06:00 no."""
    studies = at(*sorted(times))
    site = run(studies, processors, window)
    for study in studies:
        assert study.sent < study.queued <= study.started < study.delivered
        assert site.opens(study.started) == study.started
        assert window == "always" or not 6 * HOUR <= study.started % DAY < 20 * HOUR
    assert [study.started for study in studies] == sorted(study.started for study in studies)


@given(st.lists(st.floats(0, DAY), min_size=1, max_size=30), st.integers(1, 4))
def test_one_processor_more_makes_nobody_wait_longer(times, processors):
    """First come first served on equal servers: each start is as early or earlier."""
    few, many = at(*sorted(times)), at(*sorted(times))
    run(few, processors)
    run(many, processors + 1)
    assert all(b.started <= a.started + 1e-6 for a, b in zip(few, many, strict=True))


def test_the_wait_is_that_of_queueing_theory():
    """Random arrivals at one processor of constant service: mean wait = load x service / 2 (1 - load), M/D/1."""
    service = simulation.SERVICE_S["best, CPU core"][0] + simulation.CLUSTER_S
    load = 0.6
    times = np.cumsum(np.random.default_rng(3).exponential(service / load, 20_000))
    studies = at(*times)
    run(studies, 1)
    mean = np.mean([study.started - study.queued for study in studies])
    assert mean == pytest.approx(load * service / (2 * (1 - load)), rel=0.05)


def test_a_night_that_is_long_enough_ends_at_six():
    """One scanner's day, at night, on one core: all of it; a hundred times as slow: next to nothing."""
    enough = simulation.simulate(1, 1, "best, CPU core", "20:00-06:00", days=7, seed=1)
    short = simulation.simulate(20, 1, "paper, GPU, 3x its floor", "20:00-06:00", days=7, seed=1)
    assert enough.by_six == 1.0 and enough.busy["processor"] < 0.5
    assert short.by_six < 0.1 and short.bottleneck == "processor"


def test_the_page_shows_what_the_script_prints():
    """Two rows of its tables, made anew."""
    results = [simulation.simulate(5, number, "best, CPU core", window, days=28, seed=1)
               for number in simulation.PROCESSORS for window in simulation.WINDOWS]
    rows = [line for line in simulation.tables(results).splitlines() if line.startswith("| 5 |")]
    page = PAGE.read_text(encoding="utf-8")
    assert len(rows) == 3 and [row for row in rows if row not in page] == []
