"""The nightly round: what the sources hold and did not come is fetched, whatever they do, and nothing else is."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from dicomnode.config import parse
from dicomnode.matcher import Matcher
from dicomnode.memo import memo
from dicomnode.nightly import ATTEMPTS, AWAIT_S, Nightly
from dicomnode.wanted import judge, return_keys
from tests.factories import ct_series, pet_series
from tests.node.line import full_settings_here
from tests.node.source_peer import PET_ROUTE, Site, SourcePeer, soon, uids

PET, CT = pet_series(), ct_series()
PET_UID, CT_UID = str(PET[0].SeriesInstanceUID), str(CT[0].SeriesInstanceUID)
TOLD = ("ImageType", "SeriesType", "CorrectedImage", "SOPClassUID", "Units", "Manufacturer")


@pytest.fixture
def source() -> Iterator[SourcePeer]:
    """A source that holds one PET and its CT and knows no destination yet."""
    with SourcePeer([*PET, *CT]) as source:
        yield source


@pytest.fixture
def site(tmp_path: Path, source: SourcePeer) -> Iterator[Site]:
    """A node that fetches by C-MOVE; the source knows it."""
    with Site(tmp_path, source.port) as site:
        source.destination = ("127.0.0.1", site.port)
        yield site


def states(site: Site) -> dict[str, tuple[str, int]]:
    """series UID -> (state, attempts)."""
    return {uid: (row["state"], row["attempts"]) for uid, row in site.rows().items()}


def receive(site: Site, datasets: list[Dataset]) -> None:
    """As if a scanner had sent them: by C-GET from another source, which needs no port of ours."""
    from dicomnode.fetching import Fetch, fetch
    with SourcePeer(datasets) as scanner:
        fetch(site.config, site.ledger, site.spool, clock=site.clock, what=Fetch(
            scanner.peer(retrieve="c-get"), str(datasets[0].StudyInstanceUID)))


def test_what_did_not_come_is_fetched_with_its_ct(site: Site) -> None:
    """PET and CT of the day are asked for and arrive; the CT first, so that the PET finds it."""
    ticking = itertools.count(site.NIGHT, 0.01)
    Nightly(site.config, site.ledger, site.spool, clock=lambda: next(ticking)).serve(site.peer)
    assert site.here() == uids([*PET, *CT])
    assert states(site) == {PET_UID: ("arrived", 1), CT_UID: ("arrived", 1)}
    arrived = [event["series_uid"] for event in site.ledger.events() if event["to_state"] == "arrived"]
    assert arrived == [CT_UID, PET_UID]


def test_what_came_by_itself_is_marked_and_not_fetched(site: Site, source: SourcePeer) -> None:
    """Nothing is asked for a second time; the CT of a PET that is here whole is not either."""
    receive(site, PET)
    site.now += 60
    site.ledger.set_series(PET_UID, "complete", now=site.now)
    site.nightly().serve(site.peer)
    assert states(site)[PET_UID] == ("arrived", 0) and source.moved == []
    assert not site.rows()[CT_UID]["wanted"]


def test_a_series_that_is_still_arriving_is_left_time(site: Site, source: SourcePeer) -> None:
    """Its last instance came just now: it is fetched only where it stays incomplete."""
    receive(site, PET[:5])
    nightly = site.nightly()
    nightly.serve(site.peer)
    assert states(site)[PET_UID] == ("seen", 0) and PET_UID not in str(source.moved)
    site.now += 31
    nightly.serve(site.peer)
    assert states(site)[PET_UID] == ("arrived", 1)
    assert set(source.moved[-1].SOPInstanceUID) == uids(PET[5:])


@pytest.mark.parametrize("spoilt", [
    {"ImageType": ["DERIVED", "PRIMARY"]}, {"CorrectedImage": ["DECY"]}, {"SeriesType": ["DYNAMIC", "IMAGE"]},
    {"SeriesType": ["WHOLE BODY", "REPROJECTION"]}])
def test_what_no_route_would_want_is_not_fetched(tmp_path: Path, spoilt: dict[str, Any]) -> None:
    """Told by what the source answers; the reason is kept, and its CT stays where it is."""
    with SourcePeer([*pet_series(**spoilt), *CT], header=TOLD) as source, Site(tmp_path, source.port) as site:
        source.destination = ("127.0.0.1", site.port)
        site.nightly().serve(site.peer)
        assert source.moved == [] and not any(row["wanted"] for row in site.rows().values())
        assert site.rows()[PET_UID]["reason"]


def test_own_derived_series_are_not_fetched(site: Site, source: SourcePeer) -> None:
    """A series that a job of ours made lies in the PACS beside its source."""
    receive(site, PET)
    site.now += 60
    Matcher(site.config, site.ledger, site.spool, clock=site.clock, full_settings=full_settings_here).tick()
    job = site.ledger.claim("w", now=site.now, lease_s=60)
    assert job is not None
    site.ledger.built(job["id"], "w", now=site.now, derived_series_uid="2.25.9", derived_path="derived/1",
                      derived_instances=8, report={})
    own = pet_series(SeriesInstanceUID="2.25.9")
    for number, ds in enumerate(own):
        ds.SOPInstanceUID = f"2.25.9.{number}"
    source.datasets += own
    site.nightly().serve(site.peer)
    assert source.moved == [] and site.rows()["2.25.9"]["reason"] == "own derived series"


def test_the_query_is_asked_once_a_day_also_when_the_node_was_off_at_its_time(site: Site, source: SourcePeer) -> None:
    """Off from the 2nd to the 5th: asked at the next start, for all days since the last query."""
    source.datasets = []
    site.nightly().serve(site.peer)
    asked = len(source.asked)
    site.nightly().serve(site.peer)
    assert len(source.asked) == asked
    site.now += 3 * 86400 - 4 * 3600  # 18:30, before the time of day
    site.nightly().serve(site.peer)
    assert source.asked[asked].StudyDate == "20200102-20200105"


def test_three_weeks_of_nights_fetch_and_process_once(tmp_path: Path, source: SourcePeer) -> None:
    """Listed each night for three weeks: one retrieval each, one job, none superseded; a day is remembered by nights.

    The derived series lies at the source too from the second night, and the inputs are removed from the tenth.
    """
    with Site(tmp_path, source.port, schedule="retrieve_days = 31", route=PET_ROUTE) as site:
        source.destination = ("127.0.0.1", site.port)
        matcher = Matcher(site.config, site.ledger, site.spool, clock=site.clock, full_settings=full_settings_here)
        for night in range(21):
            site.nightly().serve(site.peer)
            site.now += 3600
            matcher.tick()
            job = site.ledger.claim("w", now=site.now, lease_s=60)
            assert (job is not None) == (night == 0)
            if job is not None:
                site.ledger.built(job["id"], "w", now=site.now, derived_series_uid="2.25.9", derived_path="derived/1",
                                  derived_instances=8, report={})
                source.datasets += pet_series(series=9, SeriesInstanceUID="2.25.9")
                site.ledger.set_job(job["id"], "sending", now=site.now)
                site.ledger.set_delivery(site.ledger.deliveries(job["id"])[0]["id"], "delivered", now=site.now)
            if night == 10:
                with site.ledger.transaction() as db:
                    db.execute("UPDATE series SET purged_at = ?", (site.now,))
                shutil.rmtree(site.spool.data_dir / "objects")
            site.now += 23 * 3600
        assert [str(moved.SeriesInstanceUID) for moved in source.moved] == [CT_UID, PET_UID]
        assert [job["state"] for job in site.ledger.jobs_of_series(PET_UID)] == ["delivered"]
        assert site.ledger.query("SELECT count(*) AS n FROM memo WHERE key LIKE 'source%'")[0]["n"] <= 3


def test_a_time_of_day_that_has_not_come_asks_nothing(site: Site, source: SourcePeer) -> None:
    """After the first night, 21:59 asks nothing and 22:00 does."""
    source.datasets = []
    site.nightly().serve(site.peer)
    asked = len(source.asked)
    site.now = site.NIGHT + 86400 - 31 * 60
    assert not site.nightly()._due(site.peer)
    site.now += 60
    site.nightly().serve(site.peer)
    assert len(source.asked) > asked


def test_a_source_that_is_down_is_asked_again_with_growing_pauses(site: Site, source: SourcePeer) -> None:
    """The reason is remembered for the report; once it is back, the night's work is done."""
    source.stop()
    nightly = site.nightly()
    nightly.serve(site.peer)
    assert "does not answer" in memo(site.ledger, "source.problem:PACS")
    assert not nightly._due(site.peer)
    site.now += 61
    nightly.serve(site.peer)
    site.now += 61
    assert not nightly._due(site.peer)  # two minutes by now
    source.start()
    site.now += 60
    nightly.serve(site.peer)
    assert site.here() == uids([*PET, *CT]) and memo(site.ledger, "source.problem:PACS") == ""


def test_a_source_that_dies_in_the_middle_is_gone_on_with(site: Site, source: SourcePeer) -> None:
    """It leaves during the retrieval of the CT: the PET waits, and both come later."""
    def dies(_: Dataset, found: list[Dataset]) -> list[Dataset]:
        source.on_retrieve = lambda _, found: found
        for association in source._server.active_associations:
            association.abort()
        return []

    source.on_retrieve = dies
    nightly = site.nightly()
    nightly.serve(site.peer)
    assert states(site)[CT_UID] == ("seen", 1)
    source.stop()
    site.now += 61
    nightly.serve(site.peer)
    assert "does not answer" in memo(site.ledger, "source.problem:PACS")
    source.start()
    site.now += 61
    nightly.serve(site.peer)
    assert site.here() == uids([*PET, *CT]) and memo(site.ledger, "source.problem:PACS") == ""


def test_one_bad_study_never_stops_the_rest(site: Site, source: SourcePeer) -> None:
    """The source refuses to list one study: the other is fetched, the bad one is named, and the query is repeated."""
    other = pet_series(seed=1, AccessionNumber="A1")
    source.datasets = [*other, *PET]
    bad = str(other[0].StudyInstanceUID)
    source.answers = lambda keys, found: [0xC001] if keys.QueryRetrieveLevel == "SERIES" and \
        keys.StudyInstanceUID == bad else found
    nightly = site.nightly()
    nightly.serve(site.peer)
    assert "1 of 2 studies could not be asked for: A1" in memo(site.ledger, "source.problem:PACS")
    assert site.here() == uids(PET)
    source.answers = lambda _, found: found
    site.now += 61
    nightly.serve(site.peer)
    assert site.here() == uids([*other, *PET]) and memo(site.ledger, "source.problem:PACS") == ""


def test_an_answer_that_trips_a_bug_never_stops_the_rest(
        site: Site, source: SourcePeer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One study of two cannot be judged: it is named, the other comes."""
    other = pet_series(seed=1, AccessionNumber="A1")
    source.datasets = [*other, *PET]

    def trips(header: Dataset, *arguments: Any, **options: Any) -> Any:
        if header.SeriesInstanceUID == other[0].SeriesInstanceUID:
            raise RuntimeError("odd")
        return judge(header, *arguments, **options)

    monkeypatch.setattr("dicomnode.nightly.judge", trips)
    nightly = site.nightly()
    nightly.serve(site.peer)
    assert "A1: RuntimeError: odd" in memo(site.ledger, "source.problem:PACS") and site.here() == uids(PET)


def test_one_bad_series_never_stops_the_rest_and_is_given_up(site: Site, source: SourcePeer) -> None:
    """The CT cannot be sent: tried again with pauses, then failed with the reason; the PET came at once."""
    def refuses(keys: Dataset, found: list[Dataset]) -> list[Dataset]:
        if keys.SeriesInstanceUID == CT_UID:
            raise ValueError("lost on tape")
        return found

    source.on_retrieve = refuses
    nightly = site.nightly()
    for _ in range(ATTEMPTS + 2):
        nightly.serve(site.peer)
        site.now += 3601
    assert states(site) == {PET_UID: ("arrived", 1), CT_UID: ("failed", ATTEMPTS)}
    assert f"given up after {ATTEMPTS} attempts" in site.rows()[CT_UID]["reason"]


def test_a_move_whose_instances_do_not_arrive_is_noticed(site: Site, source: SourcePeer) -> None:
    """The source answers success and sent the PET elsewhere: awaited, then asked for again with the remedy."""
    source.on_retrieve = lambda keys, found: [] if keys.SeriesInstanceUID == PET_UID else found
    nightly = site.nightly()
    nightly.serve(site.peer)
    assert states(site)[PET_UID] == ("retrieving", 1)
    site.now += AWAIT_S + 1
    nightly.serve(site.peer)
    row = site.rows()[PET_UID]
    assert (row["state"], row["attempts"]) == ("seen", 1)
    assert "0 of 8 instances are here" in row["reason"] and "NBDNODE" in row["reason"]
    source.on_retrieve = lambda _, found: found
    site.now += 61
    nightly.serve(site.peer)
    assert states(site)[PET_UID] == ("arrived", 2)


def test_an_unknown_destination_is_said_with_the_remedy(tmp_path: Path, source: SourcePeer) -> None:
    """Status 0xA801 stands in the reason of the series."""
    with Site(tmp_path, source.port) as site:
        site.nightly().serve(site.peer)
        assert "0xA801" in site.rows()[PET_UID]["reason"] and "Remedy" in site.rows()[PET_UID]["reason"]


def test_c_get_fetches_too(tmp_path: Path, source: SourcePeer) -> None:
    """peer.retrieve = "c-get": the source need not know our address; it gives no counts either."""
    source.counts = False
    with Site(tmp_path, source.port, retrieve="c-get") as site:
        site.nightly().serve(site.peer)
        assert site.here() == uids([*PET, *CT]) and states(site)[PET_UID] == ("arrived", 1)


def test_tick_returns_at_once_and_a_thread_does_the_work(site: Site) -> None:
    """One thread a peer; close waits for it."""
    nightly = site.nightly()
    nightly.tick()
    assert soon(lambda: states(site).get(PET_UID) == ("arrived", 1), timeout_s=10)
    nightly.close(5.0)
    assert not any(thread.is_alive() for thread in nightly._threads.values())


# --- what a route would want, by what C-FIND tells


def routes(when: str) -> Any:
    return parse(f'[[peer]]\nname = "PACS"\nae_title = "P"\nhost = "h"\nport = 1\n'
                 f'{PET_ROUTE.replace("""{ Modality = "PT" }""", when)}').route


def answer(**attributes: Any) -> Dataset:
    found = Dataset()
    found.Modality = "PT"
    for keyword, value in attributes.items():
        setattr(found, keyword, value)
    return found


@pytest.mark.parametrize(("when", "attributes", "wanted"), [
    ('{ Modality = "PT" }', {}, True),
    ('{ Modality = "NM" }', {}, False),
    ('{ StationName = "A*" }', {"StationName": "ABC"}, True),
    ('{ StationName = "A*" }', {"StationName": "B"}, False),
    ('{ StationName = "A*" }', {"StationName": ""}, True),
    ('{ StationName = "A*" }', {}, True),
    ('{ "RadiopharmaceuticalInformationSequence.Radiopharmaceutical" = "*PSMA*" }', {}, True),
    ('{ CallingAETitle = "P" }', {}, True),
    ('{ CallingAETitle = "X" }', {}, False),
    ('{ Modality = "PT" }', {"Units": "CNTS"}, True),
    ('{ Modality = "PT" }', {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, False),
    ('{ Modality = "PT" }', {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.130"}, True),
])
def test_only_a_known_attribute_decides(when: str, attributes: dict[str, Any], wanted: bool) -> None:
    """Unknown counts as wanted: the header has the last word once it is here."""
    assert judge(answer(**attributes), routes(when), calling_ae="P").wanted is wanted


@given(known=st.fixed_dictionaries({}, optional={
    "StationName": st.sampled_from(["A1", "B"]), "ImageType": st.sampled_from([["ORIGINAL", "PRIMARY"], ["DERIVED"]]),
    "CorrectedImage": st.sampled_from([["ATTN"], ["DECY"]]), "Units": st.sampled_from(["BQML", "PROPCPS", "CNTS"]),
    "SeriesType": st.sampled_from([["STATIC", "IMAGE"], ["GATED", "IMAGE"]])}), forgotten=st.sets(st.integers(0, 4)))
def test_knowing_less_never_makes_a_series_unwanted(known: dict[str, Any], forgotten: set[int]) -> None:
    """What is wanted by all that is known is wanted by a part of it: an answer that says less loses no study."""
    some = routes('{ StationName = "A*" }')
    less = {keyword: value for number, (keyword, value) in enumerate(known.items()) if number not in forgotten}
    if judge(answer(**known), some, calling_ae="P").wanted:
        assert judge(answer(**less), some, calling_ae="P").wanted


def test_routes_and_rules_name_what_is_asked_for() -> None:
    """Attributes of routes are return keys; those inside sequences and the AE title cannot be."""
    keys = return_keys(routes('{ StationName = "*", CallingAETitle = "*", "RadiopharmaceuticalInformationSequence'
                              '.Radiopharmaceutical" = "*" }'))
    assert {"StationName", "ImageType", "CorrectedImage"} <= set(keys) and "CallingAETitle" not in keys
    assert not any("." in key for key in keys)


# --- the count at the source


SOURCE_ROUTE = PET_ROUTE + 'guide = "never"\nsource = "PACS"\n'


@pytest.fixture
def counting(tmp_path: Path, source: SourcePeer) -> Iterator[tuple[Site, Matcher]]:
    """A node whose route goes by the count at the source."""
    with Site(tmp_path, source.port, route=SOURCE_ROUTE) as site:
        source.destination = ("127.0.0.1", site.port)
        yield site, Matcher(site.config, site.ledger, site.spool, clock=site.clock, poll_s=1,
                            full_settings=full_settings_here)


def look(site: Site, matcher: Matcher, until: Any, *, step_s: float = 1.0) -> Any:
    """Tick as the clock goes until `until` gives something."""
    def once() -> Any:
        site.now += step_s
        matcher.tick()
        return until()
    return soon(once)


def series(site: Site) -> dict[str, Any]:
    return site.ledger.series(PET_UID)


def test_a_series_is_complete_when_the_source_holds_as_many(counting: tuple[Site, Matcher]) -> None:
    """Not before it was asked; the reason says so."""
    site, matcher = counting
    receive(site, PET)
    site.now += 31
    matcher.tick()
    assert (series(site)["state"], series(site)["code"]) == ("waiting", "source-count")
    assert look(site, matcher, lambda: series(site)["state"] == "matched")


def test_where_the_source_has_more_it_is_fetched(counting: tuple[Site, Matcher]) -> None:
    """A missing end that no header shows: waiting with both numbers, then whole."""
    site, matcher = counting
    receive(site, [*pet_series(NumberOfSlices=None)[:6]])
    site.now += 31
    assert look(site, matcher, lambda: series(site)["code"] == "peer-count")
    assert "6 instances here, 8 at the source" in series(site)["reason"]
    assert site.rows()[PET_UID]["state"] == "seen"
    site.nightly()._fetch(site.peer)  # no nightly query: the count alone asks for it
    assert len(site.ledger.instances(PET_UID)) == 8
    site.now += 31
    assert look(site, matcher, lambda: series(site)["state"] == "matched")


def test_a_source_that_cannot_be_asked_means_waiting_then_held(counting: tuple[Site, Matcher],
                                                              source: SourcePeer) -> None:
    """The reason names the peer; other series go on; after give_up_h a person is asked."""
    site, matcher = counting
    source.stop()
    receive(site, PET)
    receive(site, pet_series(seed=3, CorrectedImage=["DECY"]))
    site.now += 31
    assert look(site, matcher, lambda: "does not answer" in series(site)["reason"])
    assert series(site)["state"] == "waiting"
    assert {row["state"] for row in site.ledger.query("SELECT state FROM series WHERE series_uid <> ?", (PET_UID,))} \
        == {"ignored"}
    site.now += 24 * 3600
    matcher.tick()
    assert (series(site)["state"], series(site)["code"]) == ("held", "source-count")
    assert "Remedy" in series(site)["reason"]


def test_a_source_that_comes_back_is_asked_again(counting: tuple[Site, Matcher], source: SourcePeer) -> None:
    """Down at the first look, there at a later one."""
    site, matcher = counting
    source.stop()
    receive(site, PET)
    site.now += 31
    assert look(site, matcher, lambda: "does not answer" in series(site)["reason"])
    source.start()
    assert look(site, matcher, lambda: series(site)["state"] == "matched", step_s=10)


def test_a_count_that_does_not_agree_is_asked_again_with_pauses(counting: tuple[Site, Matcher],
                                                               source: SourcePeer) -> None:
    """The source holds fewer, for now; then it is down: not a connection a second; then it has caught up."""
    site, matcher = counting
    source.datasets = PET[:5]
    receive(site, PET)
    site.now += 31
    assert look(site, matcher, lambda: series(site)["code"] == "peer-count")
    source.stop()
    asked = len(source.asked)
    site.now += 120
    assert look(site, matcher, lambda: matcher._counts._problems, step_s=0)
    known = matcher._counts._problems["PACS"]
    for _ in range(10):
        site.now += 2
        matcher.tick()
    assert matcher._counts._problems["PACS"] == known
    source.datasets = PET
    source.start()
    assert look(site, matcher, lambda: series(site)["state"] == "matched", step_s=10)
    assert len(source.asked) > asked
