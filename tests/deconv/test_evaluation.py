"""The phantom benchmark: cases are what they say, figures of perfect and of spoiled images, runs that go on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import deconv
from deconv.evaluation import (
    SUITES,
    VARIANTS,
    Case,
    Evaluation,
    Plan,
    Row,
    Store,
    chosen_cases,
    chosen_methods,
    evaluate,
    plan_of,
)
from deconv.evaluation import rows as rows_module
from deconv.evaluation.measures import Truth, calibration, figures, overshoot, skewness, spread
from deconv.evaluation.methods import QUICK
from deconv.evaluation.report import markdown, to_json
from deconv.evaluation.rows import Arrays, code_digest, key_of
from deconv.evaluation.running import PeakMemory
from deconv.evaluation.summary import promises, spreads, summaries

TINY = Case("spheres", (12, 28, 28))
DESIGN = SUITES["design"]


@pytest.fixture(scope="module")
def truth() -> Truth:
    return Truth.of(TINY)


def tiny_plan(*methods: str, **options: object) -> Plan:
    return Plan((TINY,), methods, **options)  # type: ignore[arg-type]


def row(
    method: str = "best", case: Case = DESIGN[0], *, seed: int = 0, cpu_seconds: float = 10.0, **figure: object
) -> Row:
    """A row as a run would give it."""
    found = {"nrmse": 0.15, "kernel_inner_product": 0.99, "fwhm_error_mm": [0.1, -0.2, 0.0], "activity_change": 0.0,
             "recovery": [{"diameter_mm": 16.0, "mean": 0.9, "median": 1.0, "max": 1.02},
                          {"diameter_mm": 8.0, "mean": 0.7, "median": 0.7, "max": 1.5}], **figure}
    return Row(f"{method}{case.label}{seed}", case.plain(), case.label, method, method, seed, figures=found,
               cpu_seconds=cpu_seconds)


# --- cases and methods


def test_every_case_of_every_suite_is_told_apart_by_its_label() -> None:
    """A person can name any of them; the design's three are in `full`, too."""
    cases = {case for suite in SUITES.values() for case in suite}
    assert len({case.label for case in cases}) == len(cases)
    assert set(SUITES["design"]) | set(SUITES["skewed"]) <= set(SUITES["full"])


def test_the_full_suite_varies_what_it_promises() -> None:
    """Widths, anisotropy, skew along each axis, three levels of noise, four voxel sizes, three phantoms."""
    full = SUITES["full"]
    assert {4.5, 6.0, 7.5, (5.0, 6.5, 6.5)} <= {case.fwhm_mm for case in full}
    assert {0, 1, 2} <= {case.skew_axis for case in full if case.skew}
    assert {case.noise for case in full} == {0.0, 0.05, 0.1}
    assert len({case.spacing for case in full}) == 4 and len({case.phantom for case in full}) == 3


def test_a_case_measures_the_same_bits_every_time() -> None:
    """Its seed decides them, and no other seed gives them."""
    case = replace(TINY, noise=0.1)
    first, again, other = (c.build().measured.array for c in (case, case, replace(case, seed=1)))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize("wrong", [{"phantom": "cube"}, {"skew_axis": 3}])
def test_a_case_that_makes_no_sense_is_refused(wrong: dict) -> None:
    """With the reason."""
    with pytest.raises(ValueError, match=r"phantoms are|skew_axis"):
        Case(**{"phantom": "spheres", "shape": (12, 28, 28), **wrong})


def test_names_choose_and_what_fits_nothing_is_refused() -> None:
    """Beginnings are enough; without names everything but the hours of `paper` is run."""
    assert chosen_methods(["tv"]) == ("tv true PSF", "tv PSF 1 mm too narrow", "tv PSF 1 mm too wide")
    assert chosen_methods([]) == QUICK and "paper" not in QUICK
    assert [case.phantom for case in chosen_cases(["design"], ["head"])] == ["head-and-neck"]
    for call in (lambda: chosen_methods(["wiener"]), lambda: chosen_cases(["huge"]),
                 lambda: chosen_cases(["small"], ["cube"])):
        with pytest.raises(ValueError, match="are "):
            call()


def test_paper_is_in_the_plan_when_its_fraction_is_given_and_its_label_says_so() -> None:
    """A shortened schedule never passes for the published one."""
    plan = plan_of(methods=["cubic"], paper_fraction=0.1)
    assert plan.methods == ("cubic", "paper")
    assert plan.label(VARIANTS["paper"]) == "paper (10 % of its schedule)"
    settings = VARIANTS["paper"].settings(DESIGN[0], 3, 0.1)
    assert (settings.schedule_fraction, settings.output_scale, settings.seed) == (0.1, 1.1, 3)
    assert VARIANTS["paper"].settings(DESIGN[2], 0).output_scale == 1.5


@pytest.mark.parametrize("label", [label for label, variant in VARIANTS.items() if "PSF" in label])
def test_the_true_psf_is_handed_over_whole(label: str) -> None:
    """Width along every axis, and skew."""
    case = replace(TINY, fwhm_mm=(5.0, 6.5, 7.0), skew=0.3, skew_axis=1)
    off = {"narrow": -1.0, "wide": 1.0}.get(label.split()[-1], 0.0)
    settings = VARIANTS[label].settings(case, 0)
    assert settings.psf_fwhm_mm == (5.0 + off, 6.5 + off, 7.0 + off) and settings.psf_skew == (0.0, 0.3, 0.0)


# --- figures


def test_the_truth_itself_scores_no_error(truth: Truth) -> None:
    """Image and kernel without fault: every figure says so."""
    found = figures(truth, truth.phantom.truth.array, truth.kernel.astype(np.float32), None, {})
    assert found["nrmse"] == 0 and found["overshoot"] == 0 and found["background_cv"] == pytest.approx(0, abs=1e-6)
    assert found["kernel_inner_product"] == pytest.approx(1) and found["centroid_voxels"] == pytest.approx(0, abs=1e-5)
    assert np.abs(found["fwhm_error_mm"]).max() < 1e-3 and np.abs(found["skewness_error"]).max() < 1e-3
    assert found["recovery"][0]["max"] == pytest.approx(1, abs=1e-3) and found["uncertainty"] is None


def test_every_fault_shows_in_its_own_figure(truth: Truth) -> None:
    """Noise in the background, a hot voxel in a sphere, a wider kernel, a shifted kernel, lost activity."""
    image = truth.phantom.truth.array.copy()
    image[truth.background] *= np.random.default_rng(0).normal(1, 0.1, int(truth.background.sum())).astype(np.float32)
    image[np.unravel_index(int(image.argmax()), image.shape)] *= 1.3
    found = figures(truth, 0.9 * image, np.roll(truth.kernel, 1, 2).astype(np.float32), None, {})
    assert found["background_cv"] == pytest.approx(0.09, rel=0.1)
    assert found["overshoot"] == pytest.approx(0.17, abs=0.01) == pytest.approx(found["overshoot_local"], abs=0.01)
    assert found["centroid_voxels"] == pytest.approx(1, abs=0.01) and found["kernel_inner_product"] < 0.95
    stated = figures(truth, image, truth.kernel.astype(np.float32), None, {f"psf_fwhm_{a}_mm": 7.0 for a in "dhw"})
    assert stated["fwhm_error_mm"] == [1.0, 1.0, 1.0]


def test_lesions_of_other_shapes_are_judged_by_name(tmp_path: Path) -> None:
    """On the whole body; the truth itself recovers the hot ones, and the report names them all."""
    body = Truth.of(Case("whole-body", (64, 28, 38), spacing=(10.0, 10.0, 10.0)))
    found = figures(body, body.phantom.truth.array, None, None, {})["lesions"]
    assert len(found) == len(body.phantom.lesions) > 5 and len({one["name"] for one in found}) == len(found)
    large = max(body.phantom.lesions, key=lambda one: body.phantom.lesion_fraction(one).sum())
    assert next(one["max"] for one in found if one["name"] == large.name) == pytest.approx(1, abs=0.05)
    done = evaluate(Plan((body.case,), ("nearest",)), Store(tmp_path))
    assert all(one.name in markdown(done) for one in body.phantom.lesions)


def test_a_small_faint_structure_that_comes_out_too_hot_is_seen() -> None:
    """Its value is far below the image's maximum: only the local overshoot tells."""
    true = np.full((8, 8, 8), 0.1, np.float32)
    true[1:3, 1:3, 1:3], true[5:7, 5:7, 5:7] = 1.0, 0.3
    image = np.where(true == np.float32(0.3), np.float32(0.6), true)
    found = overshoot(image, true, true >= 0.2)
    assert found["overshoot"] == 0 and found["overshoot_local"] == pytest.approx(1.0)


@pytest.mark.parametrize("axis", range(3))
def test_the_reference_kernel_is_skewed_as_the_scanner_is(axis: int) -> None:
    """It makes the measurement from the averaged truth within half a per cent; its mirror image does not."""
    from scipy import ndimage

    from deconv.phantoms import average_pool

    truth = Truth.of(replace(TINY, skew=0.4, skew_axis=axis))
    pooled, y = average_pool(truth.phantom.truth.array.astype(np.float64)), truth.phantom.measured.array
    assert [abs(value) > 0.2 for value in skewness(truth.kernel)] == [a == axis for a in range(3)]
    inside = (slice(3, -3),) * 3
    off = [np.sqrt(np.mean((ndimage.convolve(pooled, k, mode="nearest") - y)[inside] ** 2)) / y.max()
           for k in (truth.kernel, np.flip(truth.kernel, axis))]
    assert off[0] < 0.005 and off[0] < 0.3 * off[1]


def test_an_honest_uncertainty_is_recognised() -> None:
    """Errors drawn with the stated deviations: 68 and 95 %; stated half as large: fewer; a constant tells nothing."""
    rng = np.random.default_rng(0)
    sd = rng.uniform(0.5, 2.0, (20, 20, 20)).astype(np.float32)
    error = (sd * rng.standard_normal(sd.shape)).astype(np.float32)
    hot = np.zeros(sd.shape, bool)
    hot[5:15, 5:15, 5:15] = True
    found = calibration(error, np.zeros_like(error), sd, hot)
    assert found["within_1_sd_all"] == pytest.approx(0.683, abs=0.02)
    assert found["within_2_sd_hot"] == pytest.approx(0.954, abs=0.02) and found["correlation_all"] > 0.2
    assert calibration(error, np.zeros_like(error), sd / 2, hot)["within_1_sd_all"] < 0.45
    assert calibration(error, np.zeros_like(error), np.ones_like(sd), hot)["correlation_hot"] == 0


def test_spread_is_relative_to_the_truth() -> None:
    """||a - b|| / ||truth||."""
    ones = np.ones((2, 2, 2), np.float32)
    assert spread(1.1 * ones, ones, 2 * ones) == pytest.approx(0.05)


# --- runs


def test_a_run_is_kept_and_not_repeated(tmp_path: Path) -> None:
    """The second time nothing is computed; `fresh` computes again; the lines tell."""
    lines: list[str] = []
    first = evaluate(tiny_plan("cubic", "nearest"), Store(tmp_path), say=lines.append)
    again = evaluate(tiny_plan("cubic", "nearest"), Store(tmp_path), say=lines.append)
    fresh = evaluate(tiny_plan("cubic", fresh=True), Store(tmp_path), say=lines.append)
    assert [("kept" in line) for line in lines] == [False, False, True, True, False]
    assert [r.figures for r in again.rows] == [r.figures for r in first.rows]
    assert fresh.rows[0].key == first.rows[0].key
    assert first.rows[0].peak_how and first.rows[0].wall_seconds > 0


def test_an_interrupted_benchmark_goes_on(tmp_path: Path) -> None:
    """What was done stays, and half a line that a kill left behind is cut off."""
    done = evaluate(tiny_plan("cubic"), Store(tmp_path))
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"key": "ab')
    store = Store(tmp_path)
    assert store.get(done.rows[0].key) == done.rows[0] and len(store) == 1
    evaluate(tiny_plan("nearest"), store)
    assert len(Store(tmp_path)) == 2


def test_a_broken_line_in_the_middle_is_refused(tmp_path: Path) -> None:
    """Nothing is guessed: file and line are named."""
    (tmp_path / "rows.jsonl").write_text('{"nonsense": 1}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1"):
        Store(tmp_path)


def test_rows_of_another_machine_can_be_merged(tmp_path: Path) -> None:
    """With their arrays; the second time there is nothing new."""
    evaluate(tiny_plan("cubic"), Store(tmp_path / "night"))
    store = Store(tmp_path / "here")
    assert (store.merge(tmp_path / "night"), store.merge(tmp_path / "night")) == (1, 0)
    lines: list[str] = []
    found = evaluate(tiny_plan("cubic"), store, say=lines.append)
    assert "kept" in lines[0] and store.arrays(found.rows[0].key) is not None


def test_runs_are_measured_anew_where_the_rulers_changed(tmp_path: Path) -> None:
    """Without running the method again, where its image was kept; else it is run again."""
    store = Store(tmp_path)
    done = evaluate(tiny_plan("cubic"), store).rows[0]
    store.remeasured(done, {"nrmse": 9.0}, "an older ruler")
    lines: list[str] = []
    again = evaluate(tiny_plan("cubic"), Store(tmp_path), say=lines.append).rows[0]
    assert again.figures == done.figures and "kept" in lines[0] and again.wall_seconds == done.wall_seconds
    store.remeasured(done, {"nrmse": 9.0}, "an older ruler")
    (tmp_path / "arrays" / f"{done.key}.npz").unlink()
    without = evaluate(tiny_plan("cubic"), Store(tmp_path), say=lines.append).rows[0]
    assert without.figures == done.figures and "kept" not in lines[-1]


def test_a_key_tells_settings_and_measurements_apart() -> None:
    """Another case, other measured bits, other settings, another device: other runs."""
    phantoms = [replace(TINY, seed=seed).build().measured.array for seed in (0, 1)]
    keys = {key_of(case.plain(), y, "tv", "default", settings, device)
            for case, y in ((TINY, phantoms[0]), (replace(TINY, noise=0.1), phantoms[0]), (TINY, phantoms[1]))
            for settings in ({"weight": 1}, {"weight": 2}) for device in ("cpu", "cuda")}
    assert len(keys) == 12


def test_code_that_a_method_does_not_use_is_not_in_its_digest() -> None:
    """An edit of one preset throws away no runs of another; every module is found from its root."""
    code_digest.cache_clear()
    digests = {code_digest("nbd", "paper"), code_digest("nbd", "preview"), code_digest("cubic", "default")}
    assert len(digests) == 3 and code_digest("tv", "default") == code_digest("cubic", "default")


def test_other_weights_are_another_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was taught enters the key as code does."""
    monkeypatch.setattr(rows_module, "_DATA", {"deconv.tv": str(tmp_path)})
    found = []
    for weights in (b"", b"taught", b"taught again"):
        (tmp_path / "net.npz").write_bytes(weights)
        code_digest.cache_clear()
        found.append((code_digest("tv", "default"), code_digest("nbd", "paper")))
    code_digest.cache_clear()
    assert len({tv for tv, _ in found}) == 3 and len({paper for _, paper in found}) == 1


def test_what_this_version_does_not_have_is_left_out_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preset that does not exist is skipped, not pretended."""
    monkeypatch.setattr(deconv, "PRESET_NAMES", {**deconv.PRESET_NAMES, "nbd": ("paper", "preview")})
    found = evaluate(tiny_plan("cubic", "best"), Store(tmp_path))
    assert [r.method for r in found.rows] == ["cubic"] and "no preset 'best'" in found.skipped[0]
    assert found.skipped[0] in markdown(found)


def test_a_method_that_fails_is_told_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One failure ends no night's benchmark, and is not kept as an answer."""
    def broken(*_: object, **__: object) -> None:
        raise ValueError("no edge anywhere")

    with monkeypatch.context() as patch:
        patch.setattr("deconv.classic.doubled", broken)
        found = evaluate(tiny_plan("cubic", "nearest"), Store(tmp_path))
    assert "no edge anywhere" in found.rows[0].failed and not found.rows[1].failed
    assert "failed: ValueError: no edge anywhere" in markdown(found)
    assert not evaluate(tiny_plan("cubic"), Store(tmp_path)).rows[0].failed


def test_peak_memory_is_that_of_the_run() -> None:
    """An array that comes and goes is seen; the next run does not inherit it."""
    memory = PeakMemory()
    memory.start()
    np.ones(20_000_000)
    first = memory.mb()
    memory.start()
    assert first == pytest.approx(160, rel=0.1) and memory.mb() < 80


# --- what the rows say together


def test_the_worst_case_has_a_name() -> None:
    """Mean and worst over cases and seeds; the smallest inner product is the worst one."""
    rows = [row(nrmse=0.1, kernel_inner_product=0.99), row(case=DESIGN[2], nrmse=0.3, kernel_inner_product=0.97)]
    found = {one.figure: one for one in summaries(rows)}
    assert found["nrmse"].mean == pytest.approx(0.2) and found["nrmse"].worst == 0.3
    assert found["nrmse"].worst_case == DESIGN[2].label and found["kernel_inner_product"].worst == 0.97
    assert found["fwhm_error_mm"].worst == 0.2 and found["rc_max_off"].worst == pytest.approx(0.02)


def test_promises_are_computed_and_nothing_is_reached_unmeasured() -> None:
    """Without rows all are open; at the limit reached; beyond it not, however good the other seeds are."""
    assert all(one.reached is None and one.measured is None for one in promises([], [], "best"))
    found = {one.text: one for one in promises([row(nrmse=0.20), row("cubic", nrmse=0.33)], [], "best")}
    assert found["NRMSE, spheres"].reached and found["NRMSE, head and neck"].reached is None
    assert found["NRMSE over that of cubic"].measured == pytest.approx(0.2 / 0.33)
    worse = [row(nrmse=0.1), row(nrmse=0.21, seed=1, cpu_seconds=301.0)]
    spoiled = {one.text: one for one in promises(worse, [], "best")}
    assert spoiled["NRMSE, spheres"].reached is False and "seed 1" in spoiled["NRMSE, spheres"].where
    assert spoiled["CPU seconds a phantom"].reached is False


@pytest.mark.parametrize("axis", range(3))
def test_the_promise_on_skewed_kernels_counts_every_axis(axis: int) -> None:
    """Each axis by itself, from cases that are skewed along it."""
    case = SUITES["skewed"][axis]
    found = {one.text: one for one in promises([row(case=case, kernel_inner_product=0.9)], [], "best")}
    said = [found[f"kernel inner product, PSF skewed along {name}"].reached for name in "DHW"]
    assert said[axis] is False and said.count(None) == 2


def test_recovery_of_large_spheres_is_promised_and_small_ones_may_overshoot() -> None:
    """The limit of 5 % holds from 10 mm on."""
    good = {one.text: one for one in promises([row()], [], "best")}["RC_max off 1, spheres ≥ 10 mm"]
    sphere = {"diameter_mm": 10.0, "mean": 1.0, "median": 1.0, "max": 0.94}
    bad = {one.text: one for one in promises([row(recovery=[sphere])], [], "best")}["RC_max off 1, spheres ≥ 10 mm"]
    assert good.reached is True and bad.reached is False and bad.measured == pytest.approx(0.06)


def test_seeds_are_compared_on_the_same_measurement(tmp_path: Path) -> None:
    """Two results that differ by a known amount give that spread, and the promise uses the worst."""
    plan = Plan((TINY,), ("preview",), seeds=(0, 1))
    store = Store(tmp_path)
    truth = TINY.build().truth.array
    rows = [row("preview", TINY, seed=0), row("preview", TINY, seed=1)]
    for one, factor in zip(rows, (1.0, 1.04), strict=True):
        store.add(one, Arrays((factor * truth).astype(np.float32)))
    found = spreads(Evaluation(plan, tuple(rows), store, {}))
    assert len(found) == 1 and found[0].value == pytest.approx(0.04, rel=1e-3)
    said = {one.text: one for one in promises(rows, found, "preview")}["seed-to-seed NRMSE"]
    assert said.reached is False and said.where == TINY.label


def test_the_report_holds_every_method_and_is_json(tmp_path: Path) -> None:
    """Markdown for people, the same figures as JSON for programs."""
    found = evaluate(tiny_plan("cubic", "tv true PSF"), Store(tmp_path))
    text, data = markdown(found), json.loads(json.dumps(to_json(found)))
    assert text.startswith("# ") and all(text.count(method) >= 2 for method in ("cubic", "tv true PSF"))
    assert f"{found.rows[1].figures['nrmse']:.3f}" in text
    assert data["rows"][1]["figures"]["nrmse"] == found.rows[1].figures["nrmse"] and data["machine"]["threads"] == 1
