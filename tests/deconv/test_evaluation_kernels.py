"""The paper's validations of kernels and pictures, and the page of pictures."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import deconv
from deconv import Deconvolution, Volume
from deconv.evaluation import Case, Evaluation, Plan, Store, evaluate
from deconv.evaluation.kernels import kernel_checks
from deconv.evaluation.pictures import clip_scores
from deconv.evaluation.plots import page
from deconv.evaluation.report import markdown, to_json
from deconv.interpolate import doubled_nearest
from deconv.kernels import skewed

HEAD = Case("head-and-neck", (12, 24, 24), spacing=(4.0, 4.0, 4.0))
SPHERES = Case("spheres", (12, 28, 28))


class Known:
    """A blind method that always names the same kernel: a Gaussian of 6 mm; and how sure it is of every voxel."""

    runs = 0

    @staticmethod
    def settings(preset: str, **overrides: object) -> object:
        return deconv.preview_settings(preset, **overrides)  # type: ignore[attr-defined]

    @classmethod
    def deconvolve(cls, volume: Volume, settings: object, **_: object) -> Deconvolution:
        cls.runs += 1
        spacing = (float(volume.spacing[0]), float(volume.spacing[1]), float(volume.spacing[2]))
        image = volume.doubled(doubled_nearest(volume.array))
        return Deconvolution(image, skewed(6.0, 0.0, spacing), spacing, "nbd", "preview", {},
                             uncertainty=image.with_array(0.1 * image.array))


@pytest.fixture(scope="module")
def known() -> Iterator[type[Known]]:
    """`preview` stands for a method whose answer is known."""
    real = deconv.method
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deconv, "preview_settings", real("nbd").settings, raising=False)
        patch.setattr(deconv, "method", lambda name: Known if name == "nbd" else real(name))
        yield Known


@pytest.fixture(scope="module")
def done(known: type[Known], tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """Two head-and-neck cases and one of spheres, two seeds."""
    cases = (HEAD, replace(HEAD, seed=1), SPHERES)
    return evaluate(Plan(cases, ("cubic", "preview"), seeds=(0, 1)), Store(tmp_path_factory.mktemp("done")))


@pytest.fixture
def found(done: Evaluation, tmp_path: Path) -> Evaluation:
    """The same in a folder of the test's own."""
    shutil.copytree(done.store.folder, tmp_path / "own")
    return replace(done, store=Store(tmp_path / "own"))


def test_a_gaussian_is_found_again_and_a_skewed_kernel_is_not(known: type[Known], found: Evaluation) -> None:
    """A method that always names a Gaussian scores 1 on the Gaussian and less on the three others."""
    products = {one.kernel: one.inner_product for one in kernel_checks(found, pseudo=True).recovered}
    assert products.pop("gaussian") > 0.9999
    assert len(products) == 3 and all(0.9 < value < 0.997 for value in products.values())


def test_pseudo_kernels_are_run_once(known: type[Known], found: Evaluation) -> None:
    """Four runs for the method, and none the second time; without being asked for, none at all."""
    before = known.runs
    assert kernel_checks(found, pseudo=False).recovered == () and known.runs == before
    first = kernel_checks(found, pseudo=True)
    assert known.runs == before + 4
    assert kernel_checks(replace(found, store=Store(found.store.folder)), pseudo=True) == first
    assert known.runs == before + 4


def test_kernels_are_compared_only_through_the_same_psf_on_the_same_voxels(found: Evaluation) -> None:
    """Two heads and necks on 4 mm voxels; the spheres on others stand alone; seeds of one case do not count twice."""
    studies = kernel_checks(found, pseudo=False).studies
    assert len(studies) == 1 and (studies[0].count, studies[0].mean) == (2, pytest.approx(1.0))
    assert "voxels 4x4x4 mm" in studies[0].psf


def test_an_image_that_was_not_kept_is_said(found: Evaluation) -> None:
    """Rows can come without arrays; then there is nothing to blur again."""
    for path in (found.store.folder / "arrays").iterdir():
        path.unlink()
    lines: list[str] = []
    assert kernel_checks(found, pseudo=True, say=lines.append).recovered == ()
    assert len(lines) == 4 and "not kept" in lines[0]


def test_the_report_tells_both_and_the_uncertainty(found: Evaluation) -> None:
    """In Markdown and in JSON."""
    checks = kernel_checks(found, pseudo=True)
    text = markdown(found, checks)
    assert "Pseudo-kernels found again" in text and "Kernels of several measurements" in text
    assert "within 1 sd" in text and "Seed-to-seed spread" in text
    assert len(to_json(found, checks)["kernels"]["recovered"]) == 4


class Bright:
    """An encoder to which bright is good."""

    scale = 1.0

    def images(self, batch: np.ndarray) -> np.ndarray:
        light = batch.mean(axis=(1, 2, 3)) - batch.min()
        return np.stack([light, np.ones_like(light)], axis=1)

    def texts(self, captions: Sequence[str]) -> np.ndarray:
        return np.eye(2)


def test_clip_iqa_is_told_for_every_image_and_the_truth(found: Evaluation) -> None:
    """Brighter images score higher, on the truth's scale; the report has a row for every case."""
    scores = {(one.case_label, one.method, one.seed): one.value for one in clip_scores(found, Bright())}
    assert len(scores) == len(found.rows) + len(found.plan.cases)
    row = next(row for row in found.rows if row.method == "cubic")
    arrays = found.store.arrays(row.key)
    assert arrays is not None
    found.store.add(row, replace(arrays, image=0.5 * arrays.image))
    darker = {(one.case_label, one.method, one.seed): one.value for one in clip_scores(found, Bright())}
    changed = {key for key in scores if scores[key] != darker[key]}
    assert changed == {(row.case_label, "cubic", row.seed)}
    assert all(darker[key] < scores[key] for key in changed)
    text = markdown(found, clip=clip_scores(found, Bright()))
    assert "## CLIP-IQA" in text and f"| {HEAD.label} | " in text
    assert "## CLIP-IQA" not in markdown(found)


def test_the_page_shows_what_was_run(found: Evaluation, tmp_path: Path) -> None:
    """A PNG with titles for error, recovery, kernels, images with uncertainty, and seeds."""
    figure = page(found)
    figure.savefig(tmp_path / "page.png", dpi=30)
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.size[0] == 480 and np.asarray(picture.convert("L")).std() > 10
    titles = {axes.get_title(loc) for axes in figure.axes for loc in ("left", "center")}
    assert {"RC_max, spheres, no noise", "kernel along W", "truth", "measured", "uncertainty of preview",
            "seed-to-seed NRMSE (dashed: promised)"} <= titles


def test_many_cases_are_drawn_together_and_nothing_is_not_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond a number of cases they become groups by phantom and noise; without any result there is no page."""
    monkeypatch.setattr("deconv.evaluation.plots.GROUPS_AT_MOST", 2)
    cases = (SPHERES, replace(SPHERES, noise=0.1), replace(SPHERES, fwhm_mm=4.5))
    bars = page(evaluate(Plan(cases, ("nearest",)), Store(tmp_path))).axes[0]
    assert [label.get_text() for label in bars.get_xticklabels()] == ["spheres\nno noise", "spheres\nnoise 10 %"]
    with pytest.raises(ValueError, match="nothing to draw"):
        page(Evaluation(Plan(cases, ("nearest",)), (), Store(tmp_path), {}))
