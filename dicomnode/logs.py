"""Logs: a sentence for people, fields for machines. To standard error, as text or one JSON object a line.

Every record carries a stable `action`; fields hold UIDs, AE titles and addresses, never patient names.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, TextIO

import structlog

from dicomnode.config import Node

__all__ = ["configure", "get_logger"]


def configure(node: Node, *, stream: TextIO | None = None) -> None:
    """Set up logging of this process by node.log_level and node.log_json."""
    out = sys.stderr if stream is None else stream
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    renderer: Any = (structlog.processors.JSONRenderer(sort_keys=True) if node.log_json
                     else structlog.dev.ConsoleRenderer(colors=out.isatty()))
    level = getattr(logging, node.log_level.upper())
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(out),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer], foreign_pre_chain=shared))
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)
    # Port probes and broken objects make pynetdicom and pydicom write tracebacks and values; the node records them in
    # its own words.
    logging.captureWarnings(True)
    for name in ("pynetdicom", "pydicom", "py.warnings"):
        logging.getLogger(name).setLevel(logging.DEBUG if node.log_level == "debug" else logging.CRITICAL)


def get_logger(name: str) -> Any:
    """A structlog logger: log.info("sentence", action="stable_word", field=value)."""
    return structlog.get_logger(part=name)
