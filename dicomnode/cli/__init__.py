"""The command line: a door, no logic. Each command loads what it needs when it runs, so that `--help` is quick."""

from dicomnode.cli.app import app

__all__ = ["app"]
