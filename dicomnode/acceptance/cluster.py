"""The Dask cluster, where jobs run on one: does the scheduler answer, and does a worker offer what a job asks for?"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from dicomnode.acceptance.finding import Finding
from dicomnode.config import Config

__all__ = ["reachable"]

CONNECT_S = 5.0


def reachable(config: Config) -> Iterator[Finding]:
    """Asks the scheduler who its workers are; submits nothing."""
    if config.work.executor != "dask":
        return
    scheduler = config.work.dask_scheduler
    try:
        import distributed  # noqa: F401 - an extra: its absence is a finding of its own
    except ImportError:
        return
    try:
        workers = asyncio.run(_workers(scheduler))
    except (OSError, ValueError, TypeError, TimeoutError) as error:
        yield Finding("cluster", "problem", f"the Dask scheduler {scheduler} does not answer: "
                      f"{error or type(error).__name__}", "start it, or correct work.dask_scheduler")
        return
    counts = {kind: sum(bool(worker.get("resources", {}).get(kind)) for worker in workers.values())
              for kind in ("GPU", "CPU")}
    shown = f"{scheduler}: {len(workers)} workers, {counts['GPU']} offer GPU, {counts['CPU']} CPU"
    wanted = {"cuda": ("GPU",), "cpu": ("CPU",)}.get(config.work.device.partition(":")[0], ("GPU", "CPU"))
    if not any(counts[kind] for kind in wanted):
        yield Finding("cluster", "problem", shown, f"start workers with --nthreads 1 --resources \"{wanted[0]}=1\"")
    else:
        yield Finding("cluster", "ok", shown)


async def _workers(scheduler: str) -> dict[str, Any]:
    from distributed.core import rpc

    async with rpc(scheduler, timeout=CONNECT_S) as remote:
        answer = await asyncio.wait_for(remote.identity(), CONNECT_S)
    return dict(answer["workers"])
