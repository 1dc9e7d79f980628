"""/metrics: what Prometheus is told of a node, and that what it costs does not grow with the years."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dicomnode import workers
from dicomnode.config import parse
from dicomnode.ledger import InstanceRow, Ledger
from dicomnode.measures import gpus
from dicomnode.spool import Spool
from dicomnode.tally import Reception, Tally
from dicomnode.web.app import create
from dicomnode.web.metrics import NodeCollector
from tests.web.nodes import NOW

NVIDIA = "0, NVIDIA H200, 81, 21504, 143771, 63\n1, NVIDIA H200, [N/A], 4, 143771, [N/A]\n"
UID = re.compile(r"\d+(\.\d+){4,}")
TOML = """
[node]
data_dir = "{folder}"
[[peer]]
name = "SCANNER"
ae_title = "PETCT1"
host = "127.0.0.1"
[[peer]]
name = "PACS"
ae_title = "PACS"
host = "127.0.0.1"
port = 1
query = true
[web]
certificate = "{folder}/none.pem"
key = "{folder}/none.pem"
[[route]]
name = "psma"
when = {{ Modality = "PT" }}
send_to = ["PACS"]
"""


def figures(text):
    """(name, {labels}) -> value of every sample."""
    return {(sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text) for sample in family.samples}


def value(found, name, **labels):
    return found[f"dicomnode_{name}", frozenset(labels.items())]


def site_of(folder, *, now=NOW):
    """A stand-in for the application's Site over a data directory."""
    config, spool = parse(TOML.format(folder=folder)), Spool(folder)
    return SimpleNamespace(config=config, ledger=Ledger(spool.ledger_path), spool=spool, clock=lambda: now)


def scrape(site, **arguments):
    """The exposition of one scrape by a process that has just started."""
    return scraper(site, **arguments)()


def scraper(site, **arguments):
    registry = CollectorRegistry(auto_describe=False)
    registry.register(NodeCollector(lambda: site, **{"ask_gpus": list, **arguments}))
    return lambda: generate_latest(registry).decode()


@pytest.fixture
def site(node):
    """The furnished node, seen by a scrape."""
    found = site_of(node.folder / "data")
    yield found
    found.ledger.close()


@pytest.fixture
def empty(tmp_path):
    found = site_of(tmp_path)
    yield found
    found.ledger.close()


def an_instance(n, *, caller="PETCT1", size=100, at=NOW, series="2.25.7"):
    return InstanceRow(sop_instance_uid=f"2.25.8.{n}", sop_class_uid="1.2", study_uid="2.25.6", series_uid=series,
                       transfer_syntax_uid="1.2", path=f"objects/{n}.dcm", bytes=size, sha256=str(n),
                       calling_ae=caller, address="127.0.0.1", received_at=at, modality="PT")


# --- the page


def test_prometheus_can_read_it(client):
    """Its own parser does, and it says what the ledger holds."""
    answer = client.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = figures(answer.text)
    assert {state: value(found, "jobs", state=state) for state in ("held", "failed", "queued", "running", "delivered")
            } == {"held": 1, "failed": 1, "queued": 1, "running": 1, "delivered": 1}
    assert value(found, "held", what="job", code="gate") == 1
    assert value(found, "series", state="waiting") == 1


def test_strangers_learn_nothing(app):
    """Without a token there are no figures."""
    answer = TestClient(app, base_url="http://127.0.0.1", follow_redirects=False).get("/metrics")
    assert answer.status_code == 401 and "dicomnode_" not in answer.text


def test_the_token_to_look_is_enough(node):
    """Prometheus needs no right to act."""
    token = node.folder / "viewer.token"
    token.write_text("v" * 43, encoding="ascii")
    token.chmod(0o600)
    app = create(parse(f"{node.toml}\n[web]\nviewer_token_file = {json.dumps(str(token))}\n"), clock=lambda: NOW)
    client = TestClient(app, base_url="http://127.0.0.1", headers={"Authorization": f"Bearer {'v' * 43}"})
    assert client.get("/metrics").status_code == 200
    app.state.site.ledger.close()


def test_every_figure_is_named_and_explained(site):
    """Our prefix, a text, `_total` for counters, no other unit than seconds, bytes, ratio and celsius."""
    families = list(text_string_to_metric_families(scrape(site, ask_gpus=lambda: gpus(lambda: NVIDIA))))
    assert len(families) > 40
    for family in families:
        assert family.name.startswith("dicomnode_"), family.name
        assert family.documentation.endswith("."), family.name
        assert not re.search(r"_(ms|minutes|hours|days|mb|gb|percent|count)$", family.name), family.name


def test_nothing_of_a_patient_or_study_is_told(site):
    """No UID, no accession number: a monitoring server is no place for them."""
    text = scrape(site)
    assert not UID.search(re.sub(r"127\.0\.0\.1", "", text)) and "ACC" not in text


def test_a_broken_ledger_fails_the_scrape(site):
    """Better no answer, which Prometheus shows as `up` 0, than figures that are not so."""
    site.ledger.close()
    with pytest.raises(Exception, match="closed"):
        scrape(site)


# --- what is so now


def test_the_queue_tells_its_age_and_what_is_urgent(site):
    """From the time of queueing, also of a job that failed and is tried again."""
    found = figures(scrape(site))
    oldest = site.ledger.query("SELECT min(created_at) AS at FROM job WHERE state IN ('queued', 'failed')")[0]["at"]
    assert value(found, "queue_oldest_age_seconds") == pytest.approx(NOW - oldest)
    assert value(found, "queue_jobs", route="psma") == 2 and value(found, "queue_urgent_jobs") == 0
    site.ledger.query("UPDATE job SET urgent = 1 WHERE state = 'queued'")
    assert value(figures(scrape(site)), "queue_urgent_jobs") == 1


def test_deliveries_that_wait_fail_or_are_given_up_are_told_by_peer(site):
    """A peer without any has zeros, so that an alert sees the first."""
    ledger = site.ledger
    assert value(figures(scrape(site)), "deliveries", peer="PACS", state="dead") == 0
    ledger.query("UPDATE delivery SET state = 'waiting', attempts = 2, created_at = ? WHERE peer = 'PACS'", (NOW - 99,))
    found = figures(scrape(site))
    assert value(found, "deliveries", peer="PACS", state="failing") == 1
    assert value(found, "delivery_oldest_timestamp_seconds", peer="PACS") == NOW - 99
    ledger.query("UPDATE delivery SET state = 'dead' WHERE peer = 'PACS'")
    assert value(figures(scrape(site)), "deliveries", peer="PACS", state="dead") == 1


def test_a_worker_is_named_by_its_device_and_down_when_silent(empty):
    """Its process id, another after each start, is no label."""
    workers.enter(empty.ledger, "host:17:cuda:0", device="cuda:0", now=NOW - 500)
    workers.enter(empty.ledger, "host:17:cuda:1", device="cuda:1", now=NOW - 5)
    found = figures(scrape(empty))
    assert value(found, "worker_up", worker="cuda:0") == 0 and value(found, "worker_up", worker="cuda:1") == 1
    assert value(found, "worker_heartbeat_timestamp_seconds", worker="cuda:0") == NOW - 500


def test_a_certificate_that_cannot_be_read_is_told(empty):
    """As what is not a number: the rules have an alert for it."""
    assert math.isnan(value(figures(scrape(empty)), "certificate_expiry_timestamp_seconds",
                            certificate="web.certificate"))


def test_gpus_are_told_where_there_are_any(empty):
    """In base units; what nvidia-smi does not know has no series, and where it is not there no GPU has."""
    found = figures(scrape(empty, ask_gpus=lambda: gpus(lambda: NVIDIA)))
    assert value(found, "gpu_utilization_ratio", gpu="0", model="NVIDIA H200") == pytest.approx(0.81)
    assert value(found, "gpu_memory_used_bytes", gpu="1", model="NVIDIA H200") == 4 * 2**20
    assert not [key for key in found if key[0] == "dicomnode_gpu_temperature_celsius" and ("gpu", "1") in key[1]]
    assert "gpu" not in scrape(empty, ask_gpus=lambda: gpus(lambda: ""))


def test_what_is_dear_is_not_asked_at_every_scrape(empty):
    """nvidia-smi is a process of its own: once in a quarter of a minute is enough."""
    asked, times = [], [0.0]
    again = scraper(empty, ask_gpus=lambda: asked.append(1) or [], timer=lambda: times[0])
    for at in (0.0, 5.0, 14.0, 16.0):
        times[0] = at
        again()
    assert len(asked) == 2


# --- what adds up


def test_durations_are_counted_by_method_preset_and_device(site):
    """From the start of a job's last run to its result."""
    found = figures(scrape(site))
    labels = {"method": "nbd", "preset": "best", "device": "cpu"}
    assert value(found, "job_duration_seconds_count", **labels) == 1
    assert value(found, "job_duration_seconds_sum", **labels) == pytest.approx(95)
    assert value(found, "job_duration_seconds_bucket", le="60.0", **labels) == 0
    assert value(found, "job_duration_seconds_bucket", le="120.0", **labels) == 1
    assert value(found, "job_wait_seconds_count", route="psma") == 4


def test_what_was_sent_failed_and_was_held_is_counted(site):
    """With the reason code; peers and states of the configuration start at 0."""
    found = figures(scrape(site))
    assert value(found, "deliveries_finished_total", peer="PACS", state="delivered") == 1
    assert value(found, "deliveries_finished_total", peer="PACS", state="dead") == 0
    assert value(found, "sent_instances_total", peer="PACS") == 32
    assert value(found, "job_failures_total", code="memory") == 1
    assert value(found, "holds_total", what="job", code="gate") == 1
    assert value(found, "received_series_total", modality="PT") == 7


def test_counters_go_on_after_a_restart(site, monkeypatch):
    """Counted in one go, or by processes that each go on from what the one before kept: the same."""
    whole = Tally().look(site.ledger)
    monkeypatch.setattr("dicomnode.tally.PORTION", 3)
    monkeypatch.setattr("dicomnode.tally.SAVED_EVENTS", 1)
    monkeypatch.setattr("dicomnode.tally.PATIENCE_S", -1.0)
    looks = [Tally().look(site.ledger) for _ in range(whole.mark // 3 + 1)]
    assert looks[:-2] == [None] * (len(looks) - 2) and len(looks) > 5
    assert looks[-1] == whole and len(whole.counts) == 8 and whole.durations and whole.waits


def test_a_ledger_that_was_rebuilt_is_counted_anew(site):
    """Its events are fewer than those that were counted: nothing of the old count is left in the new."""
    tally = Tally()
    assert tally.look(site.ledger).counts["job_changes"]
    site.ledger.query("DELETE FROM event WHERE id > 1")
    assert not tally.look(site.ledger).counts.get("job_changes")


def test_refusals_that_the_log_left_out_count(empty):
    """The security log writes one line for many: the next one says how many were left out."""
    for reason in ("unknown AE title, from 10.0.0.9", "unknown AE title, from 10.0.0.9 (41 more of these since the "
                   "last note)"):
        empty.ledger.event("security", now=NOW, code="calling-ae", reason=reason)
    assert value(figures(scrape(empty)), "refusals_total", kind="security", code="calling-ae") == 43


def test_what_is_received_adds_up_by_caller(empty):
    """Instances and bytes; a caller that the configuration does not know is "other"; a scrape later it goes on."""
    now = [NOW]
    empty.clock = lambda: now[0]
    again = scraper(empty)
    empty.ledger.add_instances([an_instance(n) for n in range(5)])
    found = figures(again())
    assert value(found, "received_instances_total", calling_ae="PETCT1") == 5
    assert value(found, "received_bytes_total", calling_ae="PETCT1") == 500
    assert value(found, "received_bytes_total", calling_ae="PACS") == 0
    for step in range(1, 8):
        now[0] = NOW + 250 * step
        empty.ledger.add_instances([an_instance(100 + step, at=now[0] - 1, size=1000),
                                    an_instance(200 + step, at=now[0] - 2, caller="OLD", series="2.25.9")])
        found = figures(again())
        assert value(found, "received_bytes_total", calling_ae="PETCT1") == 500 + 1000 * step
        assert value(found, "received_instances_total", calling_ae="other") == step
        assert value(found, "received_timestamp_seconds", calling_ae="PETCT1") == now[0] - 1
        restarted = figures(scrape(empty))
        assert counters_of(restarted, "received") == counters_of(found, "received")


def counters_of(found, word):
    return {key: number for key, number in found.items() if word in key[0]}


def test_a_long_ledger_is_read_in_several_looks(empty, monkeypatch):
    """No scrape lasts longer than a moment, and no figure is told before all is counted."""
    monkeypatch.setattr("dicomnode.tally.PORTION", 2)
    monkeypatch.setattr("dicomnode.tally.PATIENCE_S", -1.0)
    empty.ledger.add_instances([an_instance(n, at=NOW - 5000) for n in range(5)])
    reception = Reception()
    looks = [reception.look(empty.ledger, now=NOW + step) for step in range(4)]
    assert looks[:2] == [None, None] and looks[-1]["PETCT1"].instances == 5


def test_strange_words_make_no_new_series_for_ever(empty):
    """At most a hundred of a kind are told apart; an unknown modality is "other"."""
    with empty.ledger.transaction():
        for n in range(150):
            empty.ledger.event("security", now=NOW, code=f"code{n}", reason="")
    empty.ledger.add_instances([an_instance(1)])
    empty.ledger.query("UPDATE series SET modality = 'X^Y'")
    found = figures(scrape(empty))
    refusals = counters_of(found, "refusals_total")
    assert len(refusals) == 101 and sum(refusals.values()) == 150
    assert value(found, "received_series_total", modality="other") == 1


def test_a_full_disk_does_not_end_the_figures(empty, monkeypatch):
    """What was counted cannot be kept then; it is counted again after a restart."""
    monkeypatch.setattr("dicomnode.tally.SAVED_EVENTS", 1)
    empty.ledger.event("security", now=NOW, code="calling-ae", reason="")
    empty.ledger.query("PRAGMA query_only = ON")
    assert value(figures(scrape(empty)), "refusals_total", kind="security", code="calling-ae") == 1


# --- cost


def seconds_of(again):
    """Of the quickest of some scrapes after the first: others work on this machine, too."""
    again()
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        again()
        best = min(best, time.perf_counter() - began)
    return best


def test_a_scrape_is_cheap_with_ten_thousand_studies(crowded_data: Path, tmp_path):
    """Below 50 ms, and no dearer than for a node that is empty by more than that."""
    shutil.copytree(crowded_data, tmp_path / "data")
    site = site_of(tmp_path / "data")
    again = scraper(site)
    assert value(figures(again()), "jobs", state="delivered") > 9900
    assert seconds_of(again) < 0.05
    site.ledger.close()
