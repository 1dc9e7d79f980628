"""A ledger whose pages are sound and whose texts are not: a job's report, its progress, what was asked for."""

from __future__ import annotations

import pytest

from tests.node.test_repair import Node, node, site

__all__ = ["node", "site"]  # fixtures

BROKEN = '{"device": "cp'


@pytest.mark.parametrize("column", ["report", "progress", "settings"])
def test_a_text_that_is_none_any_more_is_told_anew_by_the_folder(node: Node, column: str) -> None:
    """After a repair the job can be read, is the job it was, and no second derived series comes of it."""
    job = node.ledger.query("SELECT * FROM job WHERE state = 'delivered' ORDER BY id")[0]
    before, told = node.derived()[job["series_uid"]], node.ledger.job(job["id"])
    with node.ledger.transaction() as db:
        db.execute(f"UPDATE job SET {column} = ? WHERE id = ?", (BROKEN, job["id"]))
    report = node.repair()
    after = node.ledger.job(job["id"])
    assert report.needed
    assert (after["report"], after["progress"], after["settings"]) == (told["report"], None, told["settings"])
    node.decide()
    node.build()
    assert node.derived()[job["series_uid"]] == before
