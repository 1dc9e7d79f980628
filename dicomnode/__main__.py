"""`dicomnode` and `python -m dicomnode`: the command line."""

from __future__ import annotations

import os


def main() -> None:
    """Run the command line and leave with one of `errors.Exit`."""
    # Before torch loads, for us and every child: a thread that waits for another one sleeps. Spinning, the default, is
    # ten times slower as soon as anything else uses one of the cores (docs/benchmarks.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the same bits again on CUDA
    from dicomnode.cli import app

    app()


if __name__ == "__main__":
    main()
