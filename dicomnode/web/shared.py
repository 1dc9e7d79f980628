"""A value that viewers share: computed once for all who look within a second, for it costs a good part of a core."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any

__all__ = ["Shared"]

KEPT_S = 1.0  # pages that follow by themselves look every 3 s


class Shared:
    """The newest value. Threads may share it; while one computes, the others wait for what it finds."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._kept: tuple[float, Hashable, Any] | None = None

    def get(self, make: Callable[[], Any], *, now: float, stamp: Hashable) -> Any:
        """The value of less than KEPT_S ago made under the same `stamp`, else what `make` gives. Do not change it."""
        with self._lock:
            kept = self._kept
            if kept is not None and abs(now - kept[0]) < KEPT_S and kept[1] == stamp:
                return kept[2]
            value = make()
            self._kept = now, stamp, value
            return value
