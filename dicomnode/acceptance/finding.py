"""One thing that was looked at: the verdict, and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dicomnode.errors import Exit

__all__ = ["Finding", "Verdict", "exit_code"]

Verdict = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `exit_code` is what the command line answers where the verdict is "problem"."""

    what: str
    verdict: Verdict
    text: str
    remedy: str = ""
    exit_code: Exit = Exit.FAILED

    def as_json(self) -> dict[str, Any]:
        value = asdict(self)
        del value["exit_code"]
        return value


def exit_code(findings: Sequence[Finding]) -> Exit:
    """DONE without a problem; otherwise the code of the first problem: usage, failed, unreachable."""
    problems = [finding.exit_code for finding in findings if finding.verdict == "problem"]
    return problems[0] if problems else Exit.DONE
