"""How quickly the command line answers: `dicomnode --help`, `--version`, `jobs`; the best and the median of ten starts.

    python benchmarks/bench_start.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dicomnode.ledger import Ledger

STARTS = 10
LIMIT_S = 0.5  # for --help


def seconds(*arguments: str) -> list[float]:
    """Wall-clock seconds of each start."""
    found = []
    for _ in range(STARTS):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "dicomnode", *arguments], stdout=subprocess.DEVNULL, check=True)
        found.append(time.perf_counter() - begin)
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "node.toml"
        config.write_text(f'[node]\ndata_dir = "{folder}"\n', encoding="utf-8")
        Ledger(Path(folder) / "ledger.sqlite3").close()
        print("| command | best s | median s |\n|---|---|---|")
        for arguments in (("--help",), ("--version",), ("jobs", "--config", str(config))):
            times = seconds(*arguments)
            print(f"| `dicomnode {arguments[0]}` | {min(times):.3f} | {statistics.median(times):.3f} |")
            if arguments == ("--help",) and min(times) > LIMIT_S:
                sys.exit(f"--help takes {min(times):.2f} s, it must answer in {LIMIT_S} s")


if __name__ == "__main__":
    main()
