"""What the commands share: options, the ledger of a configuration, and the two ways of answering (people, programs)."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from dicomnode.config import Config
    from dicomnode.ledger import Ledger

__all__ = ["ConfigOption", "JsonOption", "console", "gigabytes", "open_ledger", "print_json"]

ConfigOption = Annotated[Path, typer.Option(
    "--config", "-c", envvar="DICOMNODE_CONFIG", show_default=True, help="The node's configuration (TOML).")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
DEFAULT_CONFIG = Path("/etc/dicomnode/dicomnode.toml")


@contextmanager
def open_ledger(config_path: Path) -> Iterator[tuple[Config, Ledger]]:
    """The configuration and its ledger.

    Raises ConfigError, LedgerCorrupt, NotFound where the node never ran, NodeError where another user may not look.
    """
    from dicomnode.config import load
    from dicomnode.errors import NodeError, NotFound
    from dicomnode.ledger import Ledger

    config = load(config_path)
    path = config.node.data_dir / "ledger.sqlite3"
    try:
        there = path.is_file()
    except PermissionError as error:
        raise NodeError(f"no permission to look into {config.node.data_dir}. Remedy: run it as the user of the node "
                        "(sudo -u dicomnode).") from error
    if not there:
        raise NotFound(f"no ledger in {config.node.data_dir}: this node never ran. Remedy: `dicomnode serve`.")
    with Ledger(path) as ledger:
        yield config, ledger


def gigabytes(text: str) -> float:
    """10^9 bytes in "8GB", "512MB" or "8". Raises ConfigError for anything else."""
    from dicomnode.errors import ConfigError

    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(MB|GB|TB|)\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"--memory takes a size such as 8GB or 512MB, got {text!r}")
    return float(match[1]) * {"MB": 1e-3, "GB": 1.0, "TB": 1e3, "": 1.0}[match[2].upper()]


def print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")


def console(*, err: bool = False) -> Console:
    """For people: tables and progress bars; colours only on a terminal."""
    from rich.console import Console

    return Console(stderr=err, highlight=False)
