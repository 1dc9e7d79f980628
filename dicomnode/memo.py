"""The table memo: small facts that outlive a process, such as when a nightly task last ran."""

from __future__ import annotations

from dicomnode.ledger import Ledger

__all__ = ["forget", "memo", "set_memo"]


def memo(ledger: Ledger, key: str) -> str:
    """What is remembered under `key`; "" where nothing is."""
    rows = ledger.query("SELECT value FROM memo WHERE key = ?", (key,))
    return str(rows[0]["value"]) if rows else ""


def set_memo(ledger: Ledger, key: str, value: str) -> None:
    """Remember `value` under `key`."""
    with ledger.transaction() as db:
        db.execute("INSERT OR REPLACE INTO memo VALUES (?, ?)", (key, value))


def forget(ledger: Ledger, key: str) -> bool:
    """Remember nothing under `key` any more; whether something was."""
    with ledger.transaction() as db:
        return db.execute("DELETE FROM memo WHERE key = ?", (key,)).rowcount > 0
