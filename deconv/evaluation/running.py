"""The loop: every method on every case, each run kept as soon as it is done."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import deconv
from deconv.evaluation.cases import Case, chosen_cases
from deconv.evaluation.measures import Truth, figures
from deconv.evaluation.methods import PAPER, VARIANTS, Variant, chosen_methods
from deconv.evaluation.rows import Arrays, Row, Store, key_of, rulers_digest
from deconv.result import OnStep

__all__ = ["Evaluation", "PeakMemory", "Plan", "evaluate", "machine", "plan_of", "threads"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to run.

    methods         labels of `methods.VARIANTS`.
    seeds           of the methods; one that draws nothing runs at the first only.
    paper_fraction  part of the published schedule that `paper` runs, in (0, 1]; its label says so.
    threads         of torch.
    fresh           run everything again, whatever was kept.
    """

    cases: tuple[Case, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    paper_fraction: float = 1.0
    device: str = "cpu"
    threads: int = 1
    fresh: bool = False

    def __post_init__(self) -> None:
        if not self.cases or not self.methods or not self.seeds:
            raise ValueError("a benchmark needs at least one case, one method and one seed")
        if unknown := sorted(set(self.methods) - set(VARIANTS)):
            raise ValueError(f"no method {', '.join(unknown)}; methods are {'; '.join(VARIANTS)}")
        if not 0 < self.paper_fraction <= 1:
            raise ValueError(f"paper_fraction must lie in (0, 1], got {self.paper_fraction}")

    def label(self, variant: Variant) -> str:
        """The variant's label; a shortened schedule is stated."""
        if variant.preset != "paper" or self.paper_fraction == 1:
            return variant.label
        return f"{variant.label} ({100 * self.paper_fraction:.3g} % of its schedule)"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What came out: rows in the order of the plan, and where their arrays lie.

    skipped  what could not be run, a sentence each.
    """

    plan: Plan
    rows: tuple[Row, ...]
    store: Store
    machine: Mapping[str, Any]
    skipped: tuple[str, ...] = field(default=())


def plan_of(
    *, suites: Sequence[str] = ("design",), phantoms: Sequence[str] = (), methods: Sequence[str] = (),
    seeds: Sequence[str | int] = (0,), paper_fraction: float | None = None, device: str = "cpu", threads: int = 1,
    fresh: bool = False,
) -> Plan:
    """The plan from names as a person types them. `paper` is in it where it is named or its fraction is given.

    Raises ValueError, listing what exists, for a name that fits nothing or a seed that is no whole number.
    """
    if wrong := [seed for seed in seeds if not str(seed).isdecimal()]:
        raise ValueError(f"seeds are whole numbers, got {', '.join(map(str, wrong))}")
    labels = chosen_methods(methods)
    if paper_fraction is not None and PAPER not in labels:
        labels = chosen_methods([*labels, PAPER])
    return Plan(chosen_cases(suites, phantoms), labels, tuple(dict.fromkeys(int(seed) for seed in seeds)),
                1.0 if paper_fraction is None else paper_fraction, device, threads, fresh)


def evaluate(plan: Plan, store: Store, *, say: Say = lambda line: None, on_step: OnStep | None = None) -> Evaluation:
    """Run what is not in `store` yet, and return everything the plan asks for.

    say      called with one line of text for every run.
    on_step  handed to every method; what it raises (Cancelled) passes. All rows until then are kept.
    A method that fails on a case gives a row that says why and is tried again the next time.
    """
    variants = [VARIANTS[label] for label in plan.methods]
    skipped = [f"{v.label} is left out: this version has no preset {v.preset!r} of {v.method}"
               for v in variants if not v.exists]
    for line in skipped:
        say(line)
    jobs = [(v, seed) for v in variants if v.exists for seed in (plan.seeds if v.seeded else plan.seeds[:1])]
    rows: list[Row] = []
    with threads(plan.threads):
        for number, case in enumerate(plan.cases):
            truth = Truth.of(case)
            for i, (variant, seed) in enumerate(jobs):
                row, kept = _row(plan, truth, variant, seed, store, on_step)
                rows.append(row)
                say(f"[{number * len(jobs) + i + 1}/{len(plan.cases) * len(jobs)}] {_line(row, kept)}")
    return Evaluation(plan, tuple(rows), store, machine(plan), tuple(skipped))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch on `count` threads; afterwards on as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine(plan: Plan) -> dict[str, Any]:
    """The machine that times were measured on."""
    name = platform.processor() or platform.machine()
    if plan.device.startswith("cuda"):
        name += f", {torch.cuda.get_device_name(plan.device)}"
    return {"processor": name, "cores": os.cpu_count(), "threads": plan.threads, "device": plan.device,
            "python": platform.python_version(), "torch": torch.__version__}


class PeakMemory:
    """By how much this process's resident memory rises above what it holds at `start`, in MB.

    On Linux freed memory is handed back and the high-water mark set back first (malloc_trim, /proc/self/clear_refs),
    so that each run counts for itself; elsewhere only what lies above the process's highest ever is seen. `how` tells.
    """

    def __init__(self) -> None:
        self._proc = Path("/proc/self/clear_refs").exists()
        self.how = "VmHWM, set back before the run" if self._proc else "growth of ru_maxrss"
        self._before = 0.0

    def start(self) -> None:
        """Set the mark back."""
        if self._proc:
            gc.collect()
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; other C libraries keep little
            if trim is not None:
                trim(0)
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._before = self._now()

    def mb(self) -> float:
        """The rise since `start`."""
        return max(self._now() - self._before, 0.0)

    def _now(self) -> float:
        if self._proc:
            lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
            return float(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024 / 1e6
        unit = 1.0 if sys.platform == "darwin" else 1024.0
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _row(
    plan: Plan, truth: Truth, variant: Variant, seed: int, store: Store, on_step: OnStep | None
) -> tuple[Row, bool]:
    """The row, and whether it was kept from before."""
    settings = variant.settings(truth.case, seed, plan.paper_fraction)
    key = key_of(truth.case.plain(), truth.phantom.measured.array, variant.method, variant.preset, asdict(settings),
                 plan.device)
    kept = None if plan.fresh else _kept(plan, truth, variant, key, store)
    if kept is not None:
        return kept, True
    row = Row(key, truth.case.plain(), truth.case.label, plan.label(variant), variant.label, seed, device=plan.device,
              threads=plan.threads)
    try:
        row, arrays = _run(row, truth, variant, settings, on_step)
    except (ValueError, ArithmeticError, MemoryError, RuntimeError) as error:  # one failure ends no night's benchmark
        return replace(row, failed=f"{type(error).__name__}: {error}"), False
    store.add(row, arrays)
    return row, False


def _kept(plan: Plan, truth: Truth, variant: Variant, key: str, store: Store) -> Row | None:
    """The row of that key, measured anew where the rulers have changed since; None where it cannot be had."""
    row = store.get(key)
    if row is None:
        return None
    if row.rulers != rulers_digest():
        arrays = store.arrays(key)
        if arrays is None:
            return None  # it came without its image: only a new run can tell
        found = figures(truth, arrays.image, arrays.kernel, arrays.uncertainty, row.own)
        row = store.remeasured(row, found, rulers_digest())
    return replace(row, method=plan.label(variant), case_label=truth.case.label)


def _run(
    row: Row, truth: Truth, variant: Variant, settings: Any, on_step: OnStep | None
) -> tuple[Row, Arrays]:
    phantom, memory = truth.phantom, PeakMemory()
    method = deconv.method(variant.method)
    memory.start()
    wall, cpu = time.perf_counter(), time.process_time()
    result = method.deconvolve(phantom.measured, settings, guide=phantom.ct, device=row.device, on_step=on_step)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak = memory.mb()
    sd = None if result.uncertainty is None else result.uncertainty.array
    arrays = Arrays(result.image.array, result.kernel, sd)
    own = {name: float(value) for name, value in result.metrics.items()}
    return replace(
        row, settings=dict(result.settings), cpu_seconds=cpu, wall_seconds=wall, peak_mb=peak, peak_how=memory.how,
        own=own, figures=figures(truth, arrays.image, arrays.kernel, arrays.uncertainty, own), rulers=rulers_digest(),
    ), arrays


def _line(row: Row, kept: bool) -> str:
    name = f"{row.case_label} · {row.method}, seed {row.seed}"
    if row.failed:
        return f"{name}: failed: {row.failed}"
    when = "kept" if kept else f"{row.cpu_seconds:.1f} CPU s, {row.peak_mb:.0f} MB"
    return f"{name}: NRMSE {row.figures['nrmse']:.3f} ({when})"
