"""How long the pages take over a ledger with 10,000 studies, at the server and in a browser, beside an empty page.

    python benchmarks/bench_web.py [--rounds 15] [--studies 10000]

server    from the request to the last byte, by the clock of the client: wall time of the answer, one client.
cpu       processor time of that answer, server and client together: what it would be on an idle machine.
browser   Chromium's navigation timing: from the start of the navigation to the end of its load event, with style sheet
          and scripts, which it keeps after the first page.
Floor: a page of the same site with head and foot and nothing between, measured in the same run, page after page in
turns, so that what else the machine does falls on all alike. Medians, and the largest. The promise is 200 ms.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import structlog
from fastapi import Request
from fastapi.responses import HTMLResponse
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dicomnode.web.site import page as html
from tests.web.browser import ARGUMENTS, CHROMIUM, Served, go, opening, serve
from tests.web.nodes import NOW, ROUTE, TOML, crowded

FLOOR = "/empty"
PATHS = (FLOOR, "/", "/studies", "/studies?q=ACC005", "/studies?state=held", "/studies?state=delivered",
         "/studies?from=2025-01-01&to=2025-02-01", "/studies?q=NOPE", "/nights", "/nights/now", "/alerts", "/node")
LOADED = """() => { const t = performance.getEntriesByType("navigation")[0]; return t.loadEventEnd - t.startTime; }"""
PROMISE_MS = 200
KINDS = ("server", "cpu", "browser")


def empty(request: Request) -> HTMLResponse:
    """The floor."""
    return html(request, "base.html")


def asked(served: Served, path: str) -> tuple[float, float]:
    """Milliseconds until the whole answer is here: by the clock, and of processor time."""
    request = urllib.request.Request(served.url + path, headers={"Authorization": f"Bearer {served.token}"})
    began, worked = time.perf_counter(), time.process_time()
    with urllib.request.urlopen(request) as answer:
        answer.read()
    return 1000 * (time.perf_counter() - began), 1000 * (time.process_time() - worked)


def measured(served: Served, rounds: int) -> dict[str, dict[str, list[float]]]:
    """path -> kind -> milliseconds of each round, all paths in turns."""
    times: dict[str, dict[str, list[float]]] = {path: {kind: [] for kind in KINDS} for path in PATHS}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=ARGUMENTS)
        with opening(browser, served) as make:
            page = make()
            for path in PATHS:
                go(page, path)  # the first time compiles templates and fills caches: not counted
            for _ in range(rounds):
                for path in PATHS:
                    for kind, value in zip(KINDS, asked(served, path)):
                        times[path][kind].append(value)
                    go(page, path)
                    page.wait_for_function("performance.getEntriesByType('navigation')[0].loadEventEnd > 0")
                    times[path]["browser"].append(page.evaluate(LOADED))
        browser.close()
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--studies", type=int, default=10_000)
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with tempfile.TemporaryDirectory() as folder:
        crowded(Path(folder), studies=options.studies)
        toml = (f'[node]\ndata_dir = "{folder}"\n{TOML}[[peer]]\nname = "PACS"\nae_title = "PACS"\n'
                f'host = "127.0.0.1"\nport = 1\n{ROUTE.format(method="nbd", preset="best", also="")}')
        with serve(toml, now=NOW) as served:
            served.app.add_api_route(FLOOR, empty)
            times = measured(served, options.rounds)
    print(f"{options.studies} studies, {options.rounds} rounds, load of the machine {os.getloadavg()[0]:.1f}")
    print(f"{'page, ms: median (largest)':42}" + "".join(f"{kind:>18}" for kind in KINDS))
    for path, found in times.items():
        name = f"{path} (floor)" if path == FLOOR else path
        print(f"{name:42}" + "".join(f"{statistics.median(one):9.1f} ({max(one):6.1f})" for one in found.values()))
    slow = [path for path in PATHS if statistics.median(times[path]["browser"]) > PROMISE_MS]
    print(f"above {PROMISE_MS} ms: {', '.join(slow) or 'none'}")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
