"""The pictures of the status page in docs/images/web-*.png, taken from a node that it makes itself.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/screenshots.py --node /tmp/pet-node [--only NAME ...]

The node has the head-and-neck phantom, deblurred by nbd best, studies in every other state, and some nights of history.
Making it takes minutes on a CPU; with --node it is kept there for the next time (page Node shows that path). Every page
is taken light and dark, on a desk's screen and on a phone, each picture below LARGEST bytes.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from dicomnode import reconcile, workers  # noqa: E402 (the tests' nodes are found by the line above)
from dicomnode.alerts import Alerter  # noqa: E402
from dicomnode.config import Config, parse  # noqa: E402
from dicomnode.ledger import InstanceRow, Ledger  # noqa: E402
from dicomnode.memo import set_memo  # noqa: E402
from dicomnode.spool import Spool  # noqa: E402
from tests.web.browser import ARGUMENTS, CHROMIUM, DESK, PHONE, Served, serve  # noqa: E402
from tests.web.nodes import DAY, NOW, Furnished, furnished  # noqa: E402

LARGEST = 250_000
MARGIN = 24  # CSS pixels
NEVER_CAME = "ACC891"
TALLEST = {DESK: 1600, PHONE: 1900}  # CSS pixels: a page that is longer is cut there
SIZE = (40, 72, 72)
WORKER, DEVICE = "pet-node:812:cuda:0", "cuda:0"
TOML = f"""
[work]
devices = ["{DEVICE}"]
[[peer]]
name = "PETCT1"
ae_title = "PETCT1"
host = "127.0.0.1"
port = 3
query = true
"""


@dataclass(frozen=True)
class View:
    """One picture. {state} in `path` is the UID of the study in that state; `part` a CSS selector: only that element.

    `click`: what is clicked first.   every: also dark and on a phone.
    """

    name: str
    path: str
    wait: str = "main"
    part: str = ""
    click: str = ""
    every: bool = True
    logged_in: bool = True


VIEWS = (
    View("login", "/login", "form", logged_in=False),
    View("tonight", "/"),
    View("studies", "/studies"),
    View("study", "/studies/{delivered}", "#pictures"),
    View("pictures", "/studies/{delivered}", "#pictures", part="#pictures", every=False),
    View("slices", "/studies/{delivered}", "#slices", part="#slices", every=False),
    View("kernel", "/studies/{delivered}", "#kernel", part="#kernel", every=False),
    View("uptake", "/studies/{delivered}", "#regions", part="#regions", every=False),
    View("gates", "/studies/{delivered}", "#gates", part="#gates", every=False),
    View("deliveries", "/studies/{delivered}", "#deliveries", part="#deliveries", every=False),
    View("history", "/studies/{delivered}", "#history", part="#history", every=False),
    View("held", "/studies/{held}"),
    View("confirm", "/studies/{held}", "main", click='.actions a:has-text("Retry")', every=False),
    View("nights", "/nights"),
    View("night", "/nights/now", every=False),
    View("alerts", "/alerts"),
    View("node", "/node"),
    View("api", "/api/docs", "body"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--node", type=Path, help="where the node is kept; made there the first time")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "images")
    parser.add_argument("--only", nargs="*", default=[], help="names of views; all where none is given")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        node = node_at(arguments.node or Path(scratch) / "node")
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=ARGUMENTS)
        with running(node), serve(node.toml, now=node.now, node=node) as served:
            for view in VIEWS:
                if not arguments.only or view.name in arguments.only:
                    for name, picture in taken(browser, served, node, view):
                        path = arguments.out / f"web-{name}.png"
                        path.write_bytes(picture)
                        print(f"{path.name} {len(picture) // 1000} kB", flush=True)
        browser.close()


# --- the node


def node_at(folder: Path) -> Furnished:
    """The node kept in `folder`; made where there is none."""
    note = folder / "furnished.json"
    if not note.exists():
        node = furnished(folder, kind="head-and-neck", size=SIZE, web=TOML, also='"report", "kernel", "pictures"')
        with Ledger(Spool(folder / "data").ledger_path) as ledger:
            furnish_nights(ledger, like=node.series["running"])
            busy(ledger, node)
            tell(ledger, parse(node.toml))
        note.write_text(json.dumps(asdict(node) | {"folder": str(folder)}), encoding="utf-8")
    return Furnished(**json.loads(note.read_text(encoding="utf-8")) | {"folder": folder})


def tell(ledger: Ledger, config: Config) -> None:
    """What the node says by itself: reports of the nights, refusals, alerts."""
    folder = config.node.data_dir
    for back in range(6):
        morning = NOW - back * DAY - 17 * 3600
        reconcile.write(reconcile.report(ledger, config, day=reconcile.local_day(config, morning), now=morning), folder)
    ledger.event("security", now=NOW - 9000, code="calling-ae", actor="WORKSTATION7",
                 reason="AE title WORKSTATION7 is not a peer, from 10.20.0.77 (3 more of these since the last note)")
    set_memo(ledger, reconcile.asked_key("PETCT1"), str(NOW - 1800))
    alerter = Alerter(config, ledger, Spool(folder), clock=lambda: NOW - 1200)
    alerter.tick()
    alerter.close()


def busy(ledger: Ledger, node: Furnished) -> None:
    """One worker, ten minutes into its job."""
    job = ledger.jobs_of_series(node.series["running"])[-1]["id"]
    workers.enter(ledger, WORKER, device=DEVICE, now=NOW - 20 * 3600)
    workers.beat(ledger, [workers.Beat(WORKER, NOW - 4, job)])
    ledger.query("UPDATE job SET device = ?, started_at = ? WHERE id = ?", (DEVICE, NOW - 600, job))


def furnish_nights(ledger: Ledger, *, like: str) -> None:
    """Studies of the six nights before, all delivered; rows alone, no files. As large as the series `like`."""
    rng = random.Random(4)
    size = sum(row["bytes"] for row in ledger.instances(like))
    for night in range(6, 0, -1):
        for n in range(rng.randint(3, 7)):
            came, began = NOW - night * DAY - rng.uniform(5, 11) * 3600, NOW - night * DAY + n * 1400
            uids = {what: f"2.25.{rng.randrange(10**38, 3 * 10**38)}" for what in ("study", "pet", "ct", "derived")}
            one = SimpleNamespace(**uids, came=came, began=began, built=began + rng.uniform(1100, 1400),
                                  accession=f"ACC{900 - 10 * night + n}", size=size)
            with ledger.transaction() as db:
                enter_study(db, ledger, one)


def enter_study(db: Any, ledger: Ledger, one: SimpleNamespace) -> None:
    for uid, modality in ((one.ct, "CT"), (one.pet, "PT")):
        ledger.add_instances([InstanceRow(
            sop_instance_uid=f"{uid}.1", sop_class_uid="1.2.840.10008.5.1.4.1.1.128", study_uid=one.study,
            series_uid=uid, transfer_syntax_uid="1.2.840.10008.1.2.1", path="none", bytes=one.size, sha256=uid,
            calling_ae="PETCT1", address="127.0.0.1", received_at=one.came, modality=modality,
            accession_number=one.accession, series_number="4", series_description=f"{modality} WB")])
        db.execute("UPDATE series SET state = ?, instances = 267, is_guide = ? WHERE series_uid = ?",
                   ("ignored" if modality == "CT" else "matched", modality == "CT", uid))
    job = db.execute(
        "INSERT INTO job (identity, series_uid, study_uid, guide_series_uid, route, method, preset, settings, send_to, "
        "inputs, state, run_after, attempts, created_at, started_at, built_at, finished_at, derived_series_uid, "
        "derived_instances, device, report) VALUES (?, ?, ?, ?, 'psma', 'nbd', 'best', '{}', '[\"PACS\"]', '[]', "
        "'delivered', ?, 1, ?, ?, ?, ?, ?, 534, ?, ?)",
        (one.study, one.pet, one.study, one.ct, one.came + 90, one.came + 90, one.began, one.built, one.built + 40,
         one.derived, DEVICE, json.dumps({"device": DEVICE}))).lastrowid
    fetched = one.accession != NEVER_CAME
    db.execute("INSERT INTO source_series (source, series_uid, study_uid, study_date, modality, accession_number, "
               "instances, wanted, reason, state, attempts, first_seen_at, last_seen_at) "
               "VALUES ('PETCT1', ?, ?, ?, 'PT', ?, 267, 1, ?, ?, ?, ?, ?)",
               (one.pet if fetched else f"{one.pet}.2", one.study if fetched else f"{one.study}.2",
                time.strftime("%Y%m%d", time.gmtime(one.came)), one.accession, "" if fetched else
                "C-MOVE refused: 0xA801 move destination unknown (given up after 8 attempts)",
                "arrived" if fetched else "failed", 1 if fetched else 8, one.came, one.built))
    db.execute("INSERT INTO delivery (job_id, peer, state, reason, attempts, next_at, created_at, done_at) "
               "VALUES (?, 'PACS', 'delivered', '534 instances stored', 1, ?, ?, ?)",
               (job, one.built, one.built, one.built + 40))
    steps = (("series", "receiving", "complete", one.came + 90), ("job", "", "queued", one.came + 90),
             ("job", "queued", "running", one.began), ("job", "running", "built", one.built),
             ("job", "built", "sending", one.built + 1), ("job", "sending", "delivered", one.built + 40))
    for kind, before, after, at in steps:
        ledger.event(kind, now=at, study_uid=one.study, series_uid=one.pet, job_id=job if kind == "job" else None,
                     from_state=before, to_state=after)


@contextmanager
def running(node: Furnished) -> Iterator[None]:
    """As if receiver and worker had the data directory: by their locks the pages know."""
    with ExitStack() as stack:
        for name in ("receiver.lock", "work.lock"):
            fcntl.flock(stack.enter_context((node.folder / "data" / name).open("w")), fcntl.LOCK_EX)
        yield


# --- the pictures


def taken(browser: Browser, served: Served, node: Furnished, view: View) -> Iterator[tuple[str, bytes]]:
    """Name and PNG of each variant."""
    for screen, size in (("", DESK), ("-phone", PHONE)):
        for shade in ("", "-dark"):
            if view.every or not (screen or shade):
                yield view.name + screen + shade, picture(browser, served, node, view, size, dark=bool(shade))


def picture(browser: Browser, served: Served, node: Furnished, view: View, size: tuple[int, int], *,
            dark: bool) -> bytes:
    headers = {"Authorization": f"Bearer {served.token}"} if view.logged_in else {}
    context = browser.new_context(
        base_url=served.url, viewport={"width": size[0], "height": size[1]}, locale="en-GB", reduced_motion="reduce",
        color_scheme="dark" if dark else "light", extra_http_headers=headers)
    page = context.new_page()
    answer = page.goto(view.path.format(**node.studies))
    if answer is None or answer.status != 200:
        raise SystemExit(f"{view.path}: {answer and answer.status}")
    page.wait_for_selector(view.wait)
    if view.click:
        page.click(view.click)
        page.wait_for_selector("dialog[open]")
    settle(page)
    height = page.evaluate("document.documentElement.scrollHeight")
    limit = math.inf if view.part else TALLEST[size]  # a part: without scrolling, which would move what is sticky
    page.set_viewport_size({"width": size[0], "height": min(limit, max(300, height))})
    settle(page)
    shown = page.screenshot(clip=around(page, view.part) if view.part else None)
    context.close()
    return small(shown)


def around(page: Page, part: str) -> Any:
    """The place of an element and a little of what is around it."""
    box = page.locator(part).first.bounding_box()
    if box is None:
        raise SystemExit(f"{part} is not to be seen")
    return {"x": max(0, box["x"] - MARGIN), "y": box["y"] - MARGIN / 2, "width": box["width"] + 2 * MARGIN,
            "height": box["height"] + MARGIN}


def settle(page: Page) -> None:
    """All pictures are there and nothing is being asked for."""
    page.wait_for_load_state("networkidle")
    page.evaluate("Promise.all([...document.images].map((one) => one.decode().catch(() => null)))")


def small(png: bytes) -> bytes:
    """The same with a palette, with fewer colours and in the end fewer pixels until it is below LARGEST."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    for colours, scale in ((256, 1.0), (128, 1.0), (64, 1.0), (256, 0.75), (128, 0.6), (64, 0.5)):
        size = (round(image.width * scale), round(image.height * scale))
        found = io.BytesIO()
        image.resize(size, Image.Resampling.LANCZOS).quantize(colours, dither=Image.Dither.NONE).save(
            found, "PNG", optimize=True)
        if found.tell() < LARGEST:
            return found.getvalue()
    raise SystemExit(f"a picture of {image.width} x {image.height} does not fit into {LARGEST} bytes")


if __name__ == "__main__":
    main()
