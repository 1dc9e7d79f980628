"""The written report of a chaos run: a row for each scenario, with what was done and what was counted."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dicomnode import __version__

ROWS: list[tuple[str, str, str, str, str]] = []
CALLS = pytest.StashKey[dict[str, pytest.TestReport]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    item.stash.setdefault(CALLS, {})[report.when] = report
    return report


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Iterator[Any]:
    """tell(counted): what the scenario counted; its row is written whether it holds or not."""
    counted: dict[str, Any] = {}
    started = time.monotonic()
    yield lambda **found: counted.update(found)
    call = request.node.stash.get(CALLS, {}).get("call")
    result = "not run" if call is None or call.skipped else "holds" if call.passed else "BROKEN"
    promise = (request.function.__doc__ or "").strip().splitlines()[0]
    text = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in counted.items())
    ROWS.append((request.node.name, promise, text, f"{time.monotonic() - started:.0f}", result))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the report where CHAOS_REPORT says."""
    target = os.environ.get("CHAOS_REPORT")
    if not target or not ROWS:
        return
    lines = ["# Chaos report", "",
             f"dicomnode {__version__}, Python {platform.python_version()}, {os.cpu_count()} cores, "
             f"{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}.", "",
             "| scenario | promise | counted | s | result |", "|---|---|---|---|---|",
             *(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in ROWS), ""]
    Path(target).write_text("\n".join(lines), encoding="utf-8")
