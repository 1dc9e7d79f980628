"""Mutated associations against a live receiver: it goes on, and keeps nothing that did not come whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzzrun import fuzz_streams
from tests.peers import ReceiverProcess


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.soak)])
def test_the_receiver_outlives_mutated_byte_streams(tmp_path: Path, count: int):
    """Bits, lengths, types, order, rubbish: no crash, no growth, no half object; a good one is stored afterwards."""
    with ReceiverProcess(tmp_path, reception=(
            "low_disk_mb = 1\nnetwork_timeout_s = 2\nacse_timeout_s = 2\ndimse_timeout_s = 10")) as receiver:
        report = fuzz_streams(count, receiver, seed=1)
    assert report.cases == count
    assert not report.failures, "\n".join(report.failures[:5])
    assert report.slowest_s < 10, report.slowest
    assert report.memory_mb < 50
    assert report.outcomes["objects kept"] > count / 30, "some come whole all the same"
    assert sum(found for outcome, found in report.outcomes.items() if "aborted" in outcome) > count / 10
