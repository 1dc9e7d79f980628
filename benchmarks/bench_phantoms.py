"""Every method on phantoms with known truth: `dicomnode evaluate` under the name of a benchmark; same options.

    python benchmarks/bench_phantoms.py [--suite design] [--methods tv,cubic] [--paper-fraction 0.1] [--out DIR]

docs/evaluation.md says what is measured. Without --out the folder is a new one: nothing is taken from earlier runs.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dicomnode.__main__ import main

if __name__ == "__main__":
    if not any(argument.split("=")[0] in ("--out", "--help", "-h") for argument in sys.argv[1:]):
        sys.argv += ["--out", tempfile.mkdtemp(prefix="evaluation-")]
    sys.argv.insert(1, "evaluate")
    main()
