"""Who is let in, and how refusals are recorded without filling the ledger; what people and machines read in the log."""

from __future__ import annotations

import io
import json
import logging
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from pydicom.filereader import read_dataset
from pynetdicom.dimse_messages import C_STORE_RSP
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.dsutils import encode

from dicomnode.command import store_response
from dicomnode.config import Config, Node, parse
from dicomnode.gate import Gate, SecurityLog
from dicomnode.ledger import Ledger
from dicomnode.logs import configure, get_logger


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def config(peer: str, *, most: int = 60) -> Config:
    return parse(f'[reception]\nmax_associations = {most}\n[[peer]]\nname = "p"\nae_title = "SCANNER"\n{peer}\n')


def refusal(peer: str, address: str, *, calling: str = "SCANNER") -> str | None:
    found = Gate(config(peer), clock=Clock()).enter(1, calling_ae=calling, called_ae="NBDNODE", address=address)
    return None if found is None else found.code


@pytest.mark.parametrize(("peer", "address", "expected"), [
    ('host = "127.0.0.1"', "127.0.0.1", None),
    ('host = "127.0.0.1"', "127.0.0.2", "address"),
    ('host = "localhost"', "127.0.0.1", None),
    ('host = "127.0.0.1"', "::ffff:127.0.0.1", None),
    ('host = "::1"', "::1", None),
    ('host = "x"\naddresses = ["10.1.0.0/16"]', "10.1.200.3", None),
    ('host = "x"\naddresses = ["10.1.0.0/16"]', "10.2.0.1", "address"),
    ('host = "x"\naddresses = ["10.1.0.7"]', "10.1.0.7", None),
    ('host = "x"\naddresses = ["2001:db8::/32"]', "2001:db8::5", None),
    ('host = "x"\naddresses = ["2001:db8::/32"]', "10.1.0.7", "address"),
    ('host = "x"\naddresses = ["fe80::/10"]', "fe80::1%eth0", None),
    ('host = "127.0.0.1"\nmay_send = false', "127.0.0.1", "calling_ae"),
])
def test_title_and_address_must_both_be_the_peers(peer: str, address: str, expected: str | None):
    """Addresses and networks of both families; the host where none are listed."""
    assert refusal(peer, address) == expected


@pytest.mark.parametrize("calling", ["scanner", "SCANNER2", "", "SCAN*"])
def test_calling_ae_is_compared_exactly(calling: str):
    """Case counts; padding with spaces does not."""
    assert refusal('host = "127.0.0.1"', "127.0.0.1", calling=calling) == "calling_ae"
    assert refusal('host = "127.0.0.1"', "127.0.0.1", calling=" SCANNER  ") is None


def test_host_that_cannot_be_resolved_lets_nobody_in(monkeypatch: pytest.MonkeyPatch):
    """Closed, not open, when the name service fails; asked again after a minute."""
    clock, answers = Clock(), [OSError("no such name"), [(2, 1, 6, "", ("192.0.2.9", 0))]]

    def lookup(*_: object, **__: object):
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr("socket.getaddrinfo", lookup)
    gate = Gate(config('host = "scanner.example"'), clock=clock)

    def code() -> str | None:
        found = gate.enter(1, calling_ae="SCANNER", called_ae="NBDNODE", address="192.0.2.9")
        return None if found is None else found.code

    assert (code(), code()) == ("address", "address")
    clock.now += 61
    assert code() is None


def test_a_name_service_that_is_away_keeps_no_known_peer_out(monkeypatch: pytest.MonkeyPatch):
    """The last good answer lets a peer in at once, also while a look-up hangs, and for no longer than a day."""
    clock, release = Clock(), threading.Event()
    gate_answers = [[(2, 1, 6, "", ("192.0.2.9", 0))]]

    def lookup(*_: object, **__: object):
        if gate_answers:
            return gate_answers.pop()
        release.wait(10)
        raise OSError("the name service is away")

    monkeypatch.setattr("socket.getaddrinfo", lookup)
    gate = Gate(config('host = "scanner.example"'), clock=clock, lookup_s=5)
    enter = {"calling_ae": "SCANNER", "called_ae": "NBDNODE", "address": "192.0.2.9"}
    assert gate.enter(1, **enter) is None
    clock.now += 3600
    began = time.monotonic()
    assert gate.enter(2, **enter) is None
    assert time.monotonic() - began < 1.0
    release.set()
    clock.now += 3600
    assert gate.enter(3, **enter) is None
    clock.now += 90000
    found = gate.enter(4, **enter)
    assert found is not None and found.code == "address"


def test_one_peer_cannot_take_every_place():
    """reception.max_associations_per_peer counts by calling AE title."""
    text = "".join(f'[[peer]]\nname = "{name}"\nae_title = "{name}"\nhost = "127.0.0.1"\n' for name in ("A", "B"))
    gate = Gate(parse("[reception]\nmax_associations = 3\nmax_associations_per_peer = 2\n" + text), clock=Clock())

    def enter(ticket: int, calling: str) -> str | None:
        found = gate.enter(ticket, calling_ae=calling, called_ae="NBDNODE", address="127.0.0.1")
        return None if found is None else found.code

    assert [enter(1, "A"), enter(2, "A"), enter(3, "A"), enter(4, "B")] == [None, None, "limit", None]
    gate.leave(1)
    assert enter(5, "A") is None


def test_a_clock_that_is_set_back_neither_keeps_an_old_address_nor_silences_the_record(tmp_path: Path,
                                                                                      monkeypatch: pytest.MonkeyPatch):
    """The name is looked up again, and the next refusal is written, without waiting for the old time to come again."""
    clock = Clock()
    addresses = ["192.0.2.9", "192.0.2.10"]
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: [(2, 1, 6, "", (addresses[0], 0))])
    gate = Gate(config('host = "scanner.example"'), clock=clock)
    enter = {"calling_ae": "SCANNER", "called_ae": "NBDNODE"}
    assert gate.enter(1, address="192.0.2.9", **enter) is None
    with Ledger(tmp_path / "ledger.sqlite3") as ledger:
        security = SecurityLog(ledger, clock=clock)
        security.record("security", "address", "refused", calling_ae="X", address="192.0.2.1")
        clock.now -= 86400
        addresses.pop(0)
        assert gate.enter(2, address="192.0.2.10", **enter) is None
        security.record("security", "address", "refused", calling_ae="X", address="192.0.2.1")
        security.close()
        assert len(ledger.events()) == 2


def test_places_are_counted_and_given_back():
    """Leaving twice frees one place only."""
    gate = Gate(config('host = "127.0.0.1"', most=2), clock=Clock())

    def enter(ticket: int) -> str | None:
        found = gate.enter(ticket, calling_ae="SCANNER", called_ae="NBDNODE", address="127.0.0.1")
        return None if found is None else found.code

    assert [enter(1), enter(2), enter(3)] == [None, None, "limit"]
    gate.leave(1)
    gate.leave(1)
    assert [enter(4), enter(5)] == [None, "limit"]


# --- records


def test_the_same_refusal_is_recorded_once_a_minute_and_counted(tmp_path: Path):
    """The next event says how many were left out."""
    clock = Clock()
    with Ledger(tmp_path / "l") as ledger:
        security = SecurityLog(ledger, clock=clock)
        for _ in range(500):
            security.record("security", "calling_ae", "unknown", calling_ae="X", address="192.0.2.1")
            clock.now += 0.1
        security.flush()
        assert len(ledger.events()) == 1
        clock.now += 60
        security.record("security", "calling_ae", "unknown", calling_ae="X", address="192.0.2.1")
        security.close()
        first, second = ledger.events()
    assert (first["kind"], first["code"], first["actor"]) == ("security", "calling_ae", "X")
    assert "499 more" in second["reason"]


def test_a_scan_of_many_titles_cannot_fill_the_ledger(tmp_path: Path):
    """10,000 different strangers in an hour: some hundred told apart, the rest under one name."""
    clock = Clock()
    with Ledger(tmp_path / "l") as ledger:
        security = SecurityLog(ledger, clock=clock, distinct=50)
        for number in range(10_000):
            address = f"192.0.2.{number % 250}"
            security.record("security", "calling_ae", "unknown", calling_ae=f"X{number}", address=address)
            clock.now += 0.001
        security.close()
        assert len(ledger.events()) <= 52
        assert any(event["code"] == "various" for event in ledger.events())


def test_a_locked_ledger_keeps_nobody_waiting_and_loses_no_event(tmp_path: Path):
    """Another process holds the write lock: recording returns at once, the event is there when the lock is gone."""
    with Ledger(tmp_path / "l") as ledger, closing(sqlite3.connect(tmp_path / "l", isolation_level=None)) as other:
        security = SecurityLog(ledger, clock=Clock())
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        for number in range(20):
            security.record("security", "address", "refused", calling_ae=f"X{number}", address="192.0.2.1")
        assert time.monotonic() - began < 1.0
        assert ledger.events() == []
        other.execute("ROLLBACK")
        security.flush()
        assert len(ledger.events()) == 20
        security.close()


def test_a_ledger_that_takes_nothing_any_more_disturbs_nobody(tmp_path: Path):
    """A lost ledger: logged, not raised, and the end is not waited for."""
    with Ledger(tmp_path / "l") as ledger:
        security = SecurityLog(ledger, clock=Clock())
        with closing(sqlite3.connect(tmp_path / "l")) as other:
            other.execute("DROP TABLE event")
        security.record("reception", "DiskFull", "full", calling_ae="X", address="192.0.2.1")
        security.close()


def test_what_strangers_send_cannot_forge_a_log_line(tmp_path: Path):
    """Control characters are replaced before anybody reads them."""
    with Ledger(tmp_path / "l") as ledger:
        gate = Gate(config('host = "127.0.0.1"'), clock=Clock())
        found = gate.enter(1, calling_ae="A\n\x1b[2JB", called_ae="NBDNODE", address="127.0.0.1")
        assert found is not None
        security = SecurityLog(ledger, clock=Clock())
        security.record("security", found.code, found.why, calling_ae="A\nB", address="127.0.0.1")
        security.close()
        (event,) = ledger.events()
    assert event["reason"].isprintable()
    assert event["actor"] == "A?B"


# --- log


def test_log_lines_are_sentences_or_json_objects_with_an_action():
    """log_json switches; the level filters; other libraries are heard from warnings on, pynetdicom not at all."""
    text, lines = io.StringIO(), io.StringIO()
    try:
        configure(Node(), stream=text)
        get_logger("test").info("A series came.", action="series_came", series_uid="1.2")
        get_logger("test").debug("Not shown.", action="hidden")
        configure(Node(log_json=True, log_level="warning"), stream=lines)
        get_logger("test").info("Not shown.", action="hidden")
        get_logger("test").warning("A disk is full.", action="disk_full", free=3)
        logging.getLogger("other").warning("from elsewhere")
        logging.getLogger("pynetdicom.dul").error("traceback of a port probe")
    finally:
        configure(Node())
    assert "A series came." in text.getvalue() and "action=series_came" in text.getvalue()
    assert "Not shown" not in text.getvalue()
    first, second = map(json.loads, lines.getvalue().splitlines())
    assert (first["event"], first["action"], first["free"]) == ("A disk is full.", "disk_full", 3)
    assert first["level"] == "warning"
    assert second["event"] == "from elsewhere"


# --- response


@pytest.mark.parametrize("comment", ["", "odd", "even", "x" * 64])
@pytest.mark.parametrize("instance", ["1.2.3", "1.2.34"])
def test_store_response_is_what_pynetdicom_encodes(comment: str, instance: str):
    """Byte for byte, odd and even lengths; and a reader finds every element."""
    primitive = C_STORE()
    primitive.MessageID = primitive.MessageIDBeingRespondedTo = 7
    primitive.AffectedSOPClassUID, primitive.AffectedSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", instance
    primitive.Status = 0xB000
    primitive.ErrorComment = comment or None
    message = C_STORE_RSP()
    message.primitive_to_message(primitive)
    ours = store_response(sop_class_uid="1.2.840.10008.5.1.4.1.1.2", sop_instance_uid=instance, message_id=7,
                          status=0xB000, comment=comment)
    assert ours == encode(message.command_set, True, True)
    read = read_dataset(io.BytesIO(ours), True, True)
    assert (read.Status, read.get("ErrorComment", ""), read.AffectedSOPInstanceUID) == (0xB000, comment, instance)


def test_error_comment_is_cut_to_what_the_standard_allows():
    """VR LO: 64 characters."""
    ours = store_response(sop_class_uid="1.2", sop_instance_uid="1.3", message_id=1, status=0xC000, comment="ü" * 100)
    assert read_dataset(io.BytesIO(ours), True, True).ErrorComment == "?" * 64
