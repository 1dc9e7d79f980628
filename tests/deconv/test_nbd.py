"""Neural blind deconvolution: the paper's schedule, reproducible, cancellable; the rewrites leave it what it is."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import deconv
from deconv import nbd, stages
from deconv.blind import fit, objective
from deconv.kernels import gaussian
from deconv.operators import blur, downsample
from deconv.phantoms import spheres
from deconv.result import Cancelled, Progress
from deconv.stages import PAPER, REWRITES, Phase, shortened
from deconv.volume import Volume

SHORT = {"schedule_fraction": 0.001}  # 1 + 1 + 5 steps, and one to reproduce at each change of scale
TINY = tuple(replace(stage, kernel_size=5) for stage in PAPER.stages)  # all stages, a Gk that is drawn at once


@pytest.fixture(scope="module")
def phantom() -> Volume:
    return spheres((10, 19, 23)).measured


@pytest.fixture(scope="module")
def short_run(phantom):
    return nbd.deconvolve(phantom, nbd.settings("paper", **SHORT))


def test_the_paper_preset_is_the_published_schedule():
    """Tables 1 and 2: 1000 + 1000 + 5000 steps, kernels of 7, 11, 15, what enters the loss when."""
    half, root, main = PAPER.stages
    assert [s.scale for s in PAPER.stages] == [0.5, pytest.approx(2**-0.5), 1.0]
    assert [s.kernel_size for s in PAPER.stages] == [7, 11, 15]
    assert [s.steps for s in PAPER.stages] == [1000, 1000, 5000]
    assert [s.reproduce for s in PAPER.stages] == [0, 100, 100]
    assert main.halve_at == (2000, 4000)
    assert (PAPER.learning_rate_x, PAPER.learning_rate_k, PAPER.output_scale) == (1e-3, 8e-4, 1.5)

    def terms(step: int) -> set[str]:
        phase = main.phase(step)
        return {name for name in ("fidelity", "ssim", "texture", "kernel", "tv") if getattr(phase, name)}

    assert terms(0) == terms(299) == {"fidelity", "texture", "kernel"}
    assert terms(300) == terms(1999) == {"fidelity", "kernel"}
    assert terms(2000) == terms(3499) == {"fidelity", "kernel", "tv"}
    assert terms(3500) == terms(4999) == {"ssim", "tv"}
    assert half.phases == root.phases


def test_a_fraction_of_the_schedule_keeps_every_phase():
    """Phases, halvings and reproducing steps shrink together; none is lost."""
    short = shortened(nbd.settings("paper", schedule_fraction=0.01))
    main = short.stages[-1]
    assert [phase.until for phase in main.phases] == [3, 20, 35, 50] and main.halve_at == (20, 40)
    assert nbd.settings("paper", schedule_fraction=0.01).steps == 10 + 1 + 10 + 1 + 50
    assert nbd.settings("paper").steps == 7200
    assert nbd.settings("paper", max_steps=12).steps == 12


def test_importing_deconv_does_not_load_torch():
    """The receiver may ask which methods exist without paying for them."""
    code = "import sys, deconv, deconv.volume, deconv.result; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", sorted(deconv.METHODS))
def test_every_method_has_the_same_door(name):
    """PRESETS, settings and deconvolve are there, and an unknown preset is refused with those that exist."""
    method = deconv.method(name)
    preset = next(iter(method.PRESETS))
    assert method.settings(preset) == method.PRESETS[preset]
    assert callable(method.deconvolve)
    with pytest.raises(ValueError, match=preset):
        method.settings("no such preset")


def test_unknown_names_are_refused_with_what_exists():
    """A misspelt method, setting or rewrite says what it could have been."""
    with pytest.raises(ValueError, match="richardson-lucy"):
        deconv.method("richardson")
    with pytest.raises(ValueError, match="schedule_fraction"):
        nbd.settings("paper", fraction=0.5)
    with pytest.raises(ValueError, match="kernel_vector"):
        nbd.settings("paper", rewrites=("kernel",))


@pytest.mark.parametrize(
    "overrides",
    [{"schedule_fraction": 0.0}, {"schedule_fraction": 1.5}, {"precision": "float16"}, {"output_scale": 0.0},
     {"max_steps": -1}, {"stages": PAPER.stages[:1]}],
)
def test_settings_that_make_no_sense_are_refused(overrides):
    """Before anything runs, not hours later."""
    with pytest.raises(ValueError):
        nbd.settings("paper", **overrides)


def test_the_result_lies_on_the_doubled_grid_with_its_settings(phantom, short_run):
    """Image doubled, kernel 15³ on the PET grid, settings as plain JSON, a loss for every step."""
    assert short_run.image.same_grid(phantom.doubled(short_run.image.array))
    assert short_run.image.unit == phantom.unit
    assert short_run.kernel is not None and short_run.kernel.shape == (15, 15, 15)
    assert float(short_run.kernel.sum()) == pytest.approx(1.0, abs=1e-5)
    assert json.loads(json.dumps(short_run.settings)) == short_run.settings
    assert short_run.settings["seed"] == 0 and short_run.settings["guided"] is False
    assert sum(len(values) for values in short_run.losses.values()) == short_run.metrics["steps"] == 9
    assert {"activity_change", "activity_scale", "residual", "kernel_fwhm_d_mm", "seconds"} <= set(short_run.metrics)


def test_activity_is_the_sources(phantom, short_run):
    """The total is kept to rounding, and the factor that did it is not hidden."""
    before, after = phantom.array.sum(dtype=np.float64), short_run.image.array.sum(dtype=np.float64) / 8
    assert after == pytest.approx(before, rel=1e-5)
    assert short_run.metrics["activity_scale"] != 1.0


def test_the_same_seed_gives_the_same_bits(phantom):
    """Promise 5; and the global random state is neither read nor moved."""
    first = nbd.deconvolve(phantom, nbd.settings("paper", stages=TINY, **SHORT))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = nbd.deconvolve(phantom, nbd.settings("paper", stages=TINY, **SHORT))
    assert torch.equal(state, torch.get_rng_state())
    np.testing.assert_array_equal(again.image.array, first.image.array)
    np.testing.assert_array_equal(again.kernel, first.kernel)
    other = nbd.deconvolve(phantom, nbd.settings("paper", stages=TINY, seed=1, **SHORT))
    assert not np.array_equal(other.image.array, first.image.array)


@pytest.mark.parametrize("rewrite", REWRITES)
def test_each_rewrite_changes_nothing_but_rounding(rewrite):
    """The first steps of the coarsest stage with the rewrite and without: the same losses."""
    y = spheres((10, 19, 23)).measured
    settings = nbd.settings("paper", stages=(stages.Stage("main", 1.0, 7, (Phase(4, 1.0, 0.3, 0.1, 1.0, 0.01),)),))
    guide = np.random.default_rng(0).random(y.shape, dtype=np.float32)
    losses = []
    for rewrites in (REWRITES, tuple(name for name in REWRITES if name != rewrite)):
        found = fit(y.array / y.array.max(), replace(settings, rewrites=rewrites), texture=guide, device="cpu")
        losses.append(found.losses["main"])
    assert len(losses[0]) == 4
    np.testing.assert_allclose(losses[0][:2], losses[1][:2], rtol=2e-5)
    # Adam's first steps have the size of the learning rate however small the gradient is: rounding grows with steps
    np.testing.assert_allclose(losses[0], losses[1], rtol=5e-3)


def test_the_objective_is_the_papers_sum():
    """At the true image and kernel the fidelity vanishes; every weighted term adds its own part."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((12, 14, 16), generator=generator)
    k = torch.from_numpy(gaussian(2.0, 1.0, (5, 5, 5)))
    y = blur(downsample(x), k)
    texture = torch.rand(y.shape, generator=generator)
    settings = nbd.settings("paper")

    def loss(**weights: float) -> float:
        return float(objective(x, k, y, Phase(1, **weights), settings, texture))

    assert loss(fidelity=1.0) == pytest.approx(0.0, abs=1e-6)
    assert loss(ssim=1.0) == pytest.approx(0.0, abs=1e-5)
    assert loss(kernel=1.0) == 0.0
    assert loss(tv=2.0) == pytest.approx(2 * loss(tv=1.0)) and loss(tv=1.0) > 0.1
    assert loss(texture=0.05) == pytest.approx(0.05 * loss(texture=1.0)) and loss(texture=1.0) > 0.1
    assert loss(texture=1.0, tv=1.0) == pytest.approx(loss(texture=1.0) + loss(tv=1.0), rel=1e-5)


def test_the_loss_falls(phantom):
    """Forty steps of the coarsest stage do what descent must."""
    found = nbd.deconvolve(phantom, nbd.settings("paper", max_steps=40))
    losses = found.losses["pre-train 1/2"]
    assert losses[-5:].mean() < 0.5 * losses[:5].mean()


def test_ct_guidance_steers_the_image(phantom):
    """A CT guide is used: the settings say so and the image differs from the unguided one."""
    rng = np.random.default_rng(0)
    ct = phantom.with_array(rng.normal(0, 200, phantom.shape).astype(np.float32), unit="[hnsf'U]")
    settings = nbd.settings("paper", stages=TINY, **SHORT)
    guided, unguided = nbd.deconvolve(phantom, settings, guide=ct), nbd.deconvolve(phantom, settings)
    assert guided.settings["guided"] is True and unguided.settings["guided"] is False
    assert not np.array_equal(guided.image.array, unguided.image.array)


def test_progress_is_told_at_every_step_and_cancelling_passes_through(phantom):
    """on_step hears steps 1, 2, ... of the true total; Cancelled raised in it ends the run."""
    heard: list[Progress] = []

    def listen(progress: Progress) -> None:
        heard.append(progress)
        if progress.step == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        nbd.deconvolve(phantom, nbd.settings("paper", stages=TINY, **SHORT), on_step=listen)
    assert [p.step for p in heard] == [1, 2, 3] and heard[0].steps == 9
    assert heard[0].stage == "pre-train 1/2" and all(np.isfinite(p.loss) for p in heard)


def test_volumes_that_cannot_be_deblurred_are_refused():
    """No activity, or too few voxels for the networks' three halvings: said before any work."""
    empty = Volume.axial(np.zeros((10, 20, 20)), (3, 3, 3))
    small = Volume.axial(np.ones((4, 8, 8)), (3, 3, 3))
    with pytest.raises(ValueError, match="no positive value"):
        nbd.deconvolve(empty, nbd.settings("paper"))
    with pytest.raises(ValueError, match="too small"):
        nbd.deconvolve(small, nbd.settings("paper"))
