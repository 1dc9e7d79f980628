"""What a study page says, as plain values: the history folded, gates and checks in words, where a running job is.

Pure functions over the JSON values of dicomnode.views and the report of a job; nothing here reads a clock or a disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dicomnode.web.words import parts_of
from dicomnode.wording import gate_words

__all__ = ["Step", "gate_rows", "judged_parts", "place_words", "progress_of", "remedy", "setting_rows", "timeline"]

Json = dict[str, Any]

#: What a person can do about a state whose reason names no remedy.
REMEDIES = {
    "held": "Look at the pictures and the gates below. Then release it, retry it or cancel it.",
    "failed": "It is tried again by itself. Hold it if you want to look first.",
    "waiting": "Send what is missing. Nothing is lost meanwhile.",
    "cancelled": "Retry takes it up again.",
}


@dataclass(frozen=True)
class Step:
    """A line of the history: when, of what, why, the remedy, by whom; `times` it happened from `at` to `last`.

    state   what it came to, for the badge; "" where nothing changed.
    """

    at: str
    last: str
    what: str
    state: str
    why: str
    remedy: str
    who: str
    times: int = 1


def timeline(events: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[Step]:
    """The history, newest first; what repeats (the same once more, or two things in turn) is one line with a count.

    names   series UID -> what it is called on the page.
    """
    steps: list[Step] = []
    for event in events:
        step = _step(event, names)
        for back in (1, 2):
            if len(steps) >= back and _same(steps[-back], step):
                steps[-back] = replace(steps[-back], last=step.at, times=steps[-back].times + 1)
                break
        else:
            steps.append(step)
    return steps[::-1]


def _step(event: Mapping[str, Any], names: Mapping[str, str]) -> Step:
    why, remedy = parts_of(event["reason"])
    subject = names.get(event["series"], "study")
    if event["kind"] == "job":
        subject = f"job {event['job']}"
    elif event["kind"] == "delivery":
        subject = f"delivery to {event['code']}"
    elif event["kind"] == "psf":
        subject = "PSF library"
    changed = event["from_state"] != event["to_state"]
    state = event["to_state"] if changed else ""
    if not changed and not why:
        why = event["code"]
    return Step(event["at"], event["at"], subject, state, why, remedy, event["actor"])


def _same(a: Step, b: Step) -> bool:
    return (a.what, a.state, a.why, a.who) == (b.what, b.state, b.why, b.who)


def remedy(state: str, reason: str) -> str:
    """What to do: what the reason names, else what can be done about the state; "" where there is nothing to do.

    >>> remedy("held", "two images under one UID. Remedy: find which is right.")
    'Find which is right.'
    """
    named = parts_of(reason)[1] or REMEDIES.get(state, "")
    return named[:1].upper() + named[1:]


def judged_parts(judged: str) -> list[str]:
    """The sentence of the matcher, one statement a line."""
    return [part for part in judged.split("; ") if part]


def gate_rows(gates: Sequence[Mapping[str, Any]]) -> list[Json]:
    """Name, what is measured, how much, the limit, open; those that are shut first."""
    rows = []
    for gate in gates:
        words, measured, limit = gate_words(gate)
        rows.append({"name": gate["name"], "words": words, "ok": gate["ok"], "measured": measured, "limit": limit})
    return sorted(rows, key=lambda row: bool(row["ok"]))


def setting_rows(settings: Mapping[str, Any] | str | None) -> list[tuple[str, str]]:
    """Settings as text, in alphabetical order."""
    if not isinstance(settings, Mapping):
        return []
    return [(key, ", ".join(map(str, value)) if isinstance(value, list) else
             "–" if value in (None, "") else str(value)) for key, value in sorted(settings.items())]


def progress_of(job: Mapping[str, Any], expected_s: float | None, elapsed_s: float | None) -> Json:
    """Where a running job is: stage, share of it done, and seconds left, with what they rest on.

    expected_s   how long such jobs took; None: not measured. Then the stage's own pace, once 5 % are done.
    """
    said = job["progress"] or {}
    step, steps = said.get("step"), said.get("steps")
    share = min(1.0, step / steps) if isinstance(step, int | float) and steps else None
    left = basis = None
    if expected_s is not None and elapsed_s is not None:
        left, basis = max(0.0, expected_s - elapsed_s), "as such jobs took here"
    elif share is not None and share >= 0.05 and elapsed_s is not None:
        left, basis = elapsed_s * (1 - share) / share, "at this pace, for this stage"
    return {"stage": said.get("stage") or "starting", "step": step, "steps": steps, "share": share, "left_s": left,
            "basis": basis, "late": bool(expected_s is not None and elapsed_s is not None and elapsed_s > expected_s)}


def place_words(mm: Sequence[float]) -> str:
    """A place of the patient (LPS mm) by its sides.

    >>> place_words([13.1, -35.4, -677.5])
    'L 13, A 35, F 678'
    """
    sides = ("RL", "AP", "FH")
    return ", ".join(f"{pair[value >= 0]} {abs(value):.0f}" for pair, value in zip(sides, mm, strict=True))
