"""SIGHUP: what may change takes effect, what cannot is named, a file with errors changes nothing, jobs run on."""

from __future__ import annotations

import json
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dicomnode import work, workers
from dicomnode.config import Config, parse
from dicomnode.errors import ConfigError
from dicomnode.ledger import NewJob
from dicomnode.reload import NEEDS_RESTART, Reloader, merged
from dicomnode.runner import ChildRunner
from tests.factories import pet_series
from tests.node.line import PET_ROUTE, Line
from tests.peers import wait_until

PEER = '[[peer]]\nname = "PACS"\nae_title = "PACS"\nhost = "127.0.0.1"\nport = 104\n'
OTHER = '[[peer]]\nname = "OTHER"\nae_title = "OTHER"\nhost = "127.0.0.1"\n'


def test_what_changed_is_named_by_section_and_key_or_by_name() -> None:
    """Peers and routes by their names, also those that came or went; a new order of routes is a change."""
    old = parse(PEER + PET_ROUTE)
    new = parse('[work]\nretry_s = 5\n[delivery]\ngive_up_h = 1\n' + PEER.replace("port = 104", "port = 105") + OTHER
                + PET_ROUTE + PET_ROUTE.replace("all-pet", "second"))
    reading = merged(old, new)
    assert set(reading.changed) == {"work.retry_s", "delivery.give_up_h", "peer PACS", "peer OTHER", "route second"}
    assert reading.restart == () and reading.config == new
    turned = parse(PEER + OTHER + PET_ROUTE.replace("all-pet", "second") + PET_ROUTE)
    assert merged(parse(PEER + OTHER + PET_ROUTE + PET_ROUTE.replace("all-pet", "second")), turned).changed == (
        "order of routes",)
    assert merged(old, parse(PEER + PET_ROUTE)).changed == ()


def test_what_cannot_change_keeps_its_old_value_and_is_named() -> None:
    """Port, AE title, data directory, TLS port: of the rest of the file everything counts."""
    reading = merged(parse(PEER), parse(
        '[node]\nport = 4000\nae_title = "NEW"\ndata_dir = "/elsewhere"\nlog_level = "debug"\n'
        '[tls]\nport = 2762\ncertificate = "/c"\nkey = "/k"\nca = "/a"\n' + PEER))
    assert set(reading.restart) == {"node.port", "node.ae_title", "node.data_dir", "tls.port", "tls.certificate",
                                    "tls.key", "tls.ca"}
    assert reading.changed == ("node.log_level",)
    assert reading.config == parse('[node]\nlog_level = "debug"\n' + PEER)


def test_services_that_were_not_offered_at_the_start_are_named() -> None:
    """The first peer that may query, or that is asked for commitment: its other rights hold at once."""
    off = "[services]\nstorage_commitment = false\n"
    reading = merged(parse(off + PEER), parse(off + PEER + 'may_query = true\nconfirm = "commitment"\n'))
    assert reading.changed == ("peer PACS",) and len(reading.restart) == 2
    assert reading.config.peer[0].may_query
    more = parse(off + PEER + "may_query = true\n" + OTHER + "may_query = true\n")
    assert merged(parse(off + PEER + "may_query = true\n"), more).restart == ()


def test_a_peer_that_goes_only_with_what_needs_a_restart_is_refused() -> None:
    """TLS to a peer before the authorities of [tls] are in force: said, with the keys that wait."""
    new = '[tls]\nca = "/a"\n' + PEER + "tls = true\n"
    with pytest.raises(ConfigError, match=r"needs a restart of the node \(tls.ca\).*'PACS' has tls = true"):
        merged(parse(PEER), parse(new))


def test_every_key_that_needs_a_restart_exists() -> None:
    """A key that is renamed must be renamed here too."""
    config = Config()
    for key in NEEDS_RESTART:
        section, _, name = key.partition(".")
        assert hasattr(config, section) and (not name or hasattr(getattr(config, section), name)), key


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    monkeypatch.setattr("dicomnode.matcher.Matcher.prepare", lambda _: None)  # loads the libraries of a method
    with Line(tmp_path, toml='[work]\ndevices = ["cpu"]\nheartbeat_s = 1\n', route=PET_ROUTE) as line:
        yield line


def never(_: Config) -> None:
    raise AssertionError("nothing is to be applied")


def written(line: Line, text: str) -> Path:
    path = line.folder / "node.toml"
    path.write_text(text, encoding="utf-8")
    return path


def events(line: Line) -> list[tuple[str, str, str]]:
    return [(event["code"], event["actor"], event["reason"]) for event in line.ledger.events()
            if event["code"].startswith("config-")]


def test_a_file_with_errors_keeps_the_old_configuration_and_each_wrong_key_is_said(line: Line) -> None:
    """In the log one by one, and as an event of kind node."""
    reloader = Reloader(written(line, PEER), parse(PEER), part="work")
    reloader.ask()
    written(line, "[work]\nattempts = 0\n[nonsense]\nkey = 1\n" + PEER)
    assert not reloader.take(line.ledger, never, now=1.0) and reloader.config == parse(PEER)
    ((code, actor, reason),) = events(line)
    assert (code, actor) == ("config-refused", "work")
    assert "work.attempts" in reason and "nonsense: unknown key" in reason and "stays in force" in reason
    written(line, "not [ TOML")
    reloader.ask()
    assert not reloader.take(line.ledger, never, now=2.0)
    (line.folder / "node.toml").unlink()
    reloader.ask()
    assert not reloader.take(line.ledger, never, now=3.0) and len(events(line)) == 3


def test_it_is_read_once_for_each_time_it_is_asked_for(line: Line) -> None:
    """Not without being asked, not again; a file that says the same changes nothing but is recorded."""
    reloader = Reloader(written(line, PEER + OTHER), parse(PEER), part="receive")
    applied: list[Config] = []
    assert not reloader.take(line.ledger, never, now=1.0)
    reloader.ask()
    assert reloader.take(line.ledger, applied.append, now=2.0) and applied == [parse(PEER + OTHER)]
    assert not reloader.take(line.ledger, never, now=3.0)
    reloader.ask()
    assert not reloader.take(line.ledger, never, now=4.0)
    assert [reason for _, _, reason in events(line)] == ["in force: peer OTHER", "in force: nothing new"]


def test_a_ledger_that_cannot_be_written_does_not_keep_the_new_configuration_out(
        line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disk full: the event is lost, not the change."""
    def full(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(line.ledger, "event", full)
    reloader = Reloader(written(line, PEER + OTHER), parse(PEER), part="receive")
    reloader.ask()
    assert reloader.take(line.ledger, lambda _: None, now=1.0) and reloader.config == parse(PEER + OTHER)


def test_what_cannot_be_applied_is_refused_and_read_again_when_asked_again(line: Line) -> None:
    """A certificate of a new peer that cannot be used: the old configuration stays, also for the next reading."""
    def cannot(_: Config) -> None:
        raise ConfigError("peer OTHER: no such certificate")

    reloader = Reloader(written(line, PEER + OTHER), parse(PEER), part="receive")
    reloader.ask()
    assert not reloader.take(line.ledger, cannot, now=1.0) and reloader.config == parse(PEER)
    reloader.ask()
    assert reloader.take(line.ledger, lambda _: None, now=2.0)
    assert [code for code, _, _ in events(line)] == ["config-refused", "config-read"]


# --- the worker

CHILD = """
import json, pathlib, sys, time
path = pathlib.Path(sys.argv[1]); order = json.loads(path.read_text())
gate = pathlib.Path(order["derivation"]["institution"])
while not gate.exists():
    print(json.dumps({"kind": "progress", "stage": "waits", "step": 1, "steps": 2, "loss": None}), flush=True)
    time.sleep(0.1)
print(json.dumps({"kind": "refused", "code": "done", "reason": order["derivation"]["series_description"],
                  "remedy": str(order["device"])}), flush=True)
"""


def test_a_running_job_goes_on_undisturbed_and_the_next_one_has_the_new_settings(
        line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same child to its end with what it was started with; a device that is gone is left, a new one taken."""
    monkeypatch.setattr(work, "ChildRunner", lambda device, threads: ChildRunner(
        device, threads, command=(sys.executable, "-I", "-c", CHILD)))
    uid, gate = line.receive(pet_series()), line.folder / "gate"
    line.ledger.set_series(uid, "complete", now=line.now)
    study = line.ledger.series(uid)["study_uid"]
    first, second = (line.ledger.add_job(NewJob(f"id{n}", uid, study, None, "all-pet", "nearest", "default", {},
                                                ("PACS",), ()), now=line.now) for n in range(2))
    config = line.config.model_copy(update={"node": line.config.node.model_copy(update={"institution": str(gate)})})
    fresh = json.loads(config.model_dump_json())
    fresh["derived"]["series_description"] = "changed"
    fresh["work"]["devices"] = ["cuda:0"]
    reloader = Reloader(Path("unused"), config, part="work", read=lambda _: Config.model_validate(fresh))
    stop, ready = threading.Event(), threading.Event()
    thread = threading.Thread(target=work.run, args=(config,),
                              kwargs={"stop": stop, "ready": ready.set, "reloader": reloader})
    thread.start()
    try:
        wait_until("the first job to run", lambda: line.ledger.job(first)["progress"], timeout_s=20)
        reloader.ask()
        wait_until("the new device", lambda: {row["device"] for row in workers.listing(line.ledger)} == {
            "cpu", "cuda:0"}, timeout_s=20)
        assert line.ledger.job(first)["state"] == "running" and line.ledger.job(first)["attempts"] == 1
        gate.touch()
        wait_until("both jobs to end", lambda: {line.ledger.job(job)["state"] for job in (first, second)} == {"held"},
                   timeout_s=20)
        wait_until("the old device to be left", lambda: [row["device"] for row in workers.listing(line.ledger)] == [
            "cuda:0"], timeout_s=20)
    finally:
        stop.set()
        thread.join(30)
    assert line.ledger.job(first)["reason"] == "NBD deblurred. Remedy: cpu"
    assert line.ledger.job(second)["reason"] == "changed. Remedy: cuda:0"


def test_the_matcher_and_the_deliveries_work_by_the_new_configuration(
        line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """A route that came by SIGHUP decides the next series; the ticks go on, none twice at once."""
    seen: list[Any] = []
    monkeypatch.setattr("dicomnode.matcher.Matcher.tick", lambda matcher: seen.append(
        (time.monotonic(), [route.name for route in matcher._config.route])))
    fresh: dict[str, Any] = json.loads(line.config.model_dump_json())
    fresh["route"][0]["name"] = "renamed"
    reloader = Reloader(Path("unused"), line.config, part="work", read=lambda _: Config.model_validate(fresh))
    stop, ready = threading.Event(), threading.Event()
    thread = threading.Thread(target=work.run, args=(line.config,),
                              kwargs={"stop": stop, "ready": ready.set, "reloader": reloader})
    thread.start()
    try:
        wait_until("a tick", lambda: seen, timeout_s=20)
        reloader.ask()
        wait_until("a tick by the new one", lambda: seen[-1][1] == ["renamed"], timeout_s=20)
    finally:
        stop.set()
        thread.join(30)
    assert seen[0][1] == ["all-pet"]
