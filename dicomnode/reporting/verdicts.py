"""What became of a study, in one sentence for each PET series, and what a person has to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dicomnode.reporting.blocks import Tone, Verdict
from dicomnode.reporting.words import Times

__all__ = ["TONES", "tell"]

Json = Mapping[str, Any]

#: A state of a series, job or delivery -> what it means to the one who reads.
TONES: dict[str, Tone] = {
    "held": "bad", "dead": "bad", "failed": "wait", "cancelled": "wait", "waiting": "wait", "queued": "wait",
    "receiving": "run", "complete": "run", "matched": "run", "running": "run", "built": "run", "sending": "run",
    "delivered": "good", "committed": "good",
}
#: The worst first.
ORDER = ("held", "failed", "waiting", "cancelled", "receiving", "complete", "matched", "queued", "running", "built",
         "sending", "delivered", "committed", "superseded", "ignored")
NOTHING = "Nothing: it goes on by itself."


def tell(series: Sequence[Json], waits: Mapping[int, str], times: Times) -> Iterator[Verdict]:
    """One verdict for each PET series, the worst first; those that are ignored count where there is no other.

    waits   job -> why it has not started (dicomnode.forecast.reasons).
    """
    pets = sorted((one for one in series if one["modality"] == "PT"), key=lambda one: ORDER.index(one["state"]))
    chosen = [one for one in pets if one["state"] != "ignored"] or pets
    if not chosen:
        yield Verdict("no PET", "wait", f"No PET series of this study came, only {_modalities(series)}.",
                      "Send the attenuation-corrected PET series.")
    for one in chosen:
        name = f"PET series {one['series_number']}".rstrip() + ": " if len(chosen) > 1 else ""
        text, remedy = _sentence(one, waits, times)
        yield Verdict(one["state"], TONES.get(one["state"], ""), name + text, remedy)


def _modalities(series: Sequence[Json]) -> str:
    return ", ".join(sorted({one["modality"] or "objects without a modality" for one in series}))


def _sentence(one: Json, waits: Mapping[int, str], times: Times) -> tuple[str, str]:
    reason, _, remedy = one["reason"].partition("Remedy: ")
    reason = reason.strip().rstrip(".;")
    job = one["jobs"][-1] if one["jobs"] else None
    match one["state"]:
        case "held":
            return f"Held because {reason or one['code'] or 'a person said so'}.", _stop(remedy) or (
                f"`dicomnode retry job:{job['job']}` or `dicomnode release job:{job['job']}` goes on with it." if job
                else f"`dicomnode release {one['series']}` goes on with it as it is.")
        case "failed":
            return (f"The last attempt failed: {reason}.",
                    f"Nothing: it is tried again ({waits.get(one['job'], 'by itself')}).")
        case "waiting":
            return (f"Waiting until {times.minute(one['until'])}: {reason}.",
                    _stop(remedy) or "Send what is missing: the series is looked at again by itself, and held "
                                     "when it has not come by then.")
        case "ignored":
            return f"Not processed: {reason}.", _stop(remedy) or "Nothing, if this is as it should be."
        case "cancelled":
            return (f"Given up{': ' + reason if reason else ''}.",
                    f"`dicomnode retry job:{one['job']}` if it was not meant.")
        case "superseded":
            return f"Replaced by a series of other input{': ' + reason if reason else ''}.", ""
        case "queued":
            return f"Queued: {waits.get(one['job']) or reason or 'it starts when a device is free'}.", NOTHING
        case "running":
            return f"Being deblurred{_progress(one['progress'])}.", NOTHING
        case "built" | "sending" | "delivered" | "committed":
            return _sent(one, job or {}), "" if one["state"] in ("delivered", "committed") else NOTHING
        case _:
            return f"Images still come, {one['instances']} so far{': ' + reason if reason else ''}.", NOTHING


def _stop(remedy: str) -> str:
    """A remedy as a sentence of its own."""
    text = remedy.strip().rstrip(".")
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _progress(progress: Json | None) -> str:
    return f", {progress['stage']}: step {progress['step']} of {progress['steps']}" if progress else ""


def _sent(one: Json, job: Json) -> str:
    deliveries = job.get("deliveries", [])
    there = [row["peer"] for row in deliveries if row["state"] in ("delivered", "committed")]
    images = f"the derived series of {one['derived_instances']} images"
    match one["state"]:
        case "committed":
            return f"Delivered and confirmed: {images} is kept by {_and(there)}."
        case "delivered":
            return f"Delivered: {images} is stored at {_and(there)}."
    missing = [f"{row['peer']} ({row['reason'] or row['state']})" for row in deliveries if row["peer"] not in there]
    return f"Built and checked: {images} is on its way to {_and(missing)}."


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]])) or "nobody"
