"""Objects on disk: nothing half-written is ever in place, folders and moves are durable, names cannot escape."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode import spool as spool_module
from dicomnode.errors import CannotUnderstand, DiskFull
from dicomnode.spool import Spool, valid_uid


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "data")


def written(spool: Spool, content: bytes = b"object") -> Path:
    handle, path = spool.create_incoming()
    os.write(handle, content)
    os.close(handle)
    return path


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=6))
def test_every_uid_of_the_standard_is_valid(components: list[int]):
    """Digits and dots, no leading zeros, at most 64 characters."""
    uid = ".".join(map(str, components))
    assert valid_uid(uid) == (len(uid) <= 64)


@given(st.text(max_size=70))
def test_valid_uid_is_a_harmless_file_name(text: str):
    """Whatever is let through has only digits and dots and names no parent."""
    if valid_uid(text):
        assert set(text) <= set("0123456789.")
        assert ".." not in text and not text.startswith(".") and not text.endswith(".")
        assert text.isascii()


@pytest.mark.parametrize("uid", ["", ".", "..", "1.", ".1", "1..2", "01.2", "1.02", "1/2", "1.2\n", "1.2 ", "1١",
                                 "1" * 65])
def test_what_is_no_uid_is_refused(spool: Spool, uid: str):
    """At each of the three places of a path."""
    assert not valid_uid(uid)
    for uids in ((uid, "1.2", "1.2"), ("1.2", uid, "1.2"), ("1.2", "1.2", uid)):
        with pytest.raises(CannotUnderstand, match="is not a UID"):
            spool.object_path(*uids)


def test_folders_are_for_the_node_alone(spool: Spool):
    """Patient data, and the ledger, which knows who was examined: mode 0700."""
    fresh = Spool(spool.data_dir / "another")
    assert fresh.data_dir.stat().st_mode & 0o777 == 0o700
    for name in Spool.FOLDERS:
        assert (spool.data_dir / name).stat().st_mode & 0o777 == 0o700
    path = spool.object_path("1.2", "1.3", "1.4")
    spool.publish(written(spool), path)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o077 == 0


def test_publish_moves_and_makes_every_folder_durable(spool: Spool, monkeypatch: pytest.MonkeyPatch):
    """The new folders' parents and the target's folder are fsynced, in this order around the move."""
    synced: list[Path] = []
    monkeypatch.setattr(spool_module, "fsync_dir", synced.append)
    path = spool.object_path("1.2", "1.3", "1.4")
    part = written(spool)
    spool.publish(part, path)
    assert path.read_bytes() == b"object"
    assert not part.exists()
    objects = spool.data_dir / "objects"
    assert set(synced[:-1]) == {spool.data_dir, objects, objects / "1.2"}
    assert synced[-1] == path.parent
    synced.clear()
    spool.publish(written(spool), spool.object_path("1.2", "1.3", "1.5"))
    assert synced == [path.parent], "known folders need no second fsync"


def test_folder_that_another_process_made_is_made_durable_too(spool: Spool, monkeypatch: pytest.MonkeyPatch):
    """It may have been killed between mkdir and fsync."""
    path = spool.object_path("1.2", "1.3", "1.4")
    path.parent.mkdir(parents=True)
    synced: list[Path] = []
    monkeypatch.setattr(spool_module, "fsync_dir", synced.append)
    spool.publish(written(spool), path)
    assert {spool.data_dir / "objects", spool.data_dir / "objects" / "1.2"} <= set(synced)


def test_removed_folder_is_made_again(spool: Spool):
    """Housekeeping takes empty folders away."""
    path = spool.object_path("1.2", "1.3", "1.4")
    spool.publish(written(spool), path)
    path.unlink()
    path.parent.rmdir()
    spool.publish(written(spool, b"again"), path)
    assert path.read_bytes() == b"again"


def test_memory_of_known_folders_is_bounded(spool: Spool, monkeypatch: pytest.MonkeyPatch):
    """A receiver runs for years."""
    monkeypatch.setattr(spool_module, "_FOLDERS_REMEMBERED", 3)
    for number in range(10):
        spool.publish(written(spool), spool.object_path("1.2", f"1.{number}", "1.4"))
    assert len(spool._known_folders) <= 3


def test_sweep_removes_what_was_half_written_and_nothing_else(spool: Spool):
    """incoming/ alone."""
    path = spool.object_path("1.2", "1.3", "1.4")
    spool.publish(written(spool), path)
    written(spool)
    written(spool)
    assert spool.sweep_incoming() == 2
    assert list(spool.incoming.iterdir()) == []
    assert path.exists()


def test_watermark_refuses_with_a_remedy(spool: Spool):
    """Status 0xA700."""
    spool.require_free(1)
    with pytest.raises(DiskFull, match=r"Remedy: .*low_disk_mb") as caught:
        spool.require_free(2**60)
    assert caught.value.status == 0xA700


def test_relative_paths_come_back(spool: Spool):
    """The ledger keeps them relative: the data directory may move."""
    path = spool.object_path("1.2", "1.3", "1.4")
    assert spool.relative(path) == "objects/1.2/1.3/1.4.dcm"
    assert spool.absolute(spool.relative(path)) == path
    assert spool.relative(spool.conflict_path("1.4", "ab" * 32)) == f"conflicts/1.4.{'ab' * 8}.dcm"
