"""From received series to jobs: each series ends where the rules say, once, with its reason."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from structlog.testing import capture_logs

from dicomnode import identity, operate
from dicomnode.matcher import Matcher
from dicomnode.pipeline import full_settings
from tests.factories import ct_series, nm_tomo, pet_series
from tests.node.line import PET_ROUTE, Line

GUIDED_ROUTE = PET_ROUTE.replace('"nearest"', '"nbd"').replace('"default"', '"paper"')


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    """A node whose only route looks at the CT."""
    with Line(tmp_path, route=GUIDED_ROUTE) as line:
        yield line


def jobs(line: Line, series_uid: str) -> list[tuple[str, int]]:
    """(state, number of inputs) of the jobs of a series."""
    return [(job["state"], len(job["inputs"])) for job in line.ledger.jobs_of_series(series_uid)]


def judge(line: Line, *, after_s: float) -> None:
    line.now += after_s
    line.matcher().tick()


def build_and_send(line: Line, series_uid: str) -> int:
    """As if the newest job had been built and its sending begun; its id."""
    job = line.ledger.claim("w", now=line.now, lease_s=60)
    assert job is not None and job["series_uid"] == series_uid
    assert line.ledger.built(job["id"], "w", now=line.now, derived_series_uid="2.25.9", derived_path="derived/1",
                             derived_instances=2, report={})
    line.ledger.set_job(job["id"], "sending", now=line.now)
    return int(job["id"])


def test_a_series_is_not_judged_before_it_is_quiet(line: Line) -> None:
    """29 s after the last instance nothing happens, whatever came."""
    uid = line.receive(pet_series())
    judge(line, after_s=29)
    assert line.state(uid) == ("receiving", "")


def test_pet_and_ct_of_one_study_become_one_job(line: Line) -> None:
    """The CT is kept as guide, the PET is matched to it, one job with both as inputs."""
    ct = line.receive(ct_series())
    pet = line.receive(pet_series())
    judge(line, after_s=31)
    assert line.state(ct) == ("ignored", "guide")
    assert line.state(pet)[0] == "matched"
    (job,) = line.ledger.jobs_of_series(pet)
    assert job["guide_series_uid"] == ct and len(job["inputs"]) == 8 + 12
    assert job["send_to"] == ["PACS"] and job["method"] == "nbd"


def test_the_ct_may_come_later_than_the_pet(line: Line) -> None:
    """The PET waits for a CT, and takes it as soon as the CT is quiet."""
    pet = line.receive(pet_series())
    judge(line, after_s=31)
    assert line.state(pet) == ("waiting", "ct")
    line.now += 100
    ct = line.receive(ct_series())
    judge(line, after_s=10)
    assert line.state(pet) == ("waiting", "ct")
    judge(line, after_s=25)
    judge(line, after_s=6)
    assert [job["guide_series_uid"] for job in line.ledger.jobs_of_series(pet)] == [ct]


def test_a_pet_that_waits_writes_no_history_at_each_look(line: Line) -> None:
    """Many polls, one event."""
    pet = line.receive(pet_series())
    for _ in range(20):
        judge(line, after_s=20)
    assert line.state(pet) == ("waiting", "ct")
    assert [event["to_state"] for event in line.ledger.events()] == ["receiving", "waiting"]


def test_without_a_ct_the_method_runs_unguided_after_the_wait(line: Line) -> None:
    """guide = "prefer": after ct_wait_s the job is made without a guide."""
    pet = line.receive(pet_series())
    judge(line, after_s=31)
    judge(line, after_s=600)
    assert [job["guide_series_uid"] for job in line.ledger.jobs_of_series(pet)] == [None]


def test_a_method_that_looks_at_no_ct_does_not_wait_for_one(tmp_path: Path) -> None:
    """Queued at once; a CT that is there is noted with the job and is no input of it."""
    with Line(tmp_path) as line:
        alone = line.receive(pet_series(seed=1))
        ct, pet = line.receive(ct_series()), line.receive(pet_series())
        judge(line, after_s=31)
        assert jobs(line, alone) == [("queued", 8)]
        assert jobs(line, pet) == [("queued", 8)]
        assert [job["guide_series_uid"] for job in line.ledger.jobs_of_series(pet)] == [ct]


def test_a_route_that_requires_a_guide_holds_the_pet_and_a_person_may_release_it(tmp_path: Path) -> None:
    """guide = "require" without a CT is held with a remedy; released, it runs unguided."""
    with Line(tmp_path, route=PET_ROUTE + 'guide = "require"\n') as line:
        pet = line.receive(pet_series())
        judge(line, after_s=31)
        judge(line, after_s=600)
        assert line.state(pet)[0] == "held" and "allow unguided" in line.ledger.series(pet)["reason"]
        operate.release(line.ledger, pet, now=line.now, actor="me")
        judge(line, after_s=31)
        assert jobs(line, pet) == [("queued", 8)]


def test_a_route_that_never_guides_does_not_wait(tmp_path: Path) -> None:
    """guide = "never": queued at once, without the CT that is there."""
    with Line(tmp_path, route=PET_ROUTE + 'guide = "never"\n') as line:
        line.receive(ct_series())
        pet = line.receive(pet_series())
        judge(line, after_s=31)
        assert [job["guide_series_uid"] for job in line.ledger.jobs_of_series(pet)] == [None]


def test_a_ct_of_another_study_is_not_paired(line: Line) -> None:
    """Same patient room, other study: the PET goes on waiting."""
    line.receive(ct_series(seed=1))
    pet = line.receive(pet_series(seed=0))
    judge(line, after_s=31)
    assert line.state(pet) == ("waiting", "ct")


def test_missing_slices_are_waited_for_then_held_and_release_does_not_bridge_a_gap(line: Line) -> None:
    """A gap: waiting, after give_up_h held. A person may release it; the reader then decides about the geometry."""
    pet = line.receive(pet_series(missing=(3,)))
    judge(line, after_s=31)
    assert line.state(pet) == ("waiting", "gap")
    judge(line, after_s=24 * 3600)
    assert line.state(pet) == ("held", "gap")
    assert "Remedy" in line.ledger.series(pet)["reason"]


def test_the_missing_slice_completes_the_series(tmp_path: Path) -> None:
    """Late slices of a waiting series make it receiving again, then matched."""
    with Line(tmp_path, route=PET_ROUTE + 'guide = "never"\n') as line:
        series = pet_series()
        pet = line.receive(series[:3] + series[4:])
        judge(line, after_s=31)
        assert line.state(pet)[0] == "waiting"
        line.receive(series[3:4])
        assert line.state(pet)[0] == "receiving"
        judge(line, after_s=31)
        assert jobs(line, pet) == [("queued", 8)]


@pytest.mark.parametrize(("datasets", "code"), [
    ([nm_tomo()], "other-sop-class"),
    (pet_series(attenuation_corrected=False), "not-attenuation-corrected"),
    (pet_series(ImageType=["DERIVED", "PRIMARY"]), "derived"),
])
def test_what_is_none_of_our_business_is_ignored_with_the_reason(
        line: Line, datasets: list[Dataset], code: str) -> None:
    """Stored, ignored, explained; no job."""
    uid = line.receive(datasets)
    judge(line, after_s=31)
    assert line.state(uid) == ("ignored", code) and line.ledger.series(uid)["reason"]
    assert jobs(line, uid) == []


@pytest.mark.parametrize(("datasets", "code"), [
    (pet_series(time_slices=2), "dynamic"), (pet_series(units=None), "header-incomplete"),
])
def test_what_cannot_be_deblurred_is_held_with_a_remedy_even_if_released(
        line: Line, datasets: list[Dataset], code: str) -> None:
    """Release lifts holds for count, conflict and late input, never for eligibility."""
    uid = line.receive(datasets)
    judge(line, after_s=31)
    assert line.state(uid) == ("held", code) and "Remedy" in line.ledger.series(uid)["reason"]
    operate.release(line.ledger, uid, now=line.now, actor="me")
    judge(line, after_s=31)
    assert line.state(uid) == ("held", code)


def test_no_route_no_job(tmp_path: Path) -> None:
    """A PET that no route wants is ignored and says so."""
    with Line(tmp_path, route=PET_ROUTE.replace('"PT"', '"XX"')) as line:
        uid = line.receive(pet_series())
        judge(line, after_s=31)
        assert line.state(uid) == ("ignored", "no-route")


def test_our_own_series_coming_back_is_ignored(line: Line) -> None:
    """Known by the ledger, even if its header were stripped of every sign."""
    pet = line.receive(pet_series())
    judge(line, after_s=31)
    judge(line, after_s=600)
    job = line.ledger.claim("w", now=line.now, lease_s=60)
    assert job is not None and job["series_uid"] == pet
    back = pet_series(series=7)
    line.ledger.built(job["id"], "w", now=line.now, derived_series_uid=str(back[0].SeriesInstanceUID),
                      derived_path="derived/1", derived_instances=8, report={})
    uid = line.receive(back)
    judge(line, after_s=31)
    assert line.state(uid) == ("ignored", "own-output")


def test_other_bytes_under_a_known_uid_hold_the_series_until_released(tmp_path: Path) -> None:
    """A conflict is for a person; released, the first bytes are used."""
    with Line(tmp_path, route=PET_ROUTE + 'guide = "never"\n') as line:
        series = pet_series()
        pet = line.receive(series)
        other = copy.deepcopy(series[0])
        other.PatientID = "ANOTHER"
        line.receive([other])
        judge(line, after_s=31)
        assert line.state(pet) == ("held", "conflict")
        operate.release(line.ledger, pet, now=line.now, actor="me")
        judge(line, after_s=31)
        assert jobs(line, pet) == [("queued", 8)]


def longer(number: int) -> list[Dataset]:
    """A series of `number` slices that does not say how many it has, so that more may come."""
    return pet_series(slices=number, NumberOfSlices=None, SliceThickness="3.27")


def test_late_input_supersedes_a_job_that_is_not_out_yet(tmp_path: Path) -> None:
    """Two more slices while the job is queued: it is superseded, one new job has all ten."""
    with Line(tmp_path, route=PET_ROUTE + 'guide = "never"\n') as line:
        series = longer(10)
        pet = line.receive(series[:8])
        judge(line, after_s=31)
        line.receive(series[8:])
        judge(line, after_s=31)
        assert jobs(line, pet) == [("superseded", 8), ("queued", 10)]


def test_the_same_instances_again_make_no_second_job(tmp_path: Path) -> None:
    """A repeat changes nothing; a retry of the matching gives the same identity and nothing new."""
    with Line(tmp_path, route=PET_ROUTE + 'guide = "never"\n') as line:
        series = pet_series()
        pet = line.receive(series)
        judge(line, after_s=31)
        line.receive(series)
        judge(line, after_s=31)
        line.ledger.set_series(pet, "receiving", now=line.now)
        judge(line, after_s=31)
        assert line.state(pet)[0] == "matched" and jobs(line, pet) == [("queued", 8)]


def test_late_input_after_sending_is_held_and_release_makes_the_second_series(tmp_path: Path) -> None:
    """What is out is not replaced silently: held as late-input; released, a new job supersedes the old one, once."""
    with Line(tmp_path, route=PET_ROUTE + 'guide = "never"\n') as line:
        series = longer(12)
        pet = line.receive(series[:8])
        judge(line, after_s=31)
        build_and_send(line, pet)
        line.receive(series[8:10])
        judge(line, after_s=31)
        assert line.state(pet) == ("held", "late-input") and "Remedy" in line.ledger.series(pet)["reason"]
        assert jobs(line, pet) == [("sending", 8)]
        operate.release(line.ledger, pet, now=line.now, actor="me")
        judge(line, after_s=31)
        assert jobs(line, pet) == [("superseded", 8), ("queued", 10)]
        build_and_send(line, pet)
        line.receive(series[10:])
        judge(line, after_s=31)
        assert line.state(pet) == ("held", "late-input"), "one release does not free what comes after it"


def test_an_instance_that_arrives_while_the_series_is_judged_is_not_missed(tmp_path: Path) -> None:
    """The decision is dropped when the series changed under it; the next tick decides over all."""
    with Line(tmp_path, route=PET_ROUTE + 'guide = "never"\n') as line:
        series = longer(9)
        pet = line.receive(series[:8])
        matcher = line.matcher()
        decide = matcher._decide

        def slow(seen):  # type: ignore[no-untyped-def]
            decision = decide(seen)
            line.receive(series[8:])
            return decision

        matcher._decide = slow  # type: ignore[method-assign]
        line.now += 31
        matcher.tick()
        assert line.state(pet)[0] == "receiving" and jobs(line, pet) == []
        judge(line, after_s=31)
        assert jobs(line, pet) == [("queued", 9)]


def test_one_broken_series_does_not_stop_the_others(tmp_path: Path) -> None:
    """A file that vanished holds its series; the next series is judged all the same."""
    with Line(tmp_path, route=PET_ROUTE + 'guide = "never"\n') as line:
        broken = line.receive(pet_series(seed=1))
        good = line.receive(pet_series(seed=2))
        for row in line.ledger.instances(broken):
            line.spool.absolute(row["path"]).unlink()
        judge(line, after_s=31)
        assert line.state(broken) == ("held", "unreadable")
        assert jobs(line, good) == [("queued", 8)]


def test_settings_the_method_does_not_know_hold_the_series(tmp_path: Path) -> None:
    """A wrong setting is a person's to mend: held with the route's name."""
    with Line(tmp_path, route=PET_ROUTE + 'guide = "never"\nsettings = { nonsense = 1 }\n') as line:
        pet = line.receive(pet_series())
        judge(line, after_s=31)
        assert line.state(pet) == ("held", "settings") and "all-pet" in line.ledger.series(pet)["reason"]


def test_a_route_that_cannot_be_used_is_told_at_the_start(tmp_path: Path) -> None:
    """Before the first study of that route arrives; the other routes are not affected."""
    with Line(tmp_path, route=PET_ROUTE + "settings = { nonsense = 1 }\n") as line, capture_logs() as logs:
        line.matcher().prepare()
    assert [(entry["action"], entry["log_level"]) for entry in logs] == [("route_unusable", "error")]
    assert "all-pet" in logs[0]["event"] and "nonsense" in logs[0]["reason"]


def test_settings_that_cannot_be_asked_for_now_are_asked_for_again(tmp_path: Path) -> None:
    """The child that knows them was killed: the series waits, says why, and goes on at a later tick."""
    def killed(*_: Any) -> dict[str, Any]:
        raise identity.SettingsUnknown("ended with -9")

    with Line(tmp_path, route=PET_ROUTE + 'guide = "never"\n') as line:
        pet = line.receive(pet_series())
        line.now += 31
        Matcher(line.config, line.ledger, line.spool, clock=line.clock, full_settings=killed).tick()
        assert line.state(pet) == ("waiting", "settings-unknown") and "-9" in line.ledger.series(pet)["reason"]
        judge(line, after_s=6)
        assert jobs(line, pet) == [("queued", 8)]


def test_a_child_that_fails_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A status other than 0 is told, not taken for settings."""
    monkeypatch.setattr(identity.sys, "executable", "/bin/false")
    with pytest.raises(identity.SettingsUnknown, match="ended with 1"):
        identity.full_settings("tv", "default", {"psf_fwhm_mm": 9.5})


def test_identity_tells_apart_what_decides_the_image_and_nothing_else() -> None:
    """The order of the inputs is nothing; an input, the guide, a setting, the method and the version are something."""
    base: dict[str, Any] = {"inputs": ["1", "2"], "guide_inputs": ["3"], "method": "tv", "software_version": "1",
                            "settings": {"seed": 0, "psf_fwhm_mm": 6.0}}
    same = identity.job_identity(**base)
    assert identity.job_identity(**{**base, "inputs": ["2", "1"]}) == same
    assert identity.job_identity(**{**base, "settings": {"psf_fwhm_mm": 6.0, "seed": 0}}) == same
    others: list[dict[str, Any]] = [
        {"inputs": ["1"]}, {"inputs": ["1", "2", "3"], "guide_inputs": []}, {"guide_inputs": ["4"]},
        {"method": "cubic"}, {"settings": {"seed": 1, "psf_fwhm_mm": 6.0}}, {"software_version": "2"}]
    assert len({identity.job_identity(**{**base, **other}) for other in others} | {same}) == len(others) + 1


def test_the_child_tells_the_same_settings_as_the_method_itself_or_why_not() -> None:
    """Asked once per route, so that the working process never loads torch."""
    assert identity.full_settings("tv", "quick", {"psf_fwhm_mm": 7}) == full_settings("tv", "quick", {"psf_fwhm_mm": 7})
    with pytest.raises(identity.SettingsRefused, match="nonsense"):
        identity.full_settings("tv", "quick", {"nonsense": 1})
