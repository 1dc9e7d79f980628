"""Refused: why a series cannot be used, and what a person can do about it."""

from __future__ import annotations

__all__ = ["Refused"]


class Refused(ValueError):
    """A series that cannot be handled rightly; nothing was guessed.

    code    stable slug for logs and tests: "gap", "sheared", "dynamic", "units-missing".
    reason  one sentence for a person: what is wrong, with numbers.
    remedy  one sentence: what the site can do.
    study   StudyInstanceUID, "" where unknown.
    series  SeriesInstanceUID, "" where unknown.

    Holds UIDs and numbers only; never a name, an identifier or a date of a patient.
    """

    def __init__(self, code: str, reason: str, remedy: str, *, study: str = "", series: str = "") -> None:
        self.code = code
        self.reason = reason.rstrip(".")
        self.remedy = remedy.rstrip(".")
        self.study = study
        self.series = series
        super().__init__(code, reason, remedy)

    def __str__(self) -> str:
        return (
            f"study {self.study or 'unknown'}, series {self.series or 'unknown'}: "
            f"{self.reason}. Remedy: {self.remedy}."
        )

    def __reduce__(self) -> tuple:
        # Exceptions cross process boundaries by pickle, which would lose the keyword arguments.
        return _rebuild, (self.code, self.reason, self.remedy, self.study, self.series)

    def of(self, study: str, series: str) -> Refused:
        """The same refusal, naming the series it concerns where it did not yet."""
        return Refused(self.code, self.reason, self.remedy, study=self.study or study, series=self.series or series)


def _rebuild(code: str, reason: str, remedy: str, study: str, series: str) -> Refused:
    return Refused(code, reason, remedy, study=study, series=series)
