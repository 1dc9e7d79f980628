"""A run of the paper's method that was stopped or killed goes on from its checkpoint and ends in the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deconv import blind, nbd
from deconv.blind import Diverged, Fit, Step, fit
from deconv.checkpoint import Checkpoints
from deconv.result import Cancelled, Progress
from deconv.stages import PAPER, REWRITES, Phase, Settings, Stage

# every kind of step: pre-training, reproducing, both halvings, every phase of the main stage
STAGES = (
    Stage("pre-train 1/2", 0.5, 3, (Phase(2, fidelity=1.0, kernel=1.0),)),
    Stage("pre-train 1/√2", 0.5**0.5, 5, (Phase(2, fidelity=1.0, kernel=1.0),), reproduce=2),
    Stage("main", 1.0, 5, (Phase(2, fidelity=1.0, texture=0.05), Phase(4, fidelity=1.0, tv=0.01), Phase(6, ssim=1.0)),
          reproduce=2, halve_at=(1, 3)),
)
SETTINGS = replace(PAPER, stages=STAGES)
STEPS = 14
RNG = np.random.default_rng(0)
Y = RNG.random((4, 10, 18), dtype=np.float32)
TEXTURE = RNG.random(Y.shape, dtype=np.float32)


def run(settings: Settings = SETTINGS, folder: Path | None = None,
        on_step: Callable[[Progress], None] | None = None) -> Fit:
    kept = Checkpoints(folder, every_s=0) if folder else None
    return fit(Y, settings, texture=TEXTURE, device="cpu", on_step=on_step, checkpoints=kept)


def stop_at(step: int) -> Callable[[Progress], None]:
    def listen(progress: Progress) -> None:
        if progress.step == step:
            raise Cancelled

    return listen


def same(one: Fit, other: Fit) -> None:
    np.testing.assert_array_equal(one.x, other.x)
    np.testing.assert_array_equal(one.k, other.k)
    assert one.losses.keys() == other.losses.keys() and one.steps == other.steps
    for name, values in one.losses.items():
        np.testing.assert_array_equal(values, other.losses[name])


@pytest.fixture(scope="module", params=[REWRITES, ()], ids=["rewrites", "plain"])
def settings(request: pytest.FixtureRequest) -> Settings:
    return replace(SETTINGS, rewrites=request.param)


@pytest.fixture(scope="module")
def whole(settings: Settings) -> Fit:
    return run(settings)


@pytest.fixture(scope="module")
def exact() -> Fit:
    """The run that nobody disturbed, in float32."""
    return run()


@pytest.mark.parametrize("step", [2, 8, 14])  # every step: the next test
def test_a_run_that_was_stopped_ends_in_the_bits_of_one_that_was_not(
    settings: Settings, whole: Fit, step: int, tmp_path: Path
):
    """Image, kernel and every loss, whatever the stage and the part of it; and no step is done twice."""
    assert whole.steps == STEPS
    with pytest.raises(Cancelled):
        run(settings, tmp_path, stop_at(step))
    heard: list[int] = []
    resumed = run(settings, tmp_path, lambda progress: heard.append(progress.step))
    assert heard == list(range(step + 1, STEPS + 1)) and resumed.resumed_at == step
    same(resumed, whole)


def test_a_run_stopped_at_every_step_gets_to_the_end(settings: Settings, whole: Fit, tmp_path: Path):
    """Fourteen times taken up: still the same, whatever the phase."""
    for step in range(1, STEPS + 1):
        with pytest.raises(Cancelled):
            run(settings, tmp_path, stop_at(step))
    same(run(settings, tmp_path), whole)


def test_a_run_cut_short_by_max_steps_resumes_to_the_same(tmp_path: Path):
    """On a coarser grid, in the middle of the schedule."""
    short = replace(SETTINGS, max_steps=5)
    with pytest.raises(Cancelled):
        run(short, tmp_path, stop_at(5))
    same(run(short, tmp_path), run(short))


def test_other_settings_start_afresh(tmp_path: Path):
    """A checkpoint of another seed is not taken."""
    with pytest.raises(Cancelled):
        run(SETTINGS, tmp_path, stop_at(9))
    other = replace(SETTINGS, seed=1)
    again = run(other, tmp_path)
    assert again.resumed_at == 0
    same(again, run(other))


def test_a_killed_process_loses_nothing_but_its_last_steps(tmp_path: Path, exact: Fit):
    """kill -9 in the main stage, mid-step: a new process ends in the same bits."""
    program = ("import os, signal, sys; from pathlib import Path\n"
               "from tests.deconv import test_resume as t\n"
               "def listen(progress):\n"
               "    if progress.step == 11: os.kill(os.getpid(), signal.SIGKILL)\n"
               "t.torch.set_num_threads(int(sys.argv[2])); t.run(folder=Path(sys.argv[1]), on_step=listen)\n")
    threads = str(torch.get_num_threads())
    code = subprocess.run([sys.executable, "-c", program, str(tmp_path), threads], check=False,
                          cwd=Path(__file__).parents[2], env={**os.environ}).returncode
    assert code == -signal.SIGKILL
    resumed = run(folder=tmp_path)
    assert resumed.resumed_at == 11
    same(resumed, exact)


def test_the_door_passes_checkpoints_on_and_tells(tmp_path: Path):
    """nbd.deconvolve with a folder: resumes, says at which step, same image."""
    from deconv.volume import Volume

    volume = Volume.axial(Y, (3, 2, 2))
    settings = nbd.settings("paper", stages=STAGES)
    whole = nbd.deconvolve(volume, settings)
    with pytest.raises(Cancelled):
        nbd.deconvolve(volume, settings, checkpoints=Checkpoints(tmp_path, every_s=0), on_step=stop_at(6))
    resumed = nbd.deconvolve(volume, settings, checkpoints=Checkpoints(tmp_path, every_s=0))
    assert (whole.metrics["resumed_at_step"], resumed.metrics["resumed_at_step"]) == (0.0, 6.0)
    np.testing.assert_array_equal(resumed.image.array, whole.image.array)
    assert resumed.settings == whole.settings


# --- bfloat16


def break_low_precision(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """From its call-th step on, a stage in bfloat16 yields an image that is not a number."""
    real, calls = Step.images, [0]

    def images(self: Step):
        x, k = real(self)
        if self.autocast is None:
            return x, k
        calls[0] += 1
        return (x * float("nan") if calls[0] >= call else x), k

    monkeypatch.setattr(blind.Step, "images", images)


@pytest.mark.parametrize("call", [1, 3, 6, 9])
def test_bfloat16_that_fails_is_run_again_in_float32(monkeypatch: pytest.MonkeyPatch, exact: Fit, call: int):
    """In the reproducing steps, in the first, in a later step, or only in the estimate after the last one (the ninth):
    the main stage starts again, the result is that of float32 to the bit, and the attempt's losses are told."""
    break_low_precision(monkeypatch, call)
    found = run(replace(SETTINGS, precision="bfloat16"))
    assert found.precision_fallback == "main" and exact.precision_fallback == ""
    np.testing.assert_array_equal(found.x, exact.x)
    np.testing.assert_array_equal(found.k, exact.k)
    np.testing.assert_array_equal(found.losses["main"], exact.losses["main"])
    attempts = [values for name, values in found.losses.items() if "not finite" in name]
    assert sum(len(values) for values in attempts) == min(call, 8)
    assert found.steps == STEPS


def test_bfloat16_that_holds_is_kept(exact: Fit):
    """No failure, no second run; and it is not float32."""
    found = run(replace(SETTINGS, precision="bfloat16"))
    assert found.precision_fallback == "" and not any("not finite" in name for name in found.losses)
    assert not np.array_equal(found.x, exact.x)


def test_bfloat16_gives_the_same_bits_again():
    """Levels of one, two and three voxels included, with whatever the memory held before."""
    low = replace(SETTINGS, precision="bfloat16")
    first = run(low)
    for _ in range(2):
        waste = [torch.full((size,), float("nan")) for size in (300, 3000, 30_000, 300_000)]
        del waste
        same(run(low), first)


def test_a_run_that_fell_back_resumes_in_float32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Stopped after the fall-back: bfloat16 is not tried again."""
    low = replace(SETTINGS, precision="bfloat16")
    break_low_precision(monkeypatch, 3)
    whole = run(low)
    heard: list[int] = []

    def listen(progress: Progress) -> None:
        heard.append(progress.step)
        if heard.count(8) == 2:
            raise Cancelled

    monkeypatch.undo()
    break_low_precision(monkeypatch, 3)
    with pytest.raises(Cancelled):
        run(low, tmp_path, listen)
    resumed = run(low, tmp_path)
    assert resumed.resumed_at == 8 and resumed.precision_fallback == "main"
    same(resumed, whole)


def test_the_settings_of_the_result_name_the_fall_back(monkeypatch: pytest.MonkeyPatch):
    """What decided the image is told: the same settings on another machine may not have needed it."""
    from deconv.volume import Volume

    break_low_precision(monkeypatch, 3)
    found = nbd.deconvolve(Volume.axial(Y, (3, 2, 2)), nbd.settings("paper", stages=STAGES, precision="bfloat16"))
    assert found.settings["precision_fallback"] == "main"


def test_float32_that_fails_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Nothing is left to fall back to: Diverged with stage and step. What was kept before it can be taken up."""
    real = blind.objective
    calls = [0]

    def objective(*arguments):
        calls[0] += 1
        return real(*arguments) * (float("nan") if calls[0] == 7 else 1.0)

    monkeypatch.setattr(blind, "objective", objective)
    with pytest.raises(Diverged, match="main: the loss is nan at step 11 of 14"):
        run(SETTINGS, tmp_path)
    assert run(SETTINGS, tmp_path).resumed_at == 10


# --- determinism


def test_the_same_number_of_threads_gives_the_same_bits():
    """One, then two threads, each twice; between the numbers only rounding differs: sums are split another way."""
    program = ("from tests.deconv import test_resume as t; import json, numpy as np\n"
               "main = t.replace(t.SETTINGS, stages=t.STAGES[2:], max_steps=4)\n"
               "def once(threads):\n"
               "    t.torch.set_num_threads(threads); return t.run(main)\n"
               "one, two = once(1), once(2)\n"
               "t.same(once(1), one); t.same(once(2), two)\n"
               "np.testing.assert_allclose(two.losses['main: reproduce'], one.losses['main: reproduce'], rtol=1e-3)\n"
               "assert not t.torch.are_deterministic_algorithms_enabled(), 'as it was before'\n")
    # in a process of its own, whose threads sleep while they wait: spinning ones stand still beside other work
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], env=environment,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
