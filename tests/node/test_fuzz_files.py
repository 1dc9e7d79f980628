"""Mutated objects: taken in or refused with a reason, read or refused with a reason; never a crash."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzzrun import fuzz_files


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.soak)])
def test_mutated_objects_get_a_reason_in_bounded_time_and_memory(tmp_path: Path, count: int):
    """Bits, lengths, VRs, nesting, counts, truncation, on nine kinds of objects; both outcomes occur."""
    report = fuzz_files(count, seed=1, folder=tmp_path)
    assert report.cases == count
    assert not report.failures, "\n".join(report.failures[:5])
    assert report.slowest_s < 10, report.slowest
    assert report.memory_mb < 300
    assert min(report.outcomes[outcome] for outcome in (
        "taken in: indexed", "taken in: CannotUnderstand", "read: volume", "read: malformed")) > count / 30
