"""From files to files: a derived series that is whole and checked, or a refusal and an empty folder."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydicom import dcmread
from pydicom.dataset import Dataset
from scipy import ndimage

import deconv
from deconv import Cancelled, Progress
from dicomnode import pipeline
from dicomnode.pipeline import KERNEL_FILE, Failing, Outcome, choose_device, process
from dicomnode.remote import Computed
from sop.errors import Refused
from sop.read import read_series
from tests.factories import ct_series, pet_series
from tests.peers import REPOSITORY

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
NAMING = {"software_version": "0.1.0", "series_description": "NBD deblurred", "taken_series_numbers": [2, 5]}


def saved(folder: Path, datasets: list[Dataset]) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{number:03d}.dcm" for number in range(len(datasets))]
    for path, dataset in zip(paths, datasets, strict=True):
        dataset.save_as(path, enforce_file_format=True)
    return paths


def blurred_pet() -> list[Dataset]:
    """A sphere seen through 7 mm FWHM, on voxels of 3.27 x 4.69 x 4.69 mm."""
    shape = (12, 20, 18)
    rows = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1)
    sphere = np.linalg.norm((rows - np.array([5.2, 10.4, 7.9])) * (3.27, 4.6875, 4.6875), axis=-1) < 15
    seen = ndimage.gaussian_filter(np.where(sphere, 20000.0, 4000.0), (0.91, 0.63, 0.63), mode="nearest")
    return pet_series(slices=12, rows=20, columns=18, values=seen)


def run(tmp_path: Path, pet: list[Dataset], ct: list[Dataset] | None = None, **options: Any) -> Outcome:
    guide = saved(tmp_path / "ct", ct) if ct else []
    settings: dict[str, Any] = {"method": "tv", "preset": "quick", "device": "cpu", "threads": 1, "naming": NAMING,
                                "now": NOW}
    settings |= options
    return process(saved(tmp_path / "pet", pet), guide, tmp_path / "out", **settings)


def test_the_outcome_lies_whole_in_its_folder_with_its_kernel_and_a_report_in_plain_json(tmp_path: Path) -> None:
    """Twice the slices, the kernel as an array, every gate and check told, all of it plain JSON."""
    outcome = run(tmp_path, blurred_pet())
    report = json.loads(json.dumps(outcome.report, allow_nan=False))
    assert report == outcome.report
    assert len(list((tmp_path / "out").glob("*.dcm"))) == 24 == report["derived_instances"]
    assert report["check"]["ok"] and report["check"]["items"]
    assert report["gates"] and all(gate["ok"] for gate in report["gates"])
    assert report["method"] == "tv" and report["settings"]["iterations"] and report["device"] == "cpu"
    assert set(report["seconds"]) == {"read", "deconvolve", "derive", "check"}
    kernel = np.load(tmp_path / "out" / KERNEL_FILE)
    assert kernel.sum() == pytest.approx(1.0, abs=1e-5)
    header = dcmread(next((tmp_path / "out").glob("*.dcm")), stop_before_pixels=True)
    assert header.SeriesInstanceUID == report["derived_series_uid"] == outcome.derived.series_instance_uid


def test_a_long_method_goes_on_where_the_last_run_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of the first run is all that the second needs; another software version starts afresh."""
    monkeypatch.setattr(pipeline, "CHECKPOINT_S", 0.0)
    phase = {"until": 3, "fidelity": 1.0}
    short = {"stages": [{"name": "main", "scale": 1.0, "kernel_size": 5, "phases": [phase]}]}

    def stop(progress: Progress) -> None:
        if progress.stage == "main" and progress.step == 2:
            raise Cancelled

    def resumed_at(number: int, version: str) -> float:
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(Failing) as refused:  # three steps make no image that passes
            run(folder, blurred_pet(), method="nbd", preset="paper", overrides=short,
                checkpoints=tmp_path / "kept", naming={**NAMING, "software_version": version})
        return float(refused.value.report["metrics"]["resumed_at_step"])

    with pytest.raises(Cancelled):
        run(tmp_path, blurred_pet(), method="nbd", preset="paper", overrides=short, on_step=stop,
            checkpoints=tmp_path / "kept")
    assert resumed_at(1, "0.2.0") == 0.0
    assert resumed_at(2, "0.2.0") == 3.0
    run(tmp_path / "kept", blurred_pet(), checkpoints=tmp_path / "kept")  # tv keeps nothing, and runs all the same


def test_progress_names_every_stage_in_order(tmp_path: Path) -> None:
    """What a person sees: reading, the method's own stages, deriving, checking, done."""
    heard: list[Progress] = []
    run(tmp_path, blurred_pet(), on_step=heard.append)
    stages = list(dict.fromkeys(progress.stage for progress in heard))
    assert stages[0] == "read" and stages[-3:] == ["derive", "check", "done"] and len(stages) > 4


def test_cancelling_from_a_step_stops_the_method(tmp_path: Path) -> None:
    """Cancelled passes through, and nothing is written."""
    def stop(progress: Progress) -> None:
        if progress.stage not in ("read", "derive"):
            raise Cancelled

    with pytest.raises(Cancelled):
        run(tmp_path, blurred_pet(), on_step=stop)
    assert not (tmp_path / "out").exists()


def test_a_guide_that_cannot_be_read_is_refused_where_it_is_required(tmp_path: Path) -> None:
    """The route asks for a guide: the refusal names the CT and what is wrong with it."""
    ct = ct_series()
    with pytest.raises(Refused) as refusal:
        run(tmp_path, blurred_pet(), ct[:4] + ct[6:], guide_required=True)
    assert refusal.value.code == "guide-gap" and refusal.value.series == ct[0].SeriesInstanceUID
    assert not (tmp_path / "out").exists()


def test_a_guide_that_cannot_be_read_is_left_out_where_it_is_only_preferred_and_the_report_says_why(
        tmp_path: Path) -> None:
    """Unguided, never silently."""
    ct = ct_series()
    outcome = run(tmp_path, blurred_pet(), ct[:4] + ct[6:])
    assert "not used" in outcome.report["guide"]["reason"] and outcome.report["guide"]["used"] is False


def test_a_ct_of_another_frame_of_reference_never_guides(tmp_path: Path) -> None:
    """Whoever chose it."""
    with pytest.raises(Refused) as refusal:
        run(tmp_path, blurred_pet(), ct_series(FrameOfReferenceUID="1.2.3"))
    assert refusal.value.code == "guide-frame"


def test_a_method_that_does_not_use_the_guide_gives_the_same_series_with_and_without(tmp_path: Path) -> None:
    """The UIDs depend on what decided the pixels alone."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    without, with_ct = run(tmp_path / "a", blurred_pet()), run(tmp_path / "b", blurred_pet(), ct_series())
    assert without.derived.sop_instance_uids == with_ct.derived.sop_instance_uids
    assert np.array_equal(without.result.image.array, with_ct.result.image.array)


def test_the_instances_of_a_guide_that_was_used_decide_the_uids(tmp_path: Path) -> None:
    """The same CT with one more slice is another input: one UID never means two images."""
    result = run(tmp_path, blurred_pet()).result
    source = read_series(blurred_pet())[1]
    guided = replace(result, settings={**result.settings, "guided": True})

    def recipe(digest: str, used: bool) -> str:
        guide = {"used": used, "series_uid": "1.2.3", "instances_sha256": digest}
        return pipeline._derivation(Computed(guided, "cpu", 1, ""), source, guide, NAMING).canonical()

    assert recipe("a", True) != recipe("b", True) != recipe("a", False)
    assert recipe("a", False) == recipe("b", False)


def test_what_changes_the_last_bits_decides_the_uids(tmp_path: Path) -> None:
    """Another kind of device and another number of threads are another recipe; which GPU of a kind is not."""
    result = run(tmp_path, blurred_pet()).result
    source, unguided = read_series(blurred_pet())[1], {"used": False, "series_uid": None}

    def recipe(device: str, threads: int = 1) -> str:
        return pipeline._derivation(Computed(result, device, threads, ""), source, unguided, NAMING).canonical()

    assert recipe("cpu") != recipe("cuda")
    assert recipe("cuda:0") == recipe("cuda:1")
    assert recipe("cpu", threads=2) != recipe("cpu")


def test_the_threads_that_computed_are_those_of_the_recipe(tmp_path: Path) -> None:
    """What the library computes with is asked after it was told, not before."""
    volume, _ = read_series(blurred_pet())
    before = torch.get_num_threads()
    try:
        made = pipeline._here(volume, None, method="cubic", preset="default", overrides={}, device="cpu",
                              threads=before + 1, on_step=None, further={})
    finally:
        torch.set_num_threads(before)
    assert made.threads == before + 1


def test_units_that_were_assumed_decide_the_uids(tmp_path: Path) -> None:
    """The same numbers as activity and as SUV are two images, so they are two series."""
    pet = blurred_pet()
    for dataset in pet:
        del dataset.Units
    derived = {}
    for units in ("BQML", "GML"):
        (tmp_path / units).mkdir()
        derived[units] = run(tmp_path / units, pet, assume_units=units).derived
        assert dcmread(derived[units].files[0], stop_before_pixels=True).Units == units
    assert derived["BQML"].series_instance_uid != derived["GML"].series_instance_uid
    assert not set(derived["BQML"].sop_instance_uids) & set(derived["GML"].sop_instance_uids)


@pytest.mark.parametrize(("options", "message"), [
    ({"method": "nonsense"}, "nonsense"), ({"preset": "nonsense"}, "nonsense"), ({"overrides": {"no": 1}}, "no"),
])
def test_settings_that_the_method_does_not_take_are_refused(tmp_path: Path, options: dict, message: str) -> None:
    """A refusal, not a crash that is tried again."""
    with pytest.raises(Refused, match=message) as refusal:
        run(tmp_path, blurred_pet(), **options)
    assert refusal.value.code == "method"


def test_a_series_without_activity_is_refused(tmp_path: Path) -> None:
    """Nothing to deblur."""
    with pytest.raises(Refused):
        run(tmp_path, pet_series(values=np.zeros((8, 16, 14))))
    assert not (tmp_path / "out").exists()


class Tampered:
    """The real method with its result changed afterwards."""

    def __init__(self, method: Any, change: Any) -> None:
        self._method, self._change = method, change
        self.settings = method.settings

    def deconvolve(self, *args: Any, **options: Any) -> Any:
        return self._change(self._method.deconvolve(*args, **options))


def tamper(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    real = deconv.method
    monkeypatch.setattr(pipeline.deconv, "method", lambda name: Tampered(real(name), change))


def test_a_result_that_fails_a_gate_is_refused_with_what_was_measured(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One percent too much activity: held for a person, the report attached, nothing written."""
    tamper(monkeypatch, lambda result: replace(result, image=result.image.with_array(result.image.array * 1.01)))
    with pytest.raises(Failing, match="activity") as refusal:
        run(tmp_path, blurred_pet())
    assert refusal.value.code == "gate"
    assert any(not gate["ok"] for gate in refusal.value.report["gates"])
    assert not (tmp_path / "out").exists()


def test_a_written_series_that_fails_the_check_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check sees files only: a slice spoiled on disk after it was written ends the run, and the folder is gone."""
    write = pipeline.write_derived

    def spoil(*args: Any, **options: Any) -> Any:
        derived = write(*args, **options)
        dataset = dcmread(derived.files[3])
        dataset.ImagePositionPatient = ["0", "0", "0"]
        dataset.save_as(derived.files[3])
        return derived

    monkeypatch.setattr(pipeline, "write_derived", spoil)
    with pytest.raises(Failing) as refusal:
        run(tmp_path, blurred_pet())
    assert refusal.value.code == "check" and not refusal.value.report["check"]["ok"]
    assert not (tmp_path / "out").exists()


def test_auto_takes_what_is_there_and_a_named_device_is_taken_by_its_word() -> None:
    """auto is cpu or cuda; anything else is not reinterpreted."""
    import torch

    assert choose_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device("cuda:3") == "cuda:3" and choose_device("cpu") == "cpu"


def test_the_child_speaks_json_lines_only_and_leaves_when_its_parent_lets_go(tmp_path: Path) -> None:
    """A broken order is a failed attempt in words; standard output holds nothing but messages."""
    order = tmp_path / "order.json"
    order.write_text(json.dumps({"pet_files": [], "guide_files": [], "digests": {}, "method": "tv", "preset": "quick",
                                 "settings": {}, "device": "cpu", "threads": 1, "derivation": NAMING,
                                 "guide_required": False, "checkpoints": str(tmp_path / "kept"), "now": 1.0}))
    child = subprocess.Popen([sys.executable, "-m", "dicomnode.pipeline", str(order)], cwd=REPOSITORY,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None and child.stdout is not None
    messages = [json.loads(line) for line in child.stdout]
    child.stdin.close()
    child.wait(30)
    child.stdout.close()
    assert [message["kind"] for message in messages] == ["progress", "refused"]
    assert messages[-1]["code"] == "empty"
