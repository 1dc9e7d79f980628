"""What viewers share: the front page is computed once for all who look within a second."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from dicomnode.web import overview
from dicomnode.web.shared import Shared
from tests.web.nodes import Furnished


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the front page was computed: the length of the list."""
    made: list[int] = []
    compute = overview.tonight

    def counted(*args, **options):
        made.append(1)
        return compute(*args, **options)

    monkeypatch.setattr(overview, "tonight", counted)
    return made


def test_value_is_made_once_for_all_who_ask_at_once():
    """Ten viewers whose pages look at the same moment."""
    shared, made, start = Shared(), list[int](), threading.Barrier(10)

    def ask(viewer: int) -> object:
        start.wait()
        return shared.get(lambda: made.append(viewer), now=100.0 + viewer / 1000, stamp=7)

    with ThreadPoolExecutor(10) as pool:
        list(pool.map(ask, range(10)))
    assert len(made) == 1


@pytest.mark.parametrize(("now", "stamp"), [(101.0, 7), (98.0, 7), (100.5, 8)])
def test_value_is_made_anew_after_a_second_a_clock_set_back_or_an_event(now: float, stamp: int):
    """Nobody sees an old one for long."""
    shared = Shared()
    assert shared.get(lambda: "old", now=100.0, stamp=7) == "old"
    assert shared.get(lambda: "new", now=now, stamp=stamp) == "new"
    assert shared.get(lambda: "other", now=now + 0.9, stamp=stamp) == "new"


def test_what_failed_is_not_kept():
    """The next one who asks tries again."""
    shared = Shared()
    with pytest.raises(OSError, match="no disk"):
        shared.get(lambda: (_ for _ in ()).throw(OSError("no disk")), now=0.0, stamp=0)
    assert shared.get(lambda: 1, now=0.0, stamp=0) == 1


def test_front_page_is_computed_once_a_second_and_at_once_after_an_action(
        app: FastAPI, client: TestClient, node: Furnished, looks: list[int]):
    """Page and moving part share it; an operator sees what was just done."""
    for path in ("/", "/tonight", "/tonight"):
        assert client.get(path).status_code == 200
    assert len(looks) == 1
    ledger = app.state.site.ledger
    with ledger.transaction() as db:
        db.execute("INSERT INTO event (at, study_uid, kind, code) VALUES (?, ?, 'job', 'retry')",
                   (node.now, node.studies["held"]))
    assert client.get("/tonight").status_code == 200
    assert len(looks) == 2
