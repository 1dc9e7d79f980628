"""A lane for each peer: one that hangs holds up nobody, and is told of."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from dicomnode.errors import NodeError
from dicomnode.lanes import STUCK_S, Lanes


def test_a_lane_that_hangs_is_told_of_and_the_others_go_on() -> None:
    """A disk that does not answer: every tick fails by the name of the peer, after it has started all other lanes."""
    now, go_on, done = [0.0], threading.Event(), threading.Event()

    def work(row: dict[str, Any]) -> None:
        if row["peer"] == "SLOW":
            assert go_on.wait(20)
        else:
            done.set()

    lanes = Lanes("deliver", work, lambda *_: None, monotonic=lambda: now[0])
    lanes.start([{"id": 1, "peer": "SLOW"}])
    now[0] = STUCK_S - 1
    lanes.start([])
    now[0] = STUCK_S + 1
    with pytest.raises(NodeError, match="deliver of SLOW did not get on for 15 minutes"):
        lanes.start([{"id": 2, "peer": "QUICK"}])
    assert done.wait(10)
    lanes.moves("SLOW")  # an answer came
    lanes.start([])
    go_on.set()
    lanes.threads["SLOW"].join(10)
    now[0] = 10 * STUCK_S
    lanes.start([])
