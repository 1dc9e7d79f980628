"""Hostile files and hostile byte streams, seeded: every one gets a reason or is kept as it came; the node goes on.

    python scripts/fuzz.py [--files 10000] [--streams 10000] [--seed 1]

Files run through reception and through reading in this process, which may not take more than 4 GiB; streams go to a
receiver process of their own. Prints what came of them; exit status 1 where anything failed.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.fuzzrun import Report, fuzz_files, fuzz_streams
from tests.peers import ReceiverProcess

MEMORY_BYTES = 4 * 2**30
# What a case may take, on a busy machine; streams are bounded by the receiver's time-outs.
FILE_S, GROWTH_MB = 20.0, 300.0
RECEPTION = "low_disk_mb = 1\nnetwork_timeout_s = 2\nacse_timeout_s = 2\ndimse_timeout_s = 10"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    os.environ["RUST_BACKTRACE"] = "0"
    warnings.simplefilter("ignore")  # the readers warn of what was mutated
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.streams:
            began = time.perf_counter()
            with ReceiverProcess(folder / "node", reception=RECEPTION) as receiver:
                report = fuzz_streams(arguments.streams, receiver, seed=arguments.seed)
            failed |= _tell("streams", report, time.perf_counter() - began)
        if arguments.files:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
            began = time.perf_counter()
            report = fuzz_files(arguments.files, seed=arguments.seed, folder=folder)
            if report.slowest_s > FILE_S:
                report.failures.append(f"{report.slowest} took {report.slowest_s:.1f} s, allowed are {FILE_S:g} s")
            failed |= _tell("files", report, time.perf_counter() - began)
    return int(failed)


def _tell(what: str, report: Report, seconds: float) -> bool:
    if report.memory_mb > GROWTH_MB:
        report.failures.append(f"memory grew by {report.memory_mb:.0f} MB, allowed are {GROWTH_MB:g} MB")
    print(f"{report.cases} {what} in {seconds:.0f} s; slowest {report.slowest_s:.2f} s ({report.slowest}); "
          f"memory grew by {report.memory_mb:.0f} MB; {len(report.failures)} failures")
    for outcome, count in report.outcomes.most_common():
        print(f"  {count:6d}  {outcome}")
    for failure in report.failures[:20]:
        print(failure)
    return bool(report.failures)


if __name__ == "__main__":
    sys.exit(main())
