"""Keeping objects: one transaction for many, each outcome to its own sender, no acknowledgement after a failure."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from dicomnode.errors import NodeError
from dicomnode.groupcommit import GroupCommitter
from dicomnode.intake import Request, file_meta
from dicomnode.ledger import InstanceRow, Kept, Ledger
from dicomnode.services.commitscp import verify
from dicomnode.spool import Spool
from tests.node.test_states import instance


class Node:
    """A spool, its ledger and the committer on both."""

    def __init__(self, folder: Path) -> None:
        self.spool = Spool(folder)
        self.ledger = Ledger(self.spool.ledger_path)
        self.committer = GroupCommitter(self.spool, self.ledger)

    def keep(self, number: int, content: bytes = b"first", *, meta: bytes = b"") -> Kept:
        """An object of series 1.2.1 whose bytes are `content`, behind file meta information."""
        handle, written = self.spool.create_incoming()
        os.write(handle, meta + content)
        os.close(handle)
        row = replace(instance("1.2.1", f"1.2.1.{number}", content.decode(), now=number), path="",
                      bytes=len(meta + content))
        try:
            return self.committer.keep(written, row, timeout_s=20)
        finally:
            written.unlink(missing_ok=True)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    opened = Node(tmp_path / "data")
    yield opened
    opened.committer.close()
    opened.ledger.close()


def test_objects_that_come_while_a_commit_is_under_way_share_the_next(node: Node, monkeypatch: pytest.MonkeyPatch):
    """Twenty senders, few transactions, twenty rows whose files are in their place."""
    sizes: list[int] = []
    first_is_in, go_on = threading.Event(), threading.Event()
    add = node.ledger.add_instances

    def slow(rows: list[InstanceRow]) -> list[Kept]:
        sizes.append(len(rows))
        first_is_in.set()
        assert go_on.wait(10)
        return add(rows)

    monkeypatch.setattr(node.ledger, "add_instances", slow)
    with ThreadPoolExecutor(20) as pool:
        outcomes = [pool.submit(node.keep, 1)]
        assert first_is_in.wait(10)
        outcomes += [pool.submit(node.keep, number) for number in range(2, 21)]
        while node.committer._queue.qsize() < 19:
            assert not go_on.wait(0.01)
        go_on.set()
        assert [outcome.result() for outcome in outcomes] == ["new"] * 20
    assert sizes == [1, 19]
    for row in node.ledger.instances("1.2.1"):
        assert node.spool.absolute(row["path"]).read_bytes() == b"first"


@pytest.mark.parametrize("error", [sqlite3.OperationalError("disk is full"), OSError("gone"), MemoryError()])
def test_failed_commit_is_told_to_all_and_the_next_one_works(
        node: Node, monkeypatch: pytest.MonkeyPatch, error: Exception):
    """Nothing is acknowledged, the thread lives, a resend with other bytes takes the place of the orphan."""
    def fail(rows: list[InstanceRow]) -> list[Kept]:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(node.ledger, "add_instances", fail)
        with pytest.raises(type(error)):
            node.keep(1, b"orphan")
    assert node.ledger.known("1.2.1.1") is None
    assert node.keep(1, b"second") == "new"
    assert node.spool.object_path("1", "1.2.1", "1.2.1.1").read_bytes() == b"second"


def test_entry_by_another_process_is_never_acknowledged_as_ours(node: Node, monkeypatch: pytest.MonkeyPatch):
    """The ledger has the last word: a failure, not a success."""
    monkeypatch.setattr(node.ledger, "add_instances", lambda rows: ["conflict" for _ in rows])
    with pytest.raises(NodeError, match="let one receiver alone"):
        node.keep(1)


def test_same_uid_waits_its_turn(node: Node):
    """Thirty senders of three versions of one instance: the first stays, its repeats succeed, the others conflict."""
    contents = [f"version {number % 3}".encode() for number in range(30)]
    with ThreadPoolExecutor(30) as pool:
        outcomes = list(pool.map(lambda content: node.keep(1, content), contents))
    first = node.spool.object_path("1", "1.2.1", "1.2.1.1").read_bytes()
    for content, outcome in zip(contents, outcomes, strict=True):
        assert outcome == "conflict" if content != first else outcome in ("new", "repeat")
    assert outcomes.count("new") == 1
    kept_aside = {node.spool.absolute(row["path"]).read_bytes() for row in node.ledger.conflicts("1.2.1")}
    assert kept_aside == set(contents) - {first}


def test_closing_commits_what_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """SIGTERM loses nothing that is on its way: a commit under way and the objects behind it."""
    node = Node(tmp_path / "data")
    go_on, add, taken = threading.Event(), node.ledger.add_instances, []

    def slow(rows: list[InstanceRow]) -> list[Kept]:
        taken.extend(rows)
        assert go_on.wait(10)
        return add(rows)

    monkeypatch.setattr(node.ledger, "add_instances", slow)
    with ThreadPoolExecutor(8) as pool:
        outcomes = [pool.submit(node.keep, number) for number in range(8)]
        while len(taken) + node.committer._queue.qsize() < 8:
            assert not go_on.wait(0.01)
        threading.Timer(0.2, go_on.set).start()
        node.committer.close()
        assert [outcome.result(10) for outcome in outcomes] == ["new"] * 8
    assert len(node.ledger.instances("1.2.1")) == 8
    node.ledger.close()


def meta_from(calling_ae: str) -> bytes:
    return file_meta(Request("1.2", "1.2.1.1", "1.2.840.10008.1.2", calling_ae))


def whole_by_the_ledger(node: Node) -> bool:
    """As storage commitment and repair judge it."""
    verdict = verify(node.ledger, node.spool, [("1.2", "1.2.1.1")], calling_ae="SCANNER")
    return not verdict.failed


def test_an_object_restored_by_another_sender_is_whole_for_the_ledger(node: Node) -> None:
    """The PACS, whose AE title is longer than the scanner's, sends again what was lost: it can be committed to."""
    node.keep(1, meta=meta_from("CT"))
    path = node.spool.object_path("1", "1.2.1", "1.2.1.1")
    path.unlink()
    assert node.keep(1, meta=meta_from("LONGERARCHIVE")) == "repeat"
    assert path.read_bytes() == meta_from("LONGERARCHIVE") + b"first"
    assert node.ledger.known("1.2.1.1")["bytes"] == path.stat().st_size
    assert whole_by_the_ledger(node)


def test_an_object_whose_bytes_rotted_is_healed_by_a_resend(node: Node) -> None:
    """Its length did not change: the digest tells, and 0x0000 for the resend means that it is safe again."""
    node.keep(1, meta=meta_from("CT"))
    path = node.spool.object_path("1", "1.2.1", "1.2.1.1")
    path.write_bytes(meta_from("CT") + b"fi\0st")
    assert not whole_by_the_ledger(node)
    assert node.keep(1, meta=meta_from("CT")) == "repeat"
    assert path.read_bytes() == meta_from("CT") + b"first" and whole_by_the_ledger(node)
