"""One series from files to files: read -> deconvolve -> derive -> check. The only module that knows all packages.

`process` is a plain function; `dicomnode deblur` calls it too. `python -m dicomnode.pipeline ORDER` is the child of the
executor: it reads its order, reports progress and its last word as JSON lines on standard output, and ends with its
parent. Nothing leaves the folder it was given; the parent keeps or discards it whole.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO
from uuid import uuid4

import numpy as np

import deconv
from deconv import Deconvolution, OnStep, Progress, Volume
from deconv.metrics import kernel_fwhm_mm
from deconv.safeguards import Gate, gates
from dicomnode import companions
from dicomnode.daskclient import ClusterUnavailable, WorkerLost
from dicomnode.daskclient import deconvolve as deconvolve_on_cluster
from dicomnode.errors import CannotUnderstand
from dicomnode.looks import LOOKS_FILE
from dicomnode.looks import make as make_looks
from dicomnode.looks import save as save_looks
from dicomnode.process import die_first, tie_to_parent, trouble
from dicomnode.remote import Computed
from dicomnode.stored import sha256_of
from dicomnode.uncertainty import UNCERTAINTY_FILE
from dicomnode.uncertainty import save as save_uncertainty
from sop.check import check_derived
from sop.errors import Refused
from sop.pet import Derivation, DerivedSeries, write_derived
from sop.read import read_series
from sop.scanner import scanner_key
from sop.series import SeriesInfo

__all__ = ["KERNEL_FILE", "Outcome", "choose_device", "full_settings", "main", "process"]

KERNEL_FILE = "kernel.npy"
PROGRESS_S = 0.5  # least time between two progress lines
CHECKPOINT_S = 60.0  # least time between two states that are kept: what a crash can cost


@dataclass(frozen=True, eq=False)
class Outcome:
    """A derived series that lies whole and checked in its folder.

    report  plain JSON values: source, guide, method, settings, metrics, gates, check, seconds, derived_series_uid,
            derived_instances. result: what the method returned.
    """

    derived: DerivedSeries
    result: Deconvolution
    source: Volume
    report: dict[str, Any]


class Failing(Refused):
    """A result that a gate or the check does not let pass; `report` tells what was measured."""

    def __init__(self, code: str, reason: str, remedy: str, *, report: dict[str, Any], study: str, series: str) -> None:
        super().__init__(code, reason, remedy, study=study, series=series)
        self.report = report


def choose_device(wanted: str) -> str:
    """The torch device for "auto", "cpu", "cuda" or "cuda:N": auto takes a CUDA device where there is one."""
    if wanted != "auto":
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def full_settings(method: str, preset: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a method's preset with some replaced, as JSON values. Raises ValueError naming what exists."""
    return dict(_plain(deconv.method(method).settings(preset, **overrides)))


def process(
    pet_files: Sequence[Path], guide_files: Sequence[Path], out_folder: Path, *, method: str, preset: str,
    overrides: Mapping[str, Any] | None = None, device: str = "auto", threads: int = 0, naming: Mapping[str, Any],
    guide_required: bool = False, now: datetime, on_step: OnStep | None = None, assume_units: str | None = None,
    checkpoints: Path | None = None, cluster: Callable[..., Computed] | None = None, also: Sequence[str] = (),
) -> Outcome:
    """Make the derived series of one PET series in `out_folder` (made here, must not hold anything else).

    guide_files     the CT of the same frame of reference; empty: unguided.
    overrides       settings that differ from the preset's.
    threads         CPU threads of the method; 0: as many as the library takes.
    naming          arguments of sop.pet.Derivation that do not come from the method: software_version, uid_root,
                    series_description, series_number_offset, taken_series_numbers, research_use, institution, station.
    guide_required  refuse where the guide cannot be read; otherwise the method runs unguided and the report says why.
    now             time of processing, for InstanceCreationDate and the like.
    checkpoints     folder from which a method that can (`deconv.RESUMABLE`) goes on where a killed run was; the
                    caller's to remove. None: it starts afresh.
    cluster         computes the deconvolution elsewhere: dicomnode.daskclient.deconvolve with its scheduler and key.
                    None: here. No checkpoints there.
    also            what is made beside the series, in `out_folder`/also: see companions.py.

    Raises Refused: by the reader; "method" for settings or a volume the method does not take; "gate" and "check"
    (Failing, with report) for a result that must not leave. `out_folder` is then gone.
    """
    say = _stages(on_step)
    say("read", 0)
    marks = [time.perf_counter()]
    volume, source = read_series(pet_files, assume_units=assume_units)
    guide, guide_report = _read_guide(guide_files, source, required=guide_required)
    marks.append(time.perf_counter())
    made = _deconvolve(cluster or partial(_here, further=_resumable(method, preset, checkpoints, naming)), volume,
                       source, guide, method=method, preset=preset, overrides=dict(overrides or {}), device=device,
                       threads=threads, on_step=on_step)
    result = made.result
    marks.append(time.perf_counter())
    guide_report["used"] = bool(result.settings.get("guided", False))
    derivation = _derivation(made, source, guide_report, naming)
    opened = gates(volume, result)
    report = _report(source, result, guide_report, device=made.device, gates=opened)
    _pass_gates(opened, report, source)
    say("derive", 1)
    derived = write_derived(result.image, source, derivation, out_folder, now=now)
    marks.append(time.perf_counter())
    say("check", 2)
    _check(pet_files, derived, result, source, report, out_folder)
    marks.append(time.perf_counter())
    if result.kernel is not None:
        np.save(out_folder / KERNEL_FILE, result.kernel)
    if result.uncertainty is not None:
        save_uncertainty(out_folder / UNCERTAINTY_FILE, result.uncertainty)
    report["looks"] = _looks(volume, result, source, out_folder / LOOKS_FILE)
    names = ("read", "deconvolve", "derive", "check")
    report["seconds"] = {name: round(b - a, 3) for name, a, b in zip(names, marks, marks[1:])}
    report |= {"derived_series_uid": derived.series_instance_uid, "derived_instances": len(derived.files),
               "series_number": derived.series_number, "series_description": derived.series_description}
    if also:
        report["also"] = companions.make(also, out_folder, source=source, derived=derived, derivation=derivation,
                                         result=result, report=_plain(report), now=now)
    say("done", 3)
    return Outcome(derived, result, volume, _plain(report))


def _stages(on_step: OnStep | None) -> Callable[[str, int], None]:
    def say(stage: str, step: int) -> None:
        if on_step is not None:
            on_step(Progress(stage, step, 3, math.nan))

    return say


def _read_guide(files: Sequence[Path], source: SeriesInfo, *, required: bool) -> tuple[Volume | None, dict[str, Any]]:
    """The CT and what the report says of it; (None, why) where there is none or it cannot be read."""
    if not files:
        return None, {"series_uid": None, "reason": "no CT was chosen"}
    try:
        guide, info = read_series(files)
    except Refused as refusal:
        if required:
            raise Refused(f"guide-{refusal.code}", f"the CT cannot guide: {refusal.reason}", refusal.remedy,
                          study=refusal.study, series=refusal.series) from refusal
        return None, {"series_uid": refusal.series, "reason": f"not used: {refusal.reason}"}
    if info.frame_of_reference_uid != source.frame_of_reference_uid:
        raise Refused("guide-frame", "the CT has another frame of reference than the PET", "choose the CT of the PET",
                      study=source.study, series=source.series)
    digest = sha256("\n".join(sorted(info.sop_instance_uids)).encode()).hexdigest()
    return guide, {"series_uid": info.series, "reason": "read", "instances_sha256": digest}


def _resumable(method: str, preset: str, folder: Path | None, naming: Mapping[str, Any]) -> dict[str, Any]:
    """The argument `checkpoints` for a method that takes it."""
    if folder is None or (method, preset) not in deconv.RESUMABLE:
        return {}
    from deconv.checkpoint import Checkpoints

    version = str(naming.get("software_version", ""))
    return {"checkpoints": Checkpoints(folder, every_s=CHECKPOINT_S, version=version)}


def _deconvolve(compute: Callable[..., Computed], volume: Volume, source: SeriesInfo, guide: Volume | None, *,
                method: str, preset: str, **further: Any) -> Computed:
    try:
        return compute(volume, guide, method=method, preset=preset, **further)
    except (ValueError, ArithmeticError) as error:
        raise Refused("method", f"{method}, preset {preset}: {error}", "choose another method, preset or setting",
                      study=source.study, series=source.series) from error


def _here(volume: Volume, guide: Volume | None, *, method: str, preset: str, overrides: dict[str, Any], device: str,
          threads: int, on_step: OnStep | None, further: Mapping[str, Any]) -> Computed:
    """The deconvolution in this process."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    device = choose_device(device)
    door = deconv.method(method)
    result = door.deconvolve(volume, door.settings(preset, **overrides), guide=guide, device=device, on_step=on_step,
                             **further)
    return Computed(result, device, torch.get_num_threads(), str(torch.__version__))


def _derivation(made: Computed, source: SeriesInfo, guide: Mapping[str, Any], naming: Mapping[str, Any]) -> Derivation:
    """What the series carries. What decides the image, and what its values mean, decides the UIDs: kind of device and
    number of threads (they change the last bits), the instances of a guide that was used, Units that were assumed."""
    result = made.result
    settings = {**result.settings, "device": made.device.partition(":")[0], "threads": made.threads}
    if not source.first.get("Units"):
        settings["assumed_units"] = source.source_units
    if guide["used"]:
        settings["guide_instances_sha256"] = guide["instances_sha256"]
    width = None if result.kernel is None else kernel_fwhm_mm(result.kernel, result.kernel_spacing)
    return Derivation(
        method=result.method, preset=result.preset, settings=settings,
        kernel_fwhm_mm=None if width is None else (float(width[0]), float(width[1]), float(width[2])),
        region_box=_region_box(result), guide_series_uid=guide["series_uid"] if guide["used"] else None,
        **{**naming, "taken_series_numbers": frozenset(naming.get("taken_series_numbers", ()))},
    )


def _region_box(result: Deconvolution) -> str:
    """What alone was deblurred, source voxels; "" where that is the whole volume."""
    box = str(result.settings.get("region_box", ""))
    whole = ",".join(f"0-{n // 2}" for n in result.image.shape)
    return "" if box in ("", f"box:{whole}") else box


def _pass_gates(opened: Sequence[Gate], report: dict[str, Any], source: SeriesInfo) -> None:
    shut = [str(gate) for gate in opened if not gate.ok]
    if shut:
        raise Failing("gate", f"the result is not safe: {'; '.join(shut)}", "try another preset, method or setting",
                      report=_plain(report), study=source.study, series=source.series)


def _check(pet_files: Iterable[Path], derived: DerivedSeries, result: Deconvolution, source: SeriesInfo,
           report: dict[str, Any], folder: Path) -> None:
    """From the files alone, by other code than wrote them; what does not pass is removed."""
    checked = check_derived(list(pet_files), list(derived.files), kernel=result.kernel,
                            kernel_spacing=result.kernel_spacing)
    report["check"] = checked.to_json()
    if not checked.ok:
        shutil.rmtree(folder)
        raise Failing("check", "; ".join(item.message for item in checked.failures), "report it with source and log",
                      report=_plain(report), study=source.study, series=source.series)


def _looks(volume: Volume, result: Deconvolution, source: SeriesInfo, path: Path) -> dict[str, Any]:
    """What people look at, for the report. The series is whole and checked: no picture of it is worth losing it, so
    whatever goes wrong here is said, in the log and under "problem", and the series goes on without."""
    try:
        looks = make_looks(volume, result, source)
        save_looks(path, looks)
    except Exception as error:
        path.unlink(missing_ok=True)
        traceback.print_exc()
        problem = f"no pictures: {type(error).__name__}: {error}"[:500]
        sys.stderr.write(f"series {source.series}: {problem}\n")
        return {"problem": problem}
    return looks.measures


def _report(source: SeriesInfo, result: Deconvolution, guide: Mapping[str, Any], *, device: str,
            gates: Sequence[Gate]) -> dict[str, Any]:
    return {
        "source": {"study_uid": source.study, "series_uid": source.series, "slices": len(source.slices),
                   "unit": source.unit, "notes": list(source.notes)},
        "scanner": scanner_key(source.first).as_dict(),
        "guide": dict(guide), "method": result.method, "preset": result.preset, "settings": dict(result.settings),
        "device": device, "metrics": dict(result.metrics), "gates": [_plain(gate) for gate in gates],
    }


def _plain(value: Any) -> Any:
    """As JSON values: data classes as objects, numpy numbers as numbers, what is not finite as null."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


# --- the child process


class _Reporter:
    """Writes the lines that the executor reads; progress at most every PROGRESS_S, a new stage at once."""

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._out, self._clock = out, clock
        self._said_at, self._stage = -math.inf, ""

    def line(self, **message: Any) -> None:
        self._out.write(json.dumps(_plain(message)) + "\n")
        self._out.flush()

    def step(self, progress: Progress) -> None:
        if progress.stage != self._stage or self._clock() - self._said_at >= PROGRESS_S:
            self._said_at, self._stage = self._clock(), progress.stage
            self.line(kind="progress", **asdict(progress))


def _leave_at_end_of_input() -> None:
    """The parent holds our standard input open; when it closes, nobody waits for us any more."""
    while os.read(0, 4096):  # not sys.stdin: its lock would be held while the interpreter ends
        pass
    os._exit(1)


def _require_sound(digests: Mapping[str, str]) -> None:
    """Raises Refused where a file holds other bytes than were received: a wrong image would look like a right one."""
    flawed = []
    for name, digest in digests.items():
        try:
            why = "" if sha256_of(Path(name)) == digest else "its bytes are not those that were received"
        except (OSError, CannotUnderstand) as error:
            why = str(error)
        if why:
            flawed.append(f"{Path(name).stem}: {why}")
    if flawed:
        raise Refused("input-damaged", f"{len(flawed)} of {len(digests)} input objects are damaged: {flawed[0]}",
                      "send series and CT again: what is damaged is replaced, and the job goes on by itself")


def _work_off(order: Mapping[str, Any], folder: Path, reporter: _Reporter) -> None:
    _require_sound(order["digests"])
    outcome = process(
        [Path(name) for name in order["pet_files"]], [Path(name) for name in order["guide_files"]],
        folder / "derived.tmp", method=order["method"], preset=order["preset"], overrides=order["settings"],
        device=order["device"], threads=order["threads"], naming=order["derivation"],
        guide_required=order["guide_required"], now=datetime.fromtimestamp(order["now"], UTC).astimezone(),
        on_step=reporter.step, checkpoints=Path(order["checkpoints"]), cluster=_cluster(order),
        also=order.get("also", ()),
    )
    reporter.line(kind="built", report=outcome.report)


def _cluster(order: Mapping[str, Any]) -> Callable[..., Computed] | None:
    """Where the deconvolution runs, if not here. The task's name is drawn: it tells nothing and never repeats."""
    if not order.get("dask_scheduler"):
        return None
    return partial(deconvolve_on_cluster, order["dask_scheduler"], key=f"dicomnode-{uuid4().hex}")


def _tell_settings(method: str, preset: str, overrides: str) -> int:
    answer: dict[str, Any]
    try:
        answer = {"settings": full_settings(method, preset, json.loads(overrides))}
    except (ValueError, TypeError) as error:
        answer = {"refused": str(error)}
    sys.stdout.write(json.dumps(answer))
    return 0


def main(arguments: Sequence[str]) -> int:
    """Work off the order in the file named; 0 when a last word was said. `--settings`: see dicomnode.identity."""
    if arguments[0] == "--settings":
        return _tell_settings(*arguments[1:])
    tie_to_parent()
    die_first()
    reporter = _Reporter(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)  # what libraries print must not come between our lines
    threading.Thread(target=_leave_at_end_of_input, daemon=True).start()
    path = Path(arguments[0])
    order = json.loads(path.read_text(encoding="utf-8"))
    try:
        _work_off(order, path.parent, reporter)
    except Failing as refusal:
        reporter.line(kind="refused", code=refusal.code, reason=refusal.reason, remedy=refusal.remedy,
                      report=refusal.report)
    except Refused as refusal:
        reporter.line(kind="refused", code=refusal.code, reason=refusal.reason, remedy=refusal.remedy)
    except (ClusterUnavailable, WorkerLost) as gone:
        reporter.line(kind="lost", code=gone.code, reason=str(gone))
    except Exception as error:
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}"[:500]
        reporter.line(kind="failed", reason=text, code="memory" if isinstance(error, MemoryError) else trouble(text))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
