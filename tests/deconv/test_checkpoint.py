"""Checkpoints: whole or not at all, only for what they belong to, never a reason for a run to end."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deconv.checkpoint import HEADER_BYTES, Checkpoints

Y = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
STATE: dict[str, Any] = {
    "step": 7, "rate": 1e-3, "stage": "main", "done": True, "nothing": None, "list": [1, (2.5, "x")],
    "gx": {"weight": torch.arange(6.0).reshape(2, 3), "bf16": torch.ones(2, dtype=torch.bfloat16)},
    "losses": {"main": np.array([3.0, 2.0], dtype=np.float32)}, "number": np.float64(0.5),
}


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


SOURCE = (Y, None), {"seed": 0}


def test_a_state_comes_back_as_it_was(tmp_path: Path):
    """Tensors of every kind, arrays, numbers, text, nesting."""
    assert Checkpoints(tmp_path, every_s=0).of("run", *SOURCE).offer(lambda: STATE)
    found = Checkpoints(tmp_path).of("run", *SOURCE).load()
    assert found is not None
    assert {key: found[key] for key in ("step", "rate", "stage", "done", "nothing", "list", "number")} == {
        "step": 7, "rate": 1e-3, "stage": "main", "done": True, "nothing": None, "list": [1, (2.5, "x")], "number": 0.5}
    assert torch.equal(found["gx"]["weight"], STATE["gx"]["weight"]) and found["gx"]["bf16"].dtype == torch.bfloat16
    np.testing.assert_array_equal(found["losses"]["main"], STATE["losses"]["main"])
    assert isinstance(found["losses"]["main"], np.ndarray)


def test_the_order_of_memory_comes_back_too(tmp_path: Path):
    """channels_last_3d stays what it is: another order of memory would change the last bits of a convolution."""
    weight = torch.rand(2, 3, 3, 3, 3).to(memory_format=torch.channels_last_3d)
    run = Checkpoints(tmp_path, every_s=0).of("run", *SOURCE)
    run.offer(lambda: {"weight": weight})
    found = run.load()
    assert found is not None and found["weight"].stride() == weight.stride()


def test_what_could_run_code_is_not_written(tmp_path: Path):
    """An object of some class: refused when written, not found out when read."""
    with pytest.raises(TypeError, match="plain values"):
        Checkpoints(tmp_path, every_s=0).of("run", *SOURCE).offer(lambda: {"path": tmp_path})


def test_it_is_written_when_the_time_has_come(tmp_path: Path):
    """Not before every_s have passed since the start or the last write; the state is not even made before."""
    clock, made = Clock(), []

    def state() -> dict[str, int]:
        made.append(clock.now)
        return {"step": len(made)}

    run = Checkpoints(tmp_path, every_s=10, clock=clock).of("run", *SOURCE)
    for clock.now in (0, 9, 10, 15, 19, 20, 21):
        run.offer(state)
    assert made == [10, 20]
    assert run.load() == {"step": 2}


def test_a_state_that_is_not_fit_to_be_kept_is_passed_over(tmp_path: Path):
    """None from the caller: what was kept before stays."""
    run = Checkpoints(tmp_path, every_s=0).of("run", *SOURCE)
    assert run.offer(lambda: {"step": 1}) and not run.offer(lambda: None)
    assert run.load() == {"step": 1}


@pytest.mark.parametrize("other", [
    {"arrays": (Y + 1, None)}, {"arrays": (Y, Y)}, {"arrays": (Y.reshape(2, 4, 3), None)}, {"settings": {"seed": 1}},
    {"version": "2"}, {"device": "cuda:1"},
])
def test_a_state_of_something_else_is_not_taken(
    tmp_path: Path, other: dict[str, Any], caplog: pytest.LogCaptureFixture
):
    """Another image, guide, setting, version or device; and the reason is told."""
    Checkpoints(tmp_path, every_s=0).of("run", *SOURCE).offer(lambda: STATE)
    asked = {"arrays": SOURCE[0], "settings": SOURCE[1], "version": "", **other}
    run = Checkpoints(tmp_path, version=asked.pop("version")).of("run", **asked)
    assert run.load() is None
    assert "belongs to another" in run.ignored[0] and "belongs to another" in caplog.text


@pytest.mark.parametrize("place", [0, 5, HEADER_BYTES + 3, -1])
def test_a_damaged_file_is_not_taken(tmp_path: Path, place: int):
    """One byte anywhere, or the end missing: ignored, and the one before is taken if it was kept."""
    run = Checkpoints(tmp_path, every_s=0, keep=2).of("run", *SOURCE)
    run.offer(lambda: {"step": 1})
    run.offer(lambda: {"step": 2})
    newest = sorted(tmp_path.iterdir())[-1]
    whole = newest.read_bytes()
    broken = bytearray(whole)
    broken[place] ^= 0xFF
    for content in (bytes(broken), whole[:-100], whole[:100], b""):
        newest.write_bytes(content)
        again = Checkpoints(tmp_path).of("run", *SOURCE)
        assert again.load() == {"step": 1}
        assert "damaged" in again.ignored[0]


def test_only_the_newest_are_kept_and_runs_do_not_meet(tmp_path: Path):
    """keep files a run; another run of the folder has its own; remove takes away one run's alone."""
    checkpoints = Checkpoints(tmp_path, every_s=0, keep=2)
    one, two = checkpoints.of("member-1", *SOURCE), checkpoints.of("member-10", *SOURCE)
    for step in range(5):
        one.offer(partial(dict, step=step))
        two.offer(partial(dict, step=10 * step))
    assert len(list(tmp_path.iterdir())) == 4
    assert one.load() == {"step": 4} and two.load() == {"step": 40}
    one.remove()
    assert one.load() is None and two.load() == {"step": 40}


def test_a_folder_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A file stands where the folder should be: logged, tried again later, no exception."""
    blocked = tmp_path / "folder"
    blocked.write_text("")
    clock = Clock()
    run = Checkpoints(blocked, every_s=10, clock=clock).of("run", *SOURCE)
    clock.now = 11.0
    assert not run.offer(lambda: STATE) and "no checkpoint" in caplog.text
    caplog.clear()
    assert not run.offer(lambda: STATE) and caplog.text == "", "not at every step"


def test_what_a_crash_left_half_written_is_neither_read_nor_left(tmp_path: Path):
    """The file that was being written has another name until it is whole."""
    (tmp_path / ".run.tmp").write_bytes(b"half")
    run = Checkpoints(tmp_path, every_s=0).of("run", *SOURCE)
    assert run.load() is None and run.ignored == []
    run.offer(lambda: STATE)
    assert [path.name for path in tmp_path.iterdir()] == ["run.00000001.checkpoint"]


@pytest.mark.parametrize("name", ["", "../up", "a.b", "tile 7"])
def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str):
    """Before anything is written outside the folder."""
    with pytest.raises(ValueError, match="name"):
        Checkpoints(tmp_path).of(name, *SOURCE)


def test_a_finished_job_leaves_nothing_of_its_own(tmp_path: Path):
    """clear removes every run's states and the folder, unless something else lies in it; no folder is no error."""
    checkpoints = Checkpoints(tmp_path / "job", every_s=0)
    checkpoints.clear()
    for name in ("one", "two"):
        checkpoints.of(name, *SOURCE).offer(lambda: STATE)
    checkpoints.clear()
    assert not (tmp_path / "job").exists()
    checkpoints.of("one", *SOURCE).offer(lambda: STATE)
    (tmp_path / "job" / "notes.txt").write_text("mine")
    checkpoints.clear()
    assert [path.name for path in (tmp_path / "job").iterdir()] == ["notes.txt"]
