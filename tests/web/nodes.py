"""Nodes with something to look at: one with a study in every state, one of them really deblurred; one with thousands.

`furnished` runs matcher, executor and pipeline over a synthetic study; what the peers answered is entered by hand.
"""

from __future__ import annotations

import json
import random
import threading
from dataclasses import dataclass
from pathlib import Path

from pydicom import dcmread

from dicomnode import phantomstudy
from dicomnode.config import parse
from dicomnode.executor import Executor
from dicomnode.ledger import Ledger
from dicomnode.spool import Spool
from tests.factories import pet_series
from tests.node.line import Line, full_settings_here

NOW = 1_790_200_000.0  # 2026-09-23 21:06:40 UTC: a night has begun
DAY = 86400.0
TOML = """
[schedule]
timezone = "Europe/Berlin"
windows = ["20:00-06:00"]
[derived]
[[peer]]
name = "ARCHIVE"
ae_title = "ARCHIVE"
host = "127.0.0.1"
port = 2
"""
ROUTE = """
[[route]]
name = "psma"
when = {{ Modality = "PT" }}
method = "{method}"
preset = "{preset}"
send_to = ["PACS", "ARCHIVE"]
also = [{also}]
"""


@dataclass(frozen=True)
class Furnished:
    """A node's data directory and what is in it; `studies`: state -> Study Instance UID, `series`: -> of the PET."""

    folder: Path
    toml: str
    now: float
    studies: dict[str, str]
    series: dict[str, str]
    job: int  # of the study that is delivered

    def config_file(self) -> Path:
        path = self.folder / "dicomnode.toml"
        path.write_text(self.toml, encoding="utf-8")
        return path


def furnished(folder: Path, *, web: str = "", method: str = "nbd", preset: str = "best",
              kind: str = "spheres", size: tuple[int, int, int] = (16, 32, 32), also: str = "") -> Furnished:
    """A study delivered (deblurred here, by the pipeline's child process), and one each that is held, failed, queued,
    running, waiting for slices, and ignored."""
    route = ROUTE.format(method=method, preset=preset, also=also)
    series: dict[str, str] = {}
    with Line(folder, toml=TOML + web, route=route) as line:
        line.now = NOW - 3 * 3600
        job = _delivered(line, kind, size)
        series["delivered"] = line.ledger.job(job)["series_uid"]
        for seed, state in enumerate(("held", "failed", "running", "queued"), start=11):
            series[state] = line.receive(pet_series(seed=seed, AccessionNumber=f"ACC{seed}", values=None))
            line.now += 40
        series["waiting"] = line.receive(pet_series(seed=21, AccessionNumber="ACC21", missing=(3,)))
        series["ignored"] = line.receive(pet_series(seed=22, AccessionNumber="ACC22", attenuation_corrected=False))
        line.now += 31
        line.matcher().tick()
        _put_into_states(line, series)
        studies = {state: line.ledger.series(uid)["study_uid"] for state, uid in series.items()}
    toml = (f'[node]\ndata_dir = {json.dumps(str(folder / "data"))}\n[completeness]\nquiet_s = 30\n{TOML}{web}\n'
            f'[[peer]]\nname = "PACS"\nae_title = "PACS"\nhost = "127.0.0.1"\nport = 1\n{route}')
    parse(toml)
    return Furnished(folder, toml, NOW, studies, series, job)


def _delivered(line: Line, kind: str, size: tuple[int, int, int]) -> int:
    """A synthetic PET and CT received, matched, deblurred and, by hand, answered for by both peers; the job."""
    phantom = phantomstudy.make(kind, size=size, seed=3, fwhm_mm=6.0)
    study = phantomstudy.write(phantom, line.folder / "phantom", seed=3)
    for files in (study.ct, study.pet):
        line.receive([dcmread(path) for path in files], calling_ae="PETCT1")
    line.now += 31
    line.matcher().tick()
    executor = Executor(line.config, line.ledger, line.spool, device="cpu", clock=line.clock,
                        full_settings=full_settings_here)
    job = line.ledger.claim(executor.name, now=line.now, lease_s=60)
    assert job is not None
    line.now += 95
    executor.run_job(job, threading.Event())
    row = line.ledger.job(job["id"])
    assert row["state"] == "built", row["reason"]
    line.now += 5
    line.ledger.set_job(job["id"], "sending", now=line.now)
    uids = sorted(path.stem for path in line.spool.absolute(row["derived_path"]).glob("*.dcm"))
    for delivery in line.ledger.deliveries(job["id"]):
        line.now += 4
        line.ledger.put_statuses(delivery["id"], [(uid, 0, "") for uid in uids], now=line.now)
        line.ledger.set_delivery(delivery["id"], "delivered", now=line.now, attempts=1,
                                 reason=f"{len(uids)} instances stored")
    assert line.ledger.job(job["id"])["state"] == "delivered"
    return int(job["id"])


def _put_into_states(line: Line, series: dict[str, str]) -> None:
    ledger = line.ledger
    jobs = {state: ledger.jobs_of_series(series[state])[-1]["id"] for state in ("held", "failed", "running", "queued")}
    for state in ("held", "failed", "running"):
        line.now += 1
        ledger.query("UPDATE job SET run_after = 9e12 WHERE state = 'queued' AND id != ?", (jobs[state],))
        ledger.query("UPDATE job SET run_after = ? WHERE id = ?", (line.now, jobs[state]))
        job = ledger.claim("here:1:cpu", now=line.now, lease_s=9e6)
        assert job is not None and job["id"] == jobs[state]
        line.now += 20
        if state == "held":
            ledger.set_job(job["id"], "held", now=line.now, code="gate",
                           reason="the result is not safe: kernel-maximum 0.31 > 0.25. "
                                  "Remedy: try another preset, method or setting")
        elif state == "failed":
            ledger.set_job(job["id"], "failed", now=line.now, code="memory", run_after=NOW + 600,
                           reason="MemoryError (attempt 1 of 3; again in 60 s with 4 GB)")
        else:
            ledger.renew(job["id"], "here:1:cpu", now=line.now, lease_s=9e6,
                         progress={"stage": "main", "step": 120, "steps": 400, "loss": 0.0021})
    ledger.query("UPDATE job SET run_after = ? WHERE state = 'queued'", (line.now,))


def crowded(folder: Path, *, studies: int = 10_000, seed: int = 0) -> Path:
    """A data directory with so many studies of PET and CT over three years, nearly all delivered; its ledger."""
    rng = random.Random(seed)
    spool = Spool(folder)
    begin = NOW - 3 * 365 * DAY
    step = (NOW - begin) / studies
    series, jobs, deliveries, events = [], [], [], []
    for n in range(studies):
        study, pet, ct = (f"2.25.{kind}{n:07d}" for kind in (100, 200, 300))
        at = begin + n * step
        state = "delivered" if n < studies - 40 else rng.choice(["queued", "held", "failed", "delivered"])
        for uid, modality, count in ((ct, "CT", 267), (pet, "PT", 267)):
            series.append((uid, study, modality, f"ACC{n:06d}", "4", f"{modality} AC", "PETCT1", "matched", at, at + 60,
                           count, int(modality == "CT")))
        over = at + 400 if state == "delivered" else None
        report = json.dumps({"metrics": {"activity_change": 0.0}, "gates": []}) if over else None
        jobs.append((n + 1, f"identity{n}", pet, study, ct, "psma", "nbd", "best", "{}", '["PACS"]', "[]", state,
                     "a reason of some length" if state in ("held", "failed") else "", at + 90, at + 90, at + 91,
                     over, over, f"2.25.400{n:07d}" if over else None, 534 if over else None, report))
        if over:
            deliveries.append((n + 1, "PACS", "delivered", "534 instances stored", over, at + 300, over))
        for k, word in enumerate(("receiving", "complete", "matched", "queued", "running", "delivered")):
            events.append((at + 60 * k, study, pet, n + 1, "job" if k > 2 else "series", word))
    with Ledger(spool.ledger_path) as ledger, ledger.transaction() as db:
        db.executemany("INSERT INTO series (series_uid, study_uid, modality, accession_number, series_number, "
                       "series_description, calling_ae, state, first_at, last_at, instances, is_guide) "
                       "VALUES (?,?,?,?,?,?,?,?,?,?,?,?)", series)
        db.executemany("INSERT INTO job (id, identity, series_uid, study_uid, guide_series_uid, route, method, preset, "
                       "settings, send_to, inputs, state, reason, run_after, created_at, started_at, built_at, "
                       "finished_at, derived_series_uid, derived_instances, report) "
                       "VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)", jobs)
        db.executemany("INSERT INTO delivery (job_id, peer, state, reason, next_at, created_at, done_at) "
                       "VALUES (?,?,?,?,?,?,?)", deliveries)
        db.executemany("INSERT INTO event (at, study_uid, series_uid, job_id, kind, to_state) VALUES (?,?,?,?,?,?)",
                       events)
    return spool.ledger_path
