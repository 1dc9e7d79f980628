"""What a job is: the digest of all that decides its derived series, so that the same work is queued once.

The full settings of a method are known to the method alone. They are asked of a child process, once for every route:
the working process stays small and never loads torch.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

__all__ = ["SettingsRefused", "SettingsUnknown", "full_settings", "job_identity"]

TIMEOUT_S = 300.0  # importing the libraries of a method on a busy machine


class SettingsRefused(ValueError):
    """The method has no such preset or setting; the message says what it has."""


class SettingsUnknown(RuntimeError):
    """They could not be asked for now: no memory, or the child was killed. Worth another try."""


def job_identity(*, inputs: Sequence[str], guide_inputs: Sequence[str], method: str, settings: Mapping[str, Any],
                 software_version: str) -> str:
    """SHA-256 over canonical JSON.

    inputs, guide_inputs  SOP Instance UIDs, in any order.  settings  all of the method's settings, as JSON values.
    """
    recipe = {"inputs": sorted(inputs), "guide": sorted(guide_inputs), "method": method, "settings": dict(settings),
              "software_version": software_version}
    return hashlib.sha256(json.dumps(recipe, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def full_settings(method: str, preset: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a method's preset with some replaced, as JSON values.

    Raises SettingsRefused, and SettingsUnknown where the child process fails.
    """
    answer = json.loads(_asked(method, preset, json.dumps(dict(overrides), sort_keys=True)))
    if "refused" in answer:
        raise SettingsRefused(answer["refused"])
    return dict(answer["settings"])


@lru_cache(maxsize=256)
def _asked(method: str, preset: str, overrides: str) -> str:
    try:
        child = subprocess.run([sys.executable, "-m", "dicomnode.pipeline", "--settings", method, preset, overrides],
                               capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SettingsUnknown(f"the child that knows the settings of {method} does not run: {error}") from error
    if child.returncode != 0:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise SettingsUnknown(f"the child that knows the settings of {method} ended with {child.returncode}: {last}")
    return child.stdout
