"""Studies are found by what a person has at hand, shown by what matters, and listed page by page without a gap."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, date, datetime
from pathlib import Path

import pytest

from dicomnode import search
from dicomnode.errors import RefusedInput
from dicomnode.ledger import InstanceRow, Ledger, NewJob
from dicomnode.search import STATES, studies
from tests.web.nodes import crowded

NOON = datetime(2026, 9, 1, 12, tzinfo=UTC).timestamp()


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.sqlite3") as ledger:
        yield ledger


def series(ledger: Ledger, study: str, uid: str, *, at: float = NOON, modality: str = "PT", accession: str = "") -> str:
    ledger.add_instances([InstanceRow(f"{uid}.1", "1.2", study, uid, "1.2.840.10008.1.2.1", f"{uid}.dcm", 1, uid, "CT1",
                                      "10.0.0.1", at, modality=modality, accession_number=accession)])
    return uid


def job(ledger: Ledger, study: str, uid: str, state: str = "queued") -> int:
    number = ledger.add_job(NewJob(f"{uid}{state}", uid, study, None, "r", "nbd", "best", {}, ("PACS",), ()), now=NOON)
    if state != "queued":
        ledger.query("UPDATE job SET state = ? WHERE id = ?", (state, number))
    return number


def found(ledger: Ledger, **options: object) -> list[str]:
    return [row.study for row in studies(ledger, **options).rows]  # type: ignore[arg-type]


def test_a_study_is_found_by_the_beginning_of_any_of_its_names(ledger: Ledger) -> None:
    """Study, series, derived series, accession number, job number; whole or begun; nothing else is found."""
    series(ledger, "1.2.3", "1.9.4", accession="ACC7")
    series(ledger, "1.2.4", "1.9.5", accession="BCC7", at=NOON + 1)
    number = job(ledger, "1.2.3", "1.9.4")
    ledger.query("UPDATE job SET derived_series_uid = '2.25.77'")
    for text in ("1.2.3", "1.9.4", "2.25.7", "ACC7", "ACC", " ACC7 ", f"job:{number}"):
        assert found(ledger, text=text) == ["1.2.3"], text
    assert found(ledger, text="1.2.") == ["1.2.4", "1.2.3"]
    for text in ("2.3", "acc7", "job:99", "job:x", "%", "*", "' OR 1 --", "\U0010ffff", "job:" + "9" * 30):
        assert found(ledger, text=text) == [], text


def test_a_study_is_shown_by_the_series_that_a_person_should_look_at(ledger: Ledger) -> None:
    """A PET before a CT; one that is held before one that is done, and that before one that was never wanted."""
    series(ledger, "1", "1.1", modality="CT")
    series(ledger, "1", "1.2", at=NOON + 1)
    ledger.set_series("1.2", "ignored", now=NOON, reason="not attenuation corrected")
    assert studies(ledger).rows[0].state == "ignored"
    series(ledger, "1", "1.3", at=NOON + 2)
    job(ledger, "1", "1.3", "delivered")
    (row,) = studies(ledger).rows
    assert (row.series, row.state, row.series_count, row.pets, row.instances) == ("1.3", "delivered", 3, 2, 3)
    series(ledger, "1", "1.4", at=NOON + 3)
    ledger.set_series("1.4", "held", now=NOON, code="gap", reason="slice 3 is missing")
    (row,) = studies(ledger).rows
    assert (row.series, row.state, row.code, row.reason) == ("1.4", "held", "gap", "slice 3 is missing")
    assert (row.received_at, row.last_at) == (NOON, NOON + 3)
    assert found(ledger, state="held") == ["1"]
    assert not found(ledger, state="delivered") and not found(ledger, state="ignored"), "it is shown as held"


def test_the_newest_job_of_a_series_counts(ledger: Ledger) -> None:
    """One that was superseded is history."""
    series(ledger, "1", "1.1")
    job(ledger, "1", "1.1", "superseded")
    second = job(ledger, "1", "1.1", "running")
    assert studies(ledger).rows[0].job == second
    assert found(ledger, state="running") == ["1"] and not found(ledger, state="superseded")


def test_days_are_days_of_the_nodes_time_zone(ledger: Ledger) -> None:
    """23:30 in UTC is the next day in Berlin; both ends belong to the range."""
    series(ledger, "1", "1.1", at=datetime(2026, 9, 1, 23, 30, tzinfo=UTC).timestamp())
    first, second = date(2026, 9, 1), date(2026, 9, 2)
    assert found(ledger, first=first, last=first) == ["1"] and not found(ledger, first=second)
    assert not found(ledger, last=first, timezone="Europe/Berlin")
    assert found(ledger, first=second, last=second, timezone="Europe/Berlin") == ["1"]
    assert found(ledger, last=date.max) == ["1"] and not found(ledger, last=date.min.replace(year=1960))


def test_pages_follow_without_gap_and_without_repetition(ledger: Ledger) -> None:
    """Also where many came in the same instant, and where new ones come in between; the last page says so."""
    for n in range(25):
        series(ledger, f"1.{n}", f"2.{n}", at=NOON + n // 6)
        series(ledger, f"1.{n}", f"3.{n}", at=NOON + n // 6, modality="CT")
    seen, before = [], None
    while True:
        page = studies(ledger, limit=4, before=before)
        seen += [row.study for row in page.rows]
        series(ledger, f"9.{len(seen)}", f"8.{len(seen)}", at=NOON + 1000)
        before = page.next
        if before is None:
            break
    assert len(seen) == 25 and set(seen) == {f"1.{n}" for n in range(25)}


def test_what_is_no_state_and_no_place_is_refused(ledger: Ledger) -> None:
    """With what there is instead."""
    with pytest.raises(RefusedInput, match="held"):
        studies(ledger, state="broken")
    for before in ("x", "~", "1e", "nan-"):
        with pytest.raises(RefusedInput, match="no place"):
            studies(ledger, before=before)
    assert found(ledger, first=date.min, last=date.max, timezone="Asia/Tokyo") == []


def test_ten_thousand_studies_are_searched_at_once(tmp_path: Path) -> None:
    """Any search, in any state, under a tenth of a second; a tenfold margin here, for machines that are busy."""
    with Ledger(crowded(tmp_path)) as ledger:
        searches: list[dict[str, object]] = [
            {}, {"text": "2.25.1000001234"}, {"text": "2.25"}, {"text": "ACC00"}, {"last": date(2025, 1, 1)},
            {"state": "failed", "text": "ACC"}]
        searches += [{"state": state} for state in STATES]
        for options in searches:
            since = time.perf_counter()
            page = studies(ledger, **options)  # type: ignore[arg-type]
            assert time.perf_counter() - since < 1.0, options
            assert page.rows or options.get("state") not in ("held", "delivered", None)


def test_a_common_state_is_found_on_the_way_and_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever way is taken, every state gives the same studies in the same order, page after page."""

    def pages(ledger: Ledger, state: str) -> list[str]:
        names, before = [], None
        while (page := studies(ledger, state=state, limit=50, before=before)).rows:
            names += [row.study for row in page.rows]
            before = page.next
            if before is None:
                break
        return names

    with Ledger(crowded(tmp_path, studies=300)) as ledger:
        ledger.query("UPDATE series SET state = 'held' WHERE series_uid = '2.25.2000000007'")
        ledger.query("UPDATE series SET state = 'ignored' WHERE modality = 'CT'")
        ledger.query("UPDATE job SET state = 'cancelled' WHERE id % 7 = 0")
        usual = {state: pages(ledger, state) for state in STATES}
        monkeypatch.setattr(search, "MANY", 0)
        assert {state: pages(ledger, state) for state in STATES} == usual
        assert len(usual["delivered"]) > 200 and usual["held"] and not usual["ignored"]


def test_what_was_ever_delivered_is_not_all_read_for_a_page(tmp_path: Path) -> None:
    """A page of a state that thousands of studies have costs little more than one of all studies."""
    with Ledger(crowded(tmp_path)) as ledger:

        def cost(state: str) -> float:
            began = time.process_time()
            for _ in range(5):
                assert len(studies(ledger, state=state).rows) == 50
            return time.process_time() - began

        cost("delivered")
        assert min(cost("delivered") for _ in range(3)) < 5 * min(cost("") for _ in range(3))
