"""What a person may decide: retry, hold, release, cancel, urgent. Functions over the ledger; each says what it did.

A target is a study, series or derived series UID, an accession number or a job number ("12" or "job:12"). Named by
study or accession number it must leave one choice: what would touch two jobs is refused with the list.
"""

from __future__ import annotations

import json
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from dicomnode.errors import NotFound, RefusedInput
from dicomnode.ledger import Ledger
from dicomnode.memo import set_memo
from dicomnode.retention import require_files
from dicomnode.states import OTHER_IMAGE

__all__ = ["VERBS", "Done", "cancel", "hold", "possible", "release", "retry", "urgent", "urgent_memo"]

HELD = frozenset({"held"})
JOB_RETRY = HELD | {"failed", "cancelled"}
JOB_HOLD = frozenset({"queued", "running", "failed", "built", "sending"})
JOB_CANCEL = JOB_HOLD | HELD
JOB_URGENT = frozenset({"queued", "failed"})
SERIES_URGENT = frozenset({"receiving", "waiting", "complete"})
SERIES_HOLD = frozenset({"receiving", "waiting", "complete"})
SERIES_CANCEL = SERIES_HOLD | HELD
VERBS = {  # verb -> states of a series and of a job in which it has something to do
    "release": (HELD, HELD), "retry": (HELD, JOB_RETRY), "urgent": (SERIES_URGENT, JOB_URGENT),
    "hold": (SERIES_HOLD, JOB_HOLD), "cancel": (SERIES_CANCEL, JOB_CANCEL),
}
UNDECIDED = frozenset({"no-route", "operator"})  # ignored by the configuration of the day or by a person, not by rule


@dataclass(frozen=True)
class Done:
    """What an operation changed: the job or, where the series has none, the series, and its new state."""

    series: str
    job: int | None
    state: str
    text: str


def retry(ledger: Ledger, target: str, *, now: float, actor: str) -> Done:
    """Try again: a held, failed or cancelled job is queued with its attempts reset; a held series is looked at again.

    So is a series that was ignored because no route matched, or because a person cancelled it. A job whose deliveries
    died is not computed again: it goes on sending what is already built.
    Raises NotFound and RefusedInput.
    """
    row = _one(ledger, target, "retry")
    with ledger.transaction():
        if row["series_state"] == "held" or _undecided(row):
            require_files(ledger, [row["series_uid"]])
            ledger.set_series(row["series_uid"], "receiving", now=now, code="operator", reason="retry", actor=actor)
            return Done(row["series_uid"], None, "receiving", "the series is looked at again")
        job, dead = ledger.job(row["job_id"]), _dead(ledger, row["job_id"])
        if dead and job["derived_path"]:
            _revive(ledger, dead, now=now)
            if job["state"] in JOB_RETRY:
                ledger.set_job(job["id"], "built", now=now, code="operator", reason="deliveries retried", actor=actor,
                               finished_at=None)
            state = ledger.job(job["id"])["state"]
            peers = ", ".join(delivery["peer"] for delivery in dead)
            return Done(job["series_uid"], job["id"], state, f"the delivery to {peers} is tried again")
        require_files(ledger, filter(None, [job["series_uid"], job["guide_series_uid"]]))
        _revive(ledger, dead, now=now)  # or what is computed again would wait for nobody
        ledger.set_job(job["id"], "queued", now=now, code="operator", reason="retry", actor=actor, attempts=0,
                       run_after=now, progress=None, finished_at=None)
        return Done(job["series_uid"], job["id"], "queued", "the job is queued again")


def hold(ledger: Ledger, target: str, *, now: float, actor: str) -> Done:
    """Stop here and wait for a person. Raises NotFound and RefusedInput."""
    row = _one(ledger, target, "hold")
    return _stop(ledger, row, JOB_HOLD, "held", "held", now=now, actor=actor)


def cancel(ledger: Ledger, target: str, *, now: float, actor: str) -> Done:
    """Give the job up (a series without a job is ignored from now on). Raises NotFound and RefusedInput."""
    row = _one(ledger, target, "cancel")
    return _stop(ledger, row, JOB_CANCEL, "cancelled", "ignored", now=now, actor=actor)


def release(ledger: Ledger, target: str, *, now: float, actor: str) -> Done:
    """A person looked and says: go on all the same.

    A held job whose derived series is built is sent as it is. A held series is processed in spite of what held it, its
    conflicting objects stay unused. So is one whose late input was ignored, now with it.
    Raises NotFound and RefusedInput.
    """
    row = _one(ledger, target, "release")
    with ledger.transaction() as db:
        if row["series_state"] == "held" or _passed_over(row):
            require_files(ledger, [row["series_uid"]])
            db.execute("UPDATE conflict SET accepted = 1 WHERE series_uid = ?", (row["series_uid"],))
            ledger.set_series(row["series_uid"], "receiving", now=now, code="operator", released=True, actor=actor,
                              reason=f"released although: {row['series_reason'] or row['series_code']}")
            return Done(row["series_uid"], None, "receiving", "the series is processed as it is")
        job = ledger.job(row["job_id"])
        why = f"released although: {job['reason'] or job['code']}"
        if job["code"] == OTHER_IMAGE:
            _send_anew(ledger, job, now=now)
        elif not job["derived_path"]:
            if job["code"] != "operator":
                raise RefusedInput(f"job {job['id']} is held ({job['reason']}) and has built nothing that could be "
                                   f"sent. Remedy: `dicomnode retry job:{job['id']}` computes it again.")
            ledger.set_job(job["id"], "queued", now=now, code="operator", reason=why, actor=actor, finished_at=None)
            return Done(job["series_uid"], job["id"], "queued", "the job goes on")
        for peer in job["send_to"]:
            db.execute("INSERT OR IGNORE INTO delivery (job_id, peer, state, next_at, created_at) "
                       "VALUES (?, ?, 'waiting', ?, ?)", (job["id"], peer, now, now))
        _revive(ledger, _dead(ledger, job["id"]), now=now)
        ledger.set_job(job["id"], "built", now=now, code="operator", reason=why, actor=actor, finished_at=None)
        ledger.settle(job["id"], now=now)
        state = ledger.job(job["id"])["state"]
        if state in ("delivered", "committed"):
            return Done(job["series_uid"], job["id"], state, "every peer has the derived series already")
        return Done(job["series_uid"], job["id"], "built", "the derived series is sent as it is")


def urgent(ledger: Ledger, target: str, *, now: float, actor: str) -> Done:
    """Start outside the windows and before all others, the urgent ones of before among them.

    A failed job does not wait for its next attempt. Of a series that has no job yet the wish is kept for its job.
    Raises NotFound and RefusedInput.
    """
    row = _one(ledger, target, "urgent")
    told = {"now": now, "study_uid": row["study_uid"], "series_uid": row["series_uid"], "code": "urgent",
            "actor": actor}
    with ledger.transaction() as db:
        rank = 1 + int(ledger.query("SELECT max(urgent) AS rank FROM job WHERE state IN ('queued', 'failed')")
                       [0]["rank"] or 0)
        if row["job_state"] not in JOB_URGENT:
            set_memo(ledger, urgent_memo(row["series_uid"]), actor)
            ledger.event("series", from_state=row["series_state"], to_state=row["series_state"],
                         reason="urgent: its job starts before all others, whatever the window", **told)
            return Done(row["series_uid"], None, row["series_state"], "its job will start before all others")
        db.execute("UPDATE job SET urgent = ?, run_after = min(run_after, ?) WHERE id = ?", (rank, now, row["job_id"]))
        ledger.event("job", job_id=row["job_id"], from_state=row["job_state"], to_state=row["job_state"],
                     reason="urgent: starts before all others, whatever the window", **told)
        return Done(row["series_uid"], row["job_id"], row["job_state"], "the job starts before all others")


def urgent_memo(series_uid: str) -> str:
    """Under which key of table memo it is kept that the job of a series, once there is one, is urgent."""
    return f"urgent:{series_uid}"


def _stop(ledger: Ledger, row: dict[str, Any], active: Set[str], job_state: str, series_state: str, *, now: float,
          actor: str) -> Done:
    reason = f"{job_state} by {actor}"
    if row["job_state"] not in active:
        ledger.set_series(row["series_uid"], series_state, now=now, code="operator", reason=reason, actor=actor)
        return Done(row["series_uid"], None, series_state, f"the series is {series_state}")
    ledger.set_job(row["job_id"], job_state, now=now, code="operator", reason=reason, actor=actor)
    return Done(row["series_uid"], row["job_id"], job_state, f"the job is {job_state}")


def possible(ledger: Ledger, series_uid: str) -> tuple[str, ...]:
    """The verbs that would not be refused now for a series and its newest job, in the order of VERBS."""
    row = next((one for one in ledger.overview(series_uid) if one["series_uid"] == series_uid), None)
    if row is None:
        return ()
    return tuple(verb for verb in VERBS if (_job_fits(ledger, row, verb) or _series_fits(row, verb))
                 and not _in_vain(ledger, row, verb))


def _in_vain(ledger: Ledger, row: dict[str, Any], verb: str) -> bool:
    """Whether a verb that fits the states is refused all the same: nothing was built, or the files are gone."""
    if verb not in ("retry", "release"):
        return False
    wanted = [row["series_uid"]]
    if not (row["series_state"] == "held" or _undecided(row) or _passed_over(row)):
        job = ledger.job(row["job_id"])
        if job["derived_path"] and (verb == "release" or _dead(ledger, job["id"])):
            return False
        if verb == "release":
            return job["code"] not in ("operator", OTHER_IMAGE)
        wanted = [uid for uid in (job["series_uid"], job["guide_series_uid"]) if uid]
    try:
        require_files(ledger, wanted)
    except RefusedInput:
        return True
    return False


def _job_fits(ledger: Ledger, row: dict[str, Any], verb: str) -> bool:
    """Whether the newest job of an overview row is in a state in which the verb has something to do."""
    return row["job_id"] is not None and (row["job_state"] in VERBS[verb][1]
                                          or (verb == "retry" and bool(_dead(ledger, row["job_id"]))))


def _series_fits(row: dict[str, Any], verb: str) -> bool:
    return row["series_state"] in VERBS[verb][0] or (verb == "retry" and _undecided(row)) or (
        verb == "release" and _passed_over(row))


def _one(ledger: Ledger, target: str, verb: str) -> dict[str, Any]:
    """The one overview row that `target` names, with its series or its job in a state in which the verb does something.

    A study named as a whole means its PET, not the CT that came along.
    """
    rows = _named(ledger, target)

    fitting = [row for row in rows if _job_fits(ledger, row, verb)
               or (_series_fits(row, verb) and (len(rows) == 1 or row["modality"] == "PT"))]
    if not fitting:
        states = "; ".join(f"{_label(row)} is {row['job_state'] or row['series_state']}" for row in rows)
        raise RefusedInput(f"nothing to {'hurry' if verb == 'urgent' else verb}: {states}.")
    if len(fitting) > 1:
        raise RefusedInput(f"{target!r} leaves {len(fitting)} choices: {'; '.join(_label(row) for row in fitting)}. "
                           "Remedy: name one of them by its series UID or job number.")
    return fitting[0]


def _undecided(row: dict[str, Any]) -> bool:
    return row["series_state"] == "ignored" and row["series_code"] in UNDECIDED


def _passed_over(row: dict[str, Any]) -> bool:
    """A series to which more came after it was sent, and late_input said to ignore it."""
    return row["series_state"] == "matched" and row["series_code"] == "late-input"


def _named(ledger: Ledger, target: str) -> list[dict[str, Any]]:
    if target.startswith("job:"):
        number = target.removeprefix("job:")
        if not number.isdecimal():
            raise NotFound(f"{number!r} is not a job number. Remedy: `dicomnode jobs` lists them.")
        return _row_of_job(ledger, int(number))
    rows = ledger.overview(target)
    exact = [row for row in rows if target in (row["series_uid"], row["derived_series_uid"])]
    if exact:
        return exact
    job = _row_of_job(ledger, int(target)) if target.isdecimal() and _has_job(ledger, int(target)) else []
    if job and rows:
        raise RefusedInput(f"{target!r} is both a job number and an accession number. "
                           f"Remedy: write job:{target}, or the Study Instance UID.")
    if not job and not rows:
        raise NotFound(f"nothing in the ledger is called {target!r}. Remedy: `dicomnode jobs` lists what came.")
    return job or rows


def _row_of_job(ledger: Ledger, job_id: int) -> list[dict[str, Any]]:
    if not _has_job(ledger, job_id):
        raise NotFound(f"there is no job {job_id}. Remedy: `dicomnode jobs` lists them.")
    job = ledger.job(job_id)
    rows = [row for row in ledger.overview(job["series_uid"]) if row["series_uid"] == job["series_uid"]]
    if rows and rows[0]["job_id"] != job_id:
        raise RefusedInput(f"job {job_id} was followed by job {rows[0]['job_id']} of the same series. "
                           f"Remedy: name job:{rows[0]['job_id']}.")
    return rows


def _has_job(ledger: Ledger, job_id: int) -> bool:
    try:
        ledger.job(job_id)
    except NotFound:
        return False
    return True


def _dead(ledger: Ledger, job_id: int) -> list[dict[str, Any]]:
    return [row for row in ledger.deliveries(job_id) if row["state"] == "dead"]


def _revive(ledger: Ledger, deliveries: list[dict[str, Any]], *, now: float) -> None:
    """The deliveries wait again; their age counts from now, or they would be given up at once."""
    for delivery in deliveries:
        ledger.set_delivery(delivery["id"], "waiting", now=now, reason="retried by a person", next_at=now, attempts=0,
                            proofs=0, prove_at=None, created_at=now)


def _send_anew(ledger: Ledger, job: dict[str, Any], *, now: float) -> None:
    """Every peer gets the series that was computed again: what was answered to the one before counts no more."""
    path = f"derived/{job['id']}"
    try:
        report = json.loads((ledger.path.parent / path / "report.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise RefusedInput(f"the series that job {job['id']} computed again is gone: {error}. Remedy: `dicomnode retry "
                           f"job:{job['id']}` computes it once more.") from error
    report.pop("job", None)
    with ledger.transaction() as db:
        db.execute("UPDATE job SET derived_series_uid = ?, derived_instances = ?, derived_path = ?, built_at = ?, "
                   "purged_at = NULL, report = ? WHERE id = ?",
                   (report["derived_series_uid"], report["derived_instances"], path, now, json.dumps(report),
                    job["id"]))
        for delivery in ledger.deliveries(job["id"]):
            db.execute("DELETE FROM delivery_instance WHERE delivery_id = ?", (delivery["id"],))
            db.execute("UPDATE commitment SET items = '[]' WHERE delivery_id = ?", (delivery["id"],))
        _revive(ledger, ledger.deliveries(job["id"]), now=now)


def _label(row: dict[str, Any]) -> str:
    job = f"job {row['job_id']} of " if row["job_id"] is not None else ""
    return f"{job}{row['modality']} series {row['series_uid']}"
