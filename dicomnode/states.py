"""The states of a series and of a job, and which change may follow which (design: the life of a study)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["JOB_STATES", "JOB_TRANSITIONS", "OTHER_IMAGE", "SERIES_STATES", "SERIES_TRANSITIONS", "after_deliveries",
           "may_follow"]

#: Code of a held job: of what a peer has something, the files were lost, and another image was computed.
OTHER_IMAGE = "other-image"

SERIES_TRANSITIONS: dict[str, frozenset[str]] = {
    # receiving: instances still come.  complete: proven whole.  matched: a job exists.
    # waiting: for more instances or a CT, until a time.  held: for a person.  ignored: by rule.
    # receiving -> matched: what came late is ignored.
    "receiving": frozenset({"complete", "matched", "waiting", "held", "ignored"}),
    "waiting": frozenset({"receiving", "complete", "matched", "waiting", "held", "ignored"}),
    "complete": frozenset({"receiving", "matched", "waiting", "held", "ignored"}),
    "matched": frozenset({"receiving", "held"}),
    "held": frozenset({"receiving", "ignored"}),
    "ignored": frozenset({"receiving", "held"}),
}

JOB_TRANSITIONS: dict[str, frozenset[str]] = {
    # failed: an attempt failed and another will follow after `run_after`; attempts used up end in held.
    "queued": frozenset({"running", "held", "cancelled", "superseded"}),
    "running": frozenset({"built", "failed", "queued", "held", "cancelled", "superseded"}),
    "failed": frozenset({"running", "queued", "held", "cancelled", "superseded"}),
    "built": frozenset({"sending", "queued", "held", "cancelled", "superseded"}),
    "sending": frozenset({"delivered", "held", "cancelled", "superseded"}),
    # A peer that does not commit to what it took gets it again (sending), or a person is asked (held).
    "delivered": frozenset({"committed", "sending", "held", "superseded"}),
    "committed": frozenset({"superseded"}),
    "held": frozenset({"queued", "built", "cancelled", "superseded"}),
    "cancelled": frozenset({"queued", "built", "superseded"}),
    "superseded": frozenset(),
}

SERIES_STATES = tuple(SERIES_TRANSITIONS)
JOB_STATES = tuple(JOB_TRANSITIONS)


def may_follow(kind: str, old: str, new: str) -> bool:
    """Whether a "series" or "job" in state `old` may go to `new`. Raises KeyError for an unknown state.

    >>> may_follow("job", "running", "built")
    True
    >>> may_follow("job", "delivered", "queued")
    False
    """
    return new in (SERIES_TRANSITIONS if kind == "series" else JOB_TRANSITIONS)[old]


def after_deliveries(job: str, deliveries: Sequence[Mapping[str, Any]]) -> tuple[str, str, str] | None:
    """The next (state, code, reason) of a job in state `job`, as its delivery rows have it; None: it stays.

    Delivered when every delivery is. Committed when, besides, each whose peer was asked for more than its answers
    (`confirm`) has given it, and at least one was asked. Held when one is dead and none is to be sent any more.
    """
    states = {row["state"] for row in deliveries}
    done = bool(states) and states <= {"delivered", "committed"}
    dead = [row for row in deliveries if row["state"] == "dead"]
    if done and job == "built":
        return "sending", "", "every peer had confirmed it before"
    if done and job == "sending":
        return "delivered", "", ""
    if job == "delivered" and "waiting" in states:
        return "sending", "", "; ".join(f"{row['peer']}: {row['reason']}" for row in deliveries
                                        if row["state"] == "waiting")
    if job in ("sending", "delivered") and dead and "waiting" not in states:
        code = "commitment" if all(row["proofs"] for row in dead) else "delivery"
        return "held", code, "; ".join(f"{row['peer']}: {row['reason']}" for row in dead)
    if job == "delivered" and "committed" in states and all(
            row["state"] == "committed" or row["confirm"] == "store" for row in deliveries):
        return "committed", "", "; ".join(f"{row['peer']}: {row['reason']}" for row in deliveries)
    return None
