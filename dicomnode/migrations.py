"""The ledger's schema through its versions: each step once, all of them in one transaction, a copy of the file before.

A new version appends a step; the steps that are there never change. Whatever step a ledger starts from, it ends with
the tables and columns of `ledger.sql`.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from dicomnode.errors import LedgerCorrupt

__all__ = ["SCHEMA_VERSION", "STEPS", "backup_path", "migrate", "repaired_path", "require_no_repair"]

#: version -> what changes in tables that are there already; new tables come from ledger.sql itself
STEPS: Mapping[int, tuple[str, ...]] = {
    1: (),
    2: (),  # the table psf
    3: (
        "ALTER TABLE series ADD COLUMN purged_at REAL",
        "ALTER TABLE job ADD COLUMN urgent INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE job ADD COLUMN memory_gb REAL",
        "ALTER TABLE job ADD COLUMN device TEXT",
        "ALTER TABLE job ADD COLUMN purged_at REAL",
        "ALTER TABLE delivery ADD COLUMN confirm TEXT NOT NULL DEFAULT 'store'",
        "ALTER TABLE delivery ADD COLUMN proofs INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE delivery ADD COLUMN prove_at REAL",
        "ALTER TABLE delivery_instance ADD COLUMN committed_at REAL",
    ),
}
SCHEMA_VERSION = max(STEPS)


def migrate(db: sqlite3.Connection, path: Path, schema: str) -> None:
    """Bring the ledger open as `db` (isolation_level None) to SCHEMA_VERSION; a new file gets the whole `schema`.

    Before an existing ledger is changed, it is copied to `backup_path`. Two processes may start at once: one does it.
    Raises LedgerCorrupt where the file is of a newer version, sqlite3.DatabaseError where it is damaged.
    """
    if _version(db) == SCHEMA_VERSION:
        return
    with _alone(path):
        version = _version(db)
        if version == SCHEMA_VERSION:
            return
        if version > SCHEMA_VERSION:
            raise LedgerCorrupt(
                f"ledger {path} has schema version {version}, this software knows {SCHEMA_VERSION}. Remedy: run the "
                f"software version that wrote it, or put back the copy {backup_path(path, SCHEMA_VERSION).name}.")
        if version:
            _copy(db, backup_path(path, version))
        db.execute("BEGIN IMMEDIATE")
        try:
            for number in range(version + 1, SCHEMA_VERSION + 1) if version else ():
                for statement in STEPS[number]:
                    db.execute(statement)
            for statement in _statements(schema):
                db.execute(statement)
            db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise


def backup_path(path: Path, version: int) -> Path:
    """Where the ledger is copied to before it leaves `version`."""
    return path.with_name(f"{path.stem}.v{version}{path.suffix}")


def repaired_path(path: Path) -> Path:
    """Where `dicomnode repair` leaves a new ledger that is complete, until it is in the place of the old one."""
    return path.with_name(f"{path.stem}.repaired{path.suffix}")


def require_no_repair(path: Path) -> None:
    """Raises LedgerCorrupt where a new ledger waits to replace the one at `path`."""
    if repaired_path(path).exists():
        raise LedgerCorrupt(f"a repair of {path} was interrupted. Remedy: `dicomnode repair` completes it.")


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _copy(db: sqlite3.Connection, target: Path) -> None:
    """A consistent copy, whole or not there; one that an interrupted attempt left is replaced."""
    part = target.with_name(target.name + ".part")
    part.unlink(missing_ok=True)
    with closing(sqlite3.connect(part)) as copy:
        db.backup(copy)
    with part.open("rb") as handle:
        os.fsync(handle.fileno())
    os.replace(part, target)


def _statements(script: str) -> Iterator[str]:
    """The statements of a script one by one: executescript would commit what is open."""
    gathered = ""
    for line in script.splitlines(keepends=True):
        gathered += line
        if sqlite3.complete_statement(gathered):
            yield gathered
            gathered = ""


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    with path.with_name(path.name + ".lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
