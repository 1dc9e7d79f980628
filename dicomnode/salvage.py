"""What can still be read of a damaged ledger, row by row, and whether a row is what its table may hold.

A damaged page makes sqlite raise when a query comes to it. So a table is read from its first key on until that happens,
from its last key backwards, and what lies between key by key: whole numbers by halving the range, others by the keys
that its indexes still know. sqlite keeps no checksums of its pages: a row that is read is looked at before it is
believed.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from dicomnode.spool import valid_uid
from dicomnode.states import JOB_STATES, SERIES_STATES

__all__ = ["TABLES", "Salvaged", "quick_check", "read_tables", "sound_row"]

#: Parents before children: the order in which their rows can be entered. Table worker tells of processes that are gone.
TABLES = ("instance", "conflict", "series", "job", "delivery", "delivery_instance", "event", "psf", "commitment",
          "commitment_request", "source_series", "alert", "memo")
MOST_PROBES = 200_000  # per table: a key of nonsense must not make a search without end
_BEYOND = 1000  # keys looked for behind the last that is known
_JSON = {"job": ("settings", "send_to", "inputs", "progress", "report"), "instance": ("position", "orientation"),
         "psf": ("scanner_key", "fwhm_mm", "log_sd", "skew", "skew_sd", "detail"),
         "commitment": ("items",), "commitment_request": ("items",)}
_UIDS = {"instance": ("sop_instance_uid", "study_uid", "series_uid"), "series": ("series_uid", "study_uid"),
         "job": ("series_uid", "study_uid"), "conflict": ("sop_instance_uid", "series_uid", "study_uid")}
_STATES = {"series": frozenset(SERIES_STATES), "job": frozenset(JOB_STATES),
           "delivery": frozenset({"waiting", "delivered", "committed", "dead"})}
_FOLDERS = {"instance": "objects/", "conflict": "conflicts/"}
_KINDS: Mapping[str, tuple[type, ...]] = {"INTEGER": (int,), "REAL": (int, float), "TEXT": (str,)}

Row = dict[str, Any]
Key = tuple[Any, ...]


@dataclass
class Salvaged:
    """The rows of one table. damaged: pages of it could not be read, so that rows may be missing."""

    rows: list[Row] = field(default_factory=list)
    damaged: bool = False


def quick_check(path: Path) -> list[str]:
    """What sqlite finds wrong; nothing: the file is sound. It must be a copy: the write-ahead log is taken in."""
    try:
        with closing(_open(path)) as db:
            found = [str(row[0]) for row in db.execute("PRAGMA quick_check")]
            missing = set(TABLES) - {row[0] for row in db.execute("SELECT name FROM sqlite_master")}
    except sqlite3.Error as error:
        return [str(error)]
    if found == ["ok"]:
        return [f"it has no table {name}" for name in sorted(missing)]
    return found


def read_tables(path: Path, hints: Mapping[str, Iterable[Key]]) -> dict[str, Salvaged]:
    """All rows that can be read, by table. hints: keys that a table may have, known from elsewhere."""
    found = {name: Salvaged(damaged=True) for name in TABLES}
    try:
        with closing(_open(path)) as db:
            for name in TABLES:
                found[name] = _Table(db, name).read(hints.get(name, ()))
    except sqlite3.Error:  # not a database at all, or its first page is gone: nothing (more) can be read
        pass
    return found


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None)
    db.row_factory = sqlite3.Row
    # Text that is no UTF-8 is refused where it is entered, not while the rows behind it are read.
    db.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
    db.execute("PRAGMA cell_size_check=ON")
    return db


class _Table:
    """One table of a damaged file. Raises sqlite3.Error where not even its columns are known."""

    def __init__(self, db: sqlite3.Connection, name: str) -> None:
        self._db, self._name = db, name
        info = db.execute(f"PRAGMA table_info({name})").fetchall()
        self._key = [row["name"] for row in sorted(info, key=lambda row: row["pk"]) if row["pk"]]
        self._rows: dict[Key, Row] = {}
        self._probes = 0

    def read(self, hints: Iterable[Key]) -> Salvaged:
        if not self._key:
            return Salvaged(damaged=True)
        if not self._scan("ASC"):
            return Salvaged(list(self._rows.values()))
        self._scan("DESC")
        if self._key == ["id"]:
            self._halve()
        else:
            self._look_up([*self._keys_of_indexes(), *hints])
        return Salvaged(list(self._rows.values()), damaged=True)

    def _scan(self, order: str) -> bool:
        """Take rows in the order of the key until one cannot be read; False: none was left out."""
        by = ", ".join(f"{column} {order}" for column in self._key)
        try:
            for row in self._db.execute(f"SELECT * FROM {self._name} ORDER BY {by}"):
                if not self._take(row) and order == "DESC":
                    return False  # it has met the rows read from the other end
        except (sqlite3.Error, OverflowError):
            return True
        return False

    def _take(self, row: sqlite3.Row) -> bool:
        """Whether it is new."""
        key = tuple(row[column] for column in self._key)
        if key in self._rows:
            return False
        self._rows[key] = dict(row)
        return True

    def _halve(self) -> None:
        """Read between the rows that both ends gave, in ever smaller ranges."""
        known = sorted(key[0] for key in self._rows)
        top = max(self._sequence(), 2 * known[-1] + _BEYOND if known else _BEYOND)
        ranges = [(low + 1, high - 1) for low, high in pairwise([0, *known, top + 1]) if high - low > 1]
        while ranges and self._probes < MOST_PROBES:
            low, high = ranges.pop()
            self._probes += 1
            try:
                for row in self._db.execute(f"SELECT * FROM {self._name} WHERE id BETWEEN ? AND ?", (low, high)):
                    self._take(row)
            except (sqlite3.Error, OverflowError):
                if low < high:
                    middle = (low + high) // 2
                    ranges += [(low, middle), (middle + 1, high)]

    def _sequence(self) -> int:
        try:
            found = self._db.execute("SELECT seq FROM sqlite_sequence WHERE name = ?", (self._name,)).fetchone()
        except sqlite3.Error:
            return 0
        return int(found[0]) if found and isinstance(found[0], int) and found[0] < 2**40 else 0

    def _keys_of_indexes(self) -> Iterator[Key]:
        try:
            names = [row["name"] for row in self._db.execute(f"PRAGMA index_list({self._name})")
                     if row["origin"] == "c" and not row["partial"]]
        except sqlite3.Error:
            return
        for name in names:
            for order in ("ASC", "DESC"):
                try:
                    first = self._db.execute(f"PRAGMA index_info({name})").fetchone()["name"]
                    for row in self._db.execute(f"SELECT {', '.join(self._key)} FROM {self._name} INDEXED BY {name} "
                                                f"ORDER BY {first} {order}"):
                        yield tuple(row)
                except (sqlite3.Error, TypeError):
                    continue

    def _look_up(self, keys: Iterable[Key]) -> None:
        where = " AND ".join(f"{column} = ?" for column in self._key)
        for key in dict.fromkeys(keys):
            if key in self._rows or self._probes >= MOST_PROBES:
                continue
            self._probes += 1
            try:
                for row in self._db.execute(f"SELECT * FROM {self._name} WHERE {where}", key):
                    self._take(row)
            except (sqlite3.Error, UnicodeEncodeError):
                continue


# --- whether to believe a row


def sound_row(table: str, row: Mapping[str, Any], columns: Sequence[Mapping[str, Any]]) -> bool:
    """Whether `row` may be in `table`: types, UIDs, states, JSON, paths. columns: PRAGMA table_info of a new ledger."""
    return all(check(table, row) for check in _CHECKS) and all(
        column["name"] not in row or _fits(row[column["name"]], column) for column in columns)


def _fits(value: Any, column: Mapping[str, Any]) -> bool:
    if value is None:
        return not (column["notnull"] or column["pk"])
    return isinstance(value, _KINDS[column["type"]]) and not (isinstance(value, float) and not math.isfinite(value))


def _uids(table: str, row: Mapping[str, Any]) -> bool:
    return all(isinstance(row.get(name), str) and valid_uid(row[name]) for name in _UIDS.get(table, ()))


def _states(table: str, row: Mapping[str, Any]) -> bool:
    return table not in _STATES or row.get("state") in _STATES[table]


def _json(table: str, row: Mapping[str, Any]) -> bool:
    try:
        for name in _JSON.get(table, ()):
            if row.get(name) is not None:
                json.loads(row[name])
    except (ValueError, TypeError, RecursionError):
        return False
    return True


def _paths(table: str, row: Mapping[str, Any]) -> bool:
    if table not in _FOLDERS:
        return True
    path = row.get("path")
    return (isinstance(path, str) and path.startswith(_FOLDERS[table]) and ".." not in path
            and isinstance(row.get("bytes"), int) and row["bytes"] > 0 and len(str(row.get("sha256"))) == 64)


_CHECKS: tuple[Callable[[str, Mapping[str, Any]], bool], ...] = (_uids, _states, _json, _paths)
