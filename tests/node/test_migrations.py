"""The ledger's schema through its versions: an old ledger ends like a new one, and a copy of it is kept."""

from __future__ import annotations

import multiprocessing
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from dicomnode.errors import LedgerCorrupt
from dicomnode.ledger import Ledger
from dicomnode.migrations import SCHEMA_VERSION, STEPS, backup_path
from dicomnode.states import JOB_STATES

VERSION_2 = Path(__file__).with_name("ledger_v2.sql")


def _shape(path: Path) -> dict[str, set[tuple[str, str, int, str | None, int]]]:
    """Table -> its columns (name, type, not null, default, place in the key); indices by name."""
    with closing(sqlite3.connect(path)) as db:
        found = {}
        for name, kind in db.execute("SELECT name, type FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'").fetchall():
            rows = db.execute(f"PRAGMA {'table_info' if kind == 'table' else 'index_info'}({name})").fetchall()
            found[name] = {tuple(row[1:]) for row in rows}
        return found


def version_2(path: Path) -> None:
    """A ledger as version 2 of the schema made it, with one series and one job."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.executescript(VERSION_2.read_text(encoding="utf-8"))
        db.execute("INSERT INTO series (series_uid, study_uid, modality, accession_number, series_number, "
                   "series_description, calling_ae, state, first_at, last_at, instances) "
                   "VALUES ('1.2.1', '1.2', 'PT', 'A1', '4', '', 'SCANNER', 'matched', 1, 2, 3)")
        db.execute("INSERT INTO job (identity, series_uid, study_uid, route, method, preset, settings, send_to, "
                   "inputs, state, run_after, created_at) VALUES ('x', '1.2.1', '1.2', 'pet', 'nbd', 'best', '{}', "
                   "'[\"PACS\"]', '[\"1.2.1.1\"]', 'queued', 1, 1)")
        db.execute("PRAGMA user_version=2")


def test_a_ledger_of_version_2_ends_like_a_new_one_with_its_rows(tmp_path: Path):
    """Columns, defaults, keys and indices are equal; series and job are still there and usable."""
    version_2(tmp_path / "old.sqlite3")
    with Ledger(tmp_path / "old.sqlite3") as ledger, Ledger(tmp_path / "new.sqlite3"):
        assert ledger.series("1.2.1")["instances"] == 3
        assert (ledger.job(1)["urgent"], ledger.job(1)["inputs"]) == (0, ["1.2.1.1"])
        assert ledger.claim("worker", now=10.0, lease_s=60.0) is not None
    assert _shape(tmp_path / "old.sqlite3") == _shape(tmp_path / "new.sqlite3")


def test_jobs_of_version_2_go_on_whatever_their_state(tmp_path: Path):
    """What waits is claimed or sent, what was delivered is delivered without further proof, what is over stays so."""
    path = tmp_path / "ledger.sqlite3"
    version_2(path)
    states = [state for state in JOB_STATES if state != "committed"]
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("DELETE FROM job")
        for number, state in enumerate(states, 1):
            db.execute("INSERT INTO job (id, identity, series_uid, study_uid, route, method, preset, settings, "
                       "send_to, inputs, state, run_after, created_at, lease_owner, lease_until, derived_path) "
                       "VALUES (?, ?, '1.2.1', '1.2', 'pet', 'nbd', 'best', '{}', '[\"PACS\"]', '[]', ?, 1, 1, "
                       "'old', 5, 'd')", (number, str(number), state))
            if state in ("built", "sending", "delivered", "held"):
                done = {"delivered": "delivered", "held": "dead"}.get(state, "waiting")
                db.execute("INSERT INTO delivery (job_id, peer, state, next_at, created_at) "
                           "VALUES (?, 'PACS', ?, 1, 1)", (number, done))
    with Ledger(path) as ledger:
        claimed = []
        while job := ledger.claim("w", now=10.0, lease_s=60.0):
            claimed.append(states[job["id"] - 1])
        assert sorted(claimed) == ["failed", "queued", "running"]
        assert [states[row["job_id"] - 1] for row in ledger.due_deliveries(now=10.0)] == ["built", "sending"]
        for number, state in enumerate(states, 1):
            ledger.settle(number, now=11.0)
            assert ledger.job(number)["state"] == ("running" if state in claimed else state)
        delivered = states.index("delivered") + 1
        assert [(row["state"], row["confirm"]) for row in ledger.deliveries(delivered)] == [("delivered", "store")]


def test_the_ledger_is_copied_before_it_is_changed(tmp_path: Path):
    """The copy is of the old version and whole; a new ledger and one up to date are not copied."""
    path = tmp_path / "ledger.sqlite3"
    version_2(path)
    Ledger(path).close()
    with closing(sqlite3.connect(backup_path(path, 2))) as copy:
        assert copy.execute("PRAGMA user_version").fetchone()[0] == 2
        assert copy.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        assert copy.execute("SELECT count(*) FROM job").fetchone()[0] == 1
    Ledger(path).close()
    Ledger(tmp_path / "other.sqlite3").close()
    assert sorted(p.name for p in tmp_path.glob("*.v*")) == ["ledger.v2.sqlite3"]


def test_a_migration_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Half a step is no step: the version and every table are as before, and the next start may try again."""
    path = tmp_path / "ledger.sqlite3"
    version_2(path)
    before = _shape(path)
    monkeypatch.setitem(STEPS, 3, (STEPS[3][0], "ALTER TABLE nowhere ADD COLUMN x"))  # type: ignore[arg-type]
    with pytest.raises(LedgerCorrupt, match="nowhere"):
        Ledger(path)
    assert _shape(path) == before
    monkeypatch.undo()
    with Ledger(path) as ledger:
        assert ledger.series("1.2.1")


def _open(path: Path, gate: object) -> None:
    gate.wait()  # type: ignore[attr-defined]
    Ledger(path).close()


def test_two_processes_that_start_at_once_migrate_once(tmp_path: Path):
    """Receiver and worker start together after an update."""
    path = tmp_path / "ledger.sqlite3"
    version_2(path)
    context = multiprocessing.get_context("spawn")
    gate = context.Barrier(3)
    both = [context.Process(target=_open, args=(path, gate)) for _ in range(2)]
    for process in both:
        process.start()
    gate.wait(30)
    for process in both:
        process.join(30)
    assert [process.exitcode for process in both] == [0, 0]
    with Ledger(path) as ledger:
        assert ledger.query("PRAGMA user_version")[0][0] == SCHEMA_VERSION
