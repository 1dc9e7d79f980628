"""Is everything ready to run? Each finding says what was looked at, the verdict and the remedy.

`dicomnode check` before the first start, after a change of the configuration, and whenever something is wrong: it
sends no object to anybody. `dicomnode check --peers` is the acceptance test of an installation: it stores a phantom at
every destination, has it confirmed as the configuration says, and queries every source.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dicomnode.acceptance import cluster, here, peers, private
from dicomnode.acceptance.finding import Finding, Verdict, exit_code
from dicomnode.config import Config, load
from dicomnode.errors import ConfigError, Exit

__all__ = ["Finding", "Verdict", "check", "exit_code"]


def check(config_path: Path, *, now: float, with_peers: bool = False) -> list[Finding]:
    """Everything, in the order in which it should be mended.

    Writes nothing but a probe file in the data directory; `with_peers`: and a phantom instance to each destination.
    """
    try:
        config = load(config_path)
    except ConfigError as error:
        return [Finding("configuration", "problem", str(error), exit_code=Exit.USAGE)]
    found = [Finding("configuration", "ok",
                     f"{config_path}: peers: {len(config.peer)}, routes: {len(config.route)}")]
    if not config.route:
        found.append(Finding("routes", "warning", "no [[route]]: everything is kept, nothing is processed",
                             "add a [[route]]"))
    return [*found, *_all(config, now, with_peers)]


def _all(config: Config, now: float, with_peers: bool) -> Iterator[Finding]:
    yield from here.data_dir(config)
    yield from private.files(config)
    yield from private.certificates(config, now=now)
    yield from here.port(config)
    yield from peers.reachable(config)
    if with_peers:
        yield from peers.accepted(config)
    yield from here.clock(now)
    if with_peers:
        yield from here.clock_is_kept()
    yield from here.time_zone(config, now)
    yield from here.packages(config)
    yield from here.devices(config)
    yield from cluster.reachable(config)
    yield from here.methods(config)
