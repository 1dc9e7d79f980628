"""Who is told what, when and how often: once, again after a while, and once that it is over; never a name."""

from __future__ import annotations

import json
import socket
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from email import message_from_string
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from typer.testing import CliRunner, Result

from dicomnode import digest, troubles
from dicomnode.alerts import MESSAGES_AN_HOUR, Alerter
from dicomnode.cli import app
from dicomnode.errors import ConfigError
from dicomnode.ledger import InstanceRow, NewJob
from dicomnode.memo import memo, set_memo
from dicomnode.notify import Outcome, Sender, read_urls
from dicomnode.reconcile import problem_key
from dicomnode.troubles import Machine
from tests.node.line import Line
from tests.peers import ReceiverProcess, wait_until

HOUR = 3600.0
ROOMY = 2**50
TOLD = Outcome(sent=(1,))


@dataclass
class Pager:
    """A notifier that keeps what it was given; `outcome` is its answer to every message, None: it hangs."""

    outcome: Outcome | None = TOLD
    messages: list[tuple[str, str]] = field(default_factory=list)

    def start(self, title: str, body: str) -> None:
        self.messages.append((title, body))

    def poll(self) -> Outcome | None:
        return self.outcome

    def close(self) -> None:
        pass


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    with Line(tmp_path, toml='[reception]\nlow_disk_mb = 1\n[alerts]\ndigest = false') as made:
        yield made


def alerter(line: Line, pager: Pager | None = None) -> Alerter:
    return Alerter(line.config, line.ledger, line.spool, clock=line.clock, notifier=pager)


def ticks(alerts: Alerter, line: Line, times: int = 2, *, every_s: float = 20.0) -> None:
    for _ in range(times):
        line.now += every_s
        alerts.tick()


def hold_series(line: Line, number: int = 1, *, code: str = "gap", reason: str = "Doe^Jane lacks a slice") -> str:
    uid = f"1.2.3.{number}"
    line.ledger.add_instances([InstanceRow(
        sop_instance_uid=f"{uid}.9", sop_class_uid="1.2", study_uid="1.2.3", series_uid=uid,
        transfer_syntax_uid="1.2.840.10008.1.2.1", path="x", bytes=1, sha256="0", calling_ae="SCANNER",
        address="127.0.0.1", received_at=line.now, modality="PT", accession_number=f"A{number}",
        series_description="Doe^Jane")])
    line.ledger.set_series(uid, "held", now=line.now, code=code, reason=reason)
    return uid


def queue_job(line: Line) -> int:
    uid = hold_series(line, 7)
    line.ledger.set_series(uid, "receiving", now=line.now)
    line.ledger.set_series(uid, "complete", now=line.now)
    job = line.ledger.add_job(NewJob(
        identity="i", series_uid=uid, study_uid="1.2.3", guide_series_uid=None, route="pet", method="tv",
        preset="default", settings={}, send_to=("PACS",), inputs=("1",)), now=line.now)
    line.ledger.claim("w", now=line.now, lease_s=60)
    return job


# --- saying


def test_what_is_held_is_said_once_again_after_repeat_h_and_once_that_it_is_over(line):
    """One message, silence, one that says STILL, one that says RESOLVED, silence."""
    pager = Pager()
    alerts = alerter(line, pager)
    uid = hold_series(line)
    ticks(alerts, line, 5)
    assert len(pager.messages) == 1
    title, body = pager.messages[0]
    assert title == "dicomnode NBDNODE: 1 problem" and "accession A1" in body and uid in body and "(gap)" in body
    line.now += line.config.alerts.repeat_h * HOUR
    ticks(alerts, line, 3)
    assert len(pager.messages) == 2 and pager.messages[1][1].startswith("STILL PROBLEM")
    line.ledger.set_series(uid, "receiving", now=line.now)
    ticks(alerts, line, 5)
    assert len(pager.messages) == 3 and pager.messages[2][1].startswith("RESOLVED: PT series held")
    assert line.ledger.query("SELECT * FROM alert") == []
    assert [row["code"] for row in line.ledger.events() if row["kind"] == "node"] == [
        "started", "alert", "alert", "alert-resolved"]


def test_no_message_holds_a_patient_name(line):
    """Reasons and descriptions come from objects and stay in the ledger; an accession number is cut to its length."""
    pager = Pager()
    hold_series(line)
    ticks(alerter(line, pager), line)
    assert pager.messages and "Doe" not in json.dumps(pager.messages) + json.dumps(
        [dict(row) for row in line.ledger.query("SELECT * FROM alert")])


def test_a_restart_says_nothing_twice(line):
    """What was said is remembered by the ledger."""
    pager = Pager()
    hold_series(line)
    alerts = alerter(line, pager)
    ticks(alerts, line)
    alerts.close()
    ticks(alerter(line, pager), line, 3)
    assert len(pager.messages) == 1


def test_never_more_messages_an_hour_than_promised_however_much_breaks(line):
    """A new held series every two minutes for three hours: no hour has more messages, and every series is in one."""
    pager = Pager()
    alerts, times = alerter(line, pager), []
    with capture_logs():
        for number in range(90):
            hold_series(line, number)
            before = len(pager.messages)
            ticks(alerts, line, 2, every_s=60.0)
            times += [line.now] * (len(pager.messages) - before)
    assert all(sum(at - HOUR < other <= at for other in times) <= MESSAGES_AN_HOUR for at in times)
    assert len(times) >= 2 * MESSAGES_AN_HOUR
    said = [row["reason"] for row in line.ledger.events() if row["code"] == "alert"]
    assert len(said) >= 60 and len(said) == len(set(said))


def test_a_long_message_is_cut_and_says_so(line):
    """A hundred series held at once: one message of twenty lines, and how many more there are."""
    pager = Pager()
    for number in range(100):
        hold_series(line, number)
    with capture_logs():
        ticks(alerter(line, pager), line)
    (title, body), = pager.messages
    assert title.endswith("100 problems") and len(body.splitlines()) == 21 and "80 more" in body


@pytest.mark.parametrize("outcome", [None, Outcome(failed=(1,)), Outcome(error="no such host")])
def test_a_notifier_that_hangs_or_fails_blocks_nothing_and_says_it_later(line, outcome):
    """The tick returns, the log tells, and when it works again the message is the one that was due."""
    pager = Pager(outcome=outcome)
    alerts = alerter(line, pager)
    uid = hold_series(line)
    with capture_logs() as logs:
        ticks(alerts, line, 10)
    assert len(pager.messages) <= 3
    assert [entry["key"] for entry in logs if entry["action"] == "alert"] == [f"series:{uid}:gap"]
    assert ("alert_failed" in {entry["action"] for entry in logs}) == (outcome is not None)
    pager.outcome = TOLD
    line.now += HOUR
    ticks(alerts, line, 3)
    assert uid in pager.messages[-1][1]
    told = len(pager.messages)
    ticks(alerts, line, 3)
    assert len(pager.messages) == told


def test_a_flapping_thing_is_not_a_message_at_every_turn(line):
    """Over and back before anybody was told that it was over: nothing more is said."""
    pager = Pager()
    alerts = alerter(line, pager)
    uid = hold_series(line)
    ticks(alerts, line)
    pager.outcome = None
    for _ in range(4):
        line.ledger.set_series(uid, "receiving", now=line.now)
        ticks(alerts, line, 1)
        line.ledger.set_series(uid, "held", now=line.now, code="gap")
        ticks(alerts, line, 1)
    assert len(pager.messages) <= 3


def test_without_addresses_the_log_is_told_once(line):
    """alerts.urls_file left out: one line for each thing that is wrong."""
    alerts = alerter(line)
    hold_series(line)
    with capture_logs() as logs:
        ticks(alerts, line, 5)
    assert [(entry["action"], entry["log_level"]) for entry in logs] == [("alert", "error")]


def test_a_ledger_that_cannot_be_written_is_said_all_the_same(line, monkeypatch):
    """A full disk is the moment when people must be told, once."""
    pager = Pager()
    alerts = alerter(line, pager)
    hold_series(line)

    def full(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(line.ledger, "transaction", full)
    for _ in range(5):
        with pytest.raises(sqlite3.OperationalError):
            ticks(alerts, line, 1)
    assert len(pager.messages) == 1 and "disk is full" in pager.messages[0][1]


def test_a_full_disk_at_the_start_does_not_keep_the_alerter_from_telling(line, monkeypatch):
    """Nothing can be written down, not even that it started; people are told all the same, and it ends without fuss."""
    pager = Pager()

    def full(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(line.ledger, "transaction", full)
    hold = alerter(line, pager)
    monkeypatch.setattr("dicomnode.alerts.find", lambda *_, **__: [troubles.Trouble("disk", "problem", "full")])
    with pytest.raises(sqlite3.OperationalError):
        ticks(hold, line, 1)
    hold.close()
    assert "disk is full" in pager.messages[0][1]


def test_a_clock_set_back_while_the_node_was_off_is_said(line):
    """As after a power loss with an empty battery."""
    pager = Pager()
    line.now = 2_000_000.0
    alerter(line, pager).close()
    line.now = 1_000_000.0
    ticks(alerter(line, pager), line)
    assert "the clock was set back" in pager.messages[0][1]


def test_a_clock_set_back_is_said_and_silences_nobody(line):
    """What was sent 'in the future' does not wait for the future to come."""
    pager = Pager()
    line.now = 2_000_000.0
    alerts = alerter(line, pager)
    hold_series(line)
    ticks(alerts, line, 3)
    line.now = 1_000_000.0
    ticks(alerts, line, 4)
    assert any("the clock was set back" in body for _, body in pager.messages[1:])
    hold_series(line, 2)
    ticks(alerts, line, 4)
    assert any("accession A2" in body for _, body in pager.messages)


def test_a_reload_goes_on_with_what_was_said(line):
    """Under the new configuration nothing is said twice, and its own rules hold."""
    pager = Pager()
    alerts = alerter(line, pager)
    hold_series(line)
    ticks(alerts, line, 3)
    alerts.reconfigure(line.config.model_copy(update={"alerts": line.config.alerts.model_copy(
        update={"repeat_h": 1.0})}))
    ticks(alerts, line, 3)
    assert len(pager.messages) == 1
    line.now += HOUR
    ticks(alerts, line, 3)
    assert len(pager.messages) == 2


def test_a_worker_that_died_is_said_after_the_next_start(line):
    """Not after an end in good order; and many starts within an hour are a problem of their own."""
    pager = Pager()
    for good in (True, False, True):
        alerts = alerter(line, pager)
        ticks(alerts, line, 3)
        if good:
            alerts.close()
    assert [body for _, body in pager.messages if "ended without being stopped" in body] == [pager.messages[-1][1]]
    for _ in range(2):
        alerts = alerter(line, pager)
        ticks(alerts, line, 3)
        alerts.close()
    assert "started 4 times within an hour" in pager.messages[-1][1] or "started 5 times" in pager.messages[-1][1]


def test_a_tick_that_fails_for_minutes_is_said_and_then_that_it_works_again(line):
    """The matcher, for instance; one failure that passes is not worth a message."""
    pager, broken = Pager(), [True]

    def match() -> None:
        if broken[0]:
            raise ValueError("Doe^Jane")

    alerts = alerter(line, pager)
    for _ in range(12):
        with pytest.raises(ValueError), alerts.watching("matcher"):
            match()
        ticks(alerts, line, 1)
    assert [body.partition(" since")[0] for _, body in pager.messages] == ["PROBLEM: matcher fails"]
    broken[0] = False
    with alerts.watching("matcher"):
        match()
    ticks(alerts, line, 3)
    assert len(pager.messages) == 2 and "RESOLVED" in pager.messages[1][1] and "Doe" not in str(pager.messages)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sets(st.integers(0, 3)), st.sampled_from([TOLD, TOLD, None, Outcome(failed=(1,))]),
                          st.sampled_from([20.0, 20.0, 700.0, 4000.0, -5000.0])), max_size=25))
def test_whatever_happens_the_last_thing_that_people_know_is_true(tmp_path_factory, history):
    """Things break and mend, the notifier fails or hangs, the clock jumps: nothing is called resolved that was not
    said before, even a clock that jumps back doubles the messages of an hour at most, and after a quiet while people
    know exactly what is wrong."""
    pager, known, begun = Pager(), set(), []
    wrong: set[int] = set()
    with Line(tmp_path_factory.mktemp("history"), toml="[alerts]\ndigest = false") as line, capture_logs(), \
            pytest.MonkeyPatch.context() as patch:
        patch.setattr("dicomnode.alerts.find", lambda *_, **__: [
            troubles.Trouble(f"t{n}", "problem", f"thing {n} is wrong") for n in sorted(wrong)])
        alerts = alerter(line, pager)
        elapsed = 0.0
        for now_wrong, outcome, jump in [*history, *[(history[-1][0] if history else set(), TOLD, 4000.0)] * 6]:
            wrong, pager.outcome = now_wrong, outcome
            line.now += jump
            elapsed += max(jump, 0.0)
            before = len(pager.messages)
            alerts.tick()
            begun += [elapsed] * (len(pager.messages) - before)
        for _, body in pager.messages:
            for text in body.splitlines():
                number = int(text.split("thing ")[1].split()[0])
                assert number in known or not text.startswith("RESOLVED")
                known.add(number)
        rows = {row["key"]: row for row in line.ledger.query("SELECT * FROM alert")}
    assert set(rows) == {f"t{n}" for n in wrong} and all(row["sent_at"] is not None for row in rows.values())
    assert all(sum(at - HOUR < other <= at for other in begun) <= 2 * MESSAGES_AN_HOUR for at in begun)


# --- what is wrong


def found(line: Line, machine: Machine | None = None) -> dict[str, troubles.Trouble]:
    every = troubles.find(line.ledger, line.config, machine or Machine(free_bytes=ROOMY), now=line.now)
    assert len({trouble.key for trouble in every}) == len(every)
    return {trouble.key: trouble for trouble in every}


def test_nothing_is_wrong_with_a_node_that_rests(line):
    """No trouble, no row, no message."""
    assert found(line) == {}


def test_what_a_person_has_held_is_no_news(line):
    """Somebody knows already."""
    hold_series(line, code="operator")
    assert found(line) == {}


def test_a_held_job_is_named_by_its_code_and_a_dead_delivery_by_its_peer(line):
    """One trouble for each, not two for the same thing."""
    job = queue_job(line)
    line.ledger.set_job(job, "held", now=line.now, code="attempts", reason="Doe^Jane")
    assert list(found(line)) == [f"job:{job}:attempts"]
    line.ledger.set_job(job, "queued", now=line.now)
    line.ledger.claim("w", now=line.now, lease_s=60)
    line.ledger.built(job, "w", now=line.now, derived_series_uid="1.9", derived_path="d", derived_instances=1,
                      report={})
    line.ledger.set_job(job, "sending", now=line.now)
    delivery = line.ledger.deliveries(job)[0]["id"]
    line.ledger.set_delivery(delivery, "waiting", now=line.now, attempts=3, next_at=line.now)
    assert found(line) == {}
    line.now += 2 * HOUR
    assert list(found(line)) == ["peer:PACS"]
    line.ledger.set_delivery(delivery, "dead", now=line.now, reason="no answer")
    assert list(found(line)) == [f"delivery:{delivery}"]
    assert "to PACS was given up" in found(line)[f"delivery:{delivery}"].text
    line.ledger.query("UPDATE delivery SET proofs = 3")
    line.ledger.query("UPDATE job SET code = 'commitment'")
    assert "to PACS was sent and is not confirmed" in found(line)[f"delivery:{delivery}"].text and len(found(line)) == 1


@pytest.mark.parametrize(("machine", "key", "level"), [
    (Machine(free_bytes=2**20), "disk", "problem"),
    (Machine(free_bytes=2**20 + 2**20 // 2 + 2**19), "disk", "warning"),
    (Machine(free_bytes=ROOMY, receiver_runs=False), "receiver", "problem"),
    (Machine(free_bytes=ROOMY, certificates={"tls.certificate": 20.0}), "certificate:tls.certificate", "warning"),
    (Machine(free_bytes=ROOMY, certificates={"tls.certificate": -1.0}), "certificate:tls.certificate", "problem"),
    (Machine(free_bytes=ROOMY, certificates={"tls.ca": None}), "certificate:tls.ca", "problem"),
])
def test_what_the_machine_says_is_judged(line, machine, key, level):
    """Disk, receiver and certificates."""
    if key == "disk" and level == "warning":
        line.config = line.config.model_copy(update={"retention": line.config.retention.model_copy(
            update={"free_mb": 10})})
    assert [(trouble.key, trouble.level) for trouble in found(line, machine).values()] == [(key, level)]


def test_a_stale_worker_and_series_that_could_not_be_fetched_are_found(line):
    """Their tables are read as others write them."""
    with line.ledger.transaction() as db:
        db.execute("INSERT INTO worker (name, device, pid, started_at, heartbeat_at, job_id) VALUES "
                   "('w1', 'cuda:0', 1, 0, ?, 4), ('w2', 'cuda:1', 2, 0, ?, NULL)", (line.now - 600, line.now))
        db.execute("INSERT INTO source_series (source, series_uid, study_uid, wanted, state, first_seen_at, "
                   "last_seen_at) VALUES ('PACS', '1.5', '1.4', 1, 'failed', 0, 0), "
                   "('PACS', '1.6', '1.4', 0, 'failed', 0, 0)")
    assert list(found(line)) == ["worker:w1", "source:PACS:failed"]
    assert "1 series of PACS" in found(line)["source:PACS:failed"].text


def test_a_source_that_cannot_be_asked_is_a_trouble_until_it_answers(tmp_path):
    """As the nightly query writes it down."""
    with Line(tmp_path, toml='[[peer]]\nname = "RIS"\nae_title = "RIS"\nhost = "127.0.0.1"\nport = 9\nquery = true\n'
              ) as line:
        set_memo(line.ledger, problem_key("RIS"), "does not answer")
        assert list(found(line)) == ["source:RIS"]
        assert "reconciliation with RIS" in digest.text(line.ledger, line.config, now=line.now, free_bytes=1,
                                                        day="1970-01-01")
        set_memo(line.ledger, problem_key("RIS"), "")
        assert found(line) == {}


# --- the digest


def test_the_digest_comes_once_a_day_at_its_time(tmp_path):
    """The day counts what came and what waits; a day missed by a stop is caught up once, not seven times."""
    pager = Pager()
    zone = ZoneInfo("Europe/Berlin")
    with Line(tmp_path, toml='[reception]\nlow_disk_mb = 1\n[schedule]\ntimezone = "Europe/Berlin"') as line:
        line.now = datetime(2026, 3, 28, 6, 0, tzinfo=zone).timestamp()
        alerts = alerter(line, pager)
        ticks(alerts, line)
        assert pager.messages == []  # the first start looks back on nothing
        hold_series(line)
        ticks(alerts, line)
        told = []
        while line.now < datetime(2026, 3, 30, 23, 0, tzinfo=zone).timestamp():  # the clocks change on the 29th
            before = len(pager.messages)
            ticks(alerts, line, 1, every_s=600.0)
            told += [datetime.fromtimestamp(line.now, zone) for _ in pager.messages[before:]
                     if "the day until" in pager.messages[-1][0]]
        assert [(at.day, at.hour) for at in told] == [(28, 7), (29, 7), (30, 7)]
        line.now += 8 * 24 * HOUR
        before = len(pager.messages)
        ticks(alerts, line, 10)
        assert sum("the day until" in title for title, _ in pager.messages[before:]) == 1
        first = next(body for title, body in pager.messages if "the day until" in title)
    assert "received: 1 instances; series: 1 PT" in first and "held for a person: 1" in first
    assert "GiB free" in first


@given(st.integers(0, 400), st.integers(0, 86399), st.sampled_from(["00:00", "07:00", "23:59"]),
       st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Pacific/Apia"]))
def test_a_digest_is_due_once_between_two_times_of_day(day, second, at, zone):
    """Whatever the moment: due once, then no more until `at` of the next day has come."""
    now = 1_767_225_600.0 + 86400 * day + second
    due = digest.due("", now=now, at=at, zone=ZoneInfo(zone))
    assert due is not None and digest.due(due, now=now, at=at, zone=ZoneInfo(zone)) is None
    tomorrow = digest.due(due, now=now + 26 * HOUR, at=at, zone=ZoneInfo(zone))
    assert tomorrow is not None and tomorrow > due


# --- handing over


class _Keeps(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.got.append(body)  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Keeps)
    server.got = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"json://127.0.0.1:{server.server_port}/hook", server.got  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def mail_server() -> Iterator[tuple[int, list[str]]]:
    """One mail by SMTP (RFC 5321), the least of it."""
    listener, got = socket.create_server(("127.0.0.1", 0)), []

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rw", encoding="utf-8", newline="\r\n") as talk:
            def say(text: str) -> None:
                talk.write(text + "\n")
                talk.flush()

            say("220 ready")
            while line := talk.readline():
                if line.upper().startswith("DATA"):
                    say("354 go on")
                    lines = []
                    while (text := talk.readline()).rstrip("\r\n") != ".":
                        lines.append(text)
                    got.append("".join(lines))
                    say("250 kept")
                elif line.upper().startswith("QUIT"):
                    say("221 bye")
                    return
                else:
                    say("250 fine")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1], got
    finally:
        listener.close()


def urls_file(folder: Path, *urls: str, mode: int = 0o600) -> Path:
    path = folder / "alerts"
    path.write_text("# who is told\n\n" + "\n".join(urls) + "\n")
    path.chmod(mode)
    return path


def test_a_webhook_and_a_mail_box_get_the_message_and_a_dead_address_is_named_by_its_line(tmp_path):
    """Through apprise, in a process of its own; the address itself, which holds secrets, is not in the answer."""
    with webhook() as (url, got), mail_server() as (port, mails), closing(socket.create_server(("127.0.0.1", 0))) as s:
        dead = s.getsockname()[1]
        s.close()
        path = urls_file(tmp_path, url, f"json://user:secret@127.0.0.1:{dead}",
                         f"mailto://127.0.0.1:{port}?from=node@example.org&to=mia@example.org&mode=insecure")
        outcome = Sender(path).wait("dicomnode NBDNODE: 1 problem", "PROBLEM: disk")
    assert (outcome.sent, outcome.failed, outcome.ok) == ((3, 5), (4,), True)
    assert "line 4" in outcome.text and "secret" not in outcome.text
    assert [(message["title"], message["message"]) for message in got] == [
        ("dicomnode NBDNODE: 1 problem", "PROBLEM: disk")]
    mail = message_from_string(mails[0])
    assert mail["Subject"] == "dicomnode NBDNODE: 1 problem" and "PROBLEM: disk" in mails[0]


def test_a_service_that_never_answers_is_given_up(tmp_path):
    """Its process is killed; nobody waits longer than the time allowed."""
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        sender = Sender(urls_file(tmp_path, f"json://127.0.0.1:{silent.getsockname()[1]}"), timeout_s=1.0)
        outcome = sender.wait("title", "text")
    assert not outcome.ok and "within 1 s" in outcome.text


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_file_of_addresses_that_others_may_read_is_not_used(tmp_path, mode):
    """It holds passwords; the remedy is in the message."""
    path = urls_file(tmp_path, "json://127.0.0.1", mode=mode)
    with pytest.raises(ConfigError, match="chmod"):
        read_urls(path)
    assert "chmod" in Sender(path).wait("title", "text").error


def test_an_empty_file_of_addresses_is_an_error(tmp_path):
    """Nobody would be told, and nobody would know."""
    with pytest.raises(ConfigError, match="no URL"):
        read_urls(urls_file(tmp_path, "# json://127.0.0.1"))


def test_the_whole_way_from_the_ledger_to_a_webhook(tmp_path):
    """urls_file in the configuration, a held series, a real process that hands it over."""
    with webhook() as (url, got):
        toml = f'[reception]\nlow_disk_mb = 1\n[alerts]\ndigest = false\nurls_file = "{urls_file(tmp_path, url)}"'
        with Line(tmp_path, toml=toml) as line:
            alerts = alerter(line)
            hold_series(line)
            alerts.tick()
            wait_until("the message", lambda: got)
            wait_until("the row to be marked", lambda: alerts.tick() or line.ledger.query(
                "SELECT 1 FROM alert WHERE sent_at IS NOT NULL"))
            alerts.close()
            assert memo(line.ledger, "node.running") == ""
    assert len(got) == 1 and "accession A1" in got[0]["message"]


class WorkCommand(ReceiverProcess):
    """`dicomnode work`, as systemd starts it."""

    command = ("-m", "dicomnode", "work", "--config")


def test_a_worker_that_was_killed_tells_so_when_it_runs_again(tmp_path):
    """The real process, kill -9, and a real message; a held series is in it too."""
    with webhook() as (url, got):
        toml = f'low_disk_mb = 1\n[alerts]\ndigest = false\nurls_file = "{urls_file(tmp_path, url)}"'
        worker = WorkCommand(tmp_path, reception=toml)
        worker.start()
        worker.kill()
        with worker.ledger() as ledger:
            ledger.add_instances([InstanceRow(
                sop_instance_uid="1.2.3.9", sop_class_uid="1.2", study_uid="1.2", series_uid="1.2.3",
                transfer_syntax_uid="1.2.840.10008.1.2.1", path="x", bytes=1, sha256="0", calling_ae="SCANNER",
                address="127.0.0.1", received_at=10.0, modality="PT", accession_number="A7")])
            ledger.set_series("1.2.3", "held", now=10.0, code="gap")
        with worker:
            wait_until("the message", lambda: got, timeout_s=60)
    assert "ended without being stopped" in got[0]["message"] and "accession A7" in got[0]["message"]


# --- the command


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["alert", *map(str, arguments)])


def test_the_command_lists_what_is_wrong_and_changes_nothing(line):
    """`dicomnode alert`: the same words as the messages."""
    path = line.folder / "node.toml"
    path.write_text(f'[node]\ndata_dir = "{line.folder / "data"}"\n[reception]\nlow_disk_mb = 1\n')
    assert "Nothing is wrong" in run("--config", path).stdout
    uid = hold_series(line)
    rows = json.loads(run("--config", path, "--json").stdout)
    assert [row["key"] for row in rows] == [f"series:{uid}:gap"] and rows[0]["text"] in run("--config", path).stdout
    assert line.ledger.query("SELECT * FROM alert") == []


def test_the_command_tests_the_addresses(tmp_path):
    """Exit code 0 where all were reached, 1 where one was not, 2 where there is no file of addresses."""
    path = tmp_path / "node.toml"
    path.write_text("")
    assert run("--test", "--config", path).exit_code == 2
    with webhook() as (url, got):
        path.write_text(f'[alerts]\nurls_file = "{urls_file(tmp_path, url)}"')
        good = run("--test", "--config", path)
        urls_file(tmp_path, url, "json://127.0.0.1:9")
        bad = run("--test", "--config", path, "--json")
    assert (good.exit_code, bad.exit_code) == (0, 1) and "1 of 1" in good.stdout
    assert json.loads(bad.stdout)["failed"] == [4] and [message["title"] for message in got] == [
        "dicomnode NBDNODE: test"] * 2
