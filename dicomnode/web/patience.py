"""How long we wait for a client: connections that ask nothing, ask slowly or do not take their answer are ended.

The server takes a bounded number of connections. Without this, whoever holds them open without a word keeps everybody
else out for as long as they like.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import h11

__all__ = ["Patience"]


class Patience:
    """Looks at the connections of a server (uvicorn's H11Protocol) again and again.

    request_s   from the connection, or the answer before, to the end of a request's head; as long again for its body.
    answer_s    for the client to take an answer that is ready.   monotonic   seconds that only grow.
    """

    def __init__(self, *, request_s: float = 20.0, answer_s: float = 120.0,
                 monotonic: Callable[[], float] = time.monotonic) -> None:
        self._limits = {"asks": request_s, "takes": answer_s}
        self._monotonic = monotonic
        self._since: dict[Any, tuple[Any, float]] = {}

    def look(self, connections: Iterable[Any]) -> int:
        """End those whose client took too long; how many. What is being computed here is not the client's delay."""
        now, before, ended = self._monotonic(), self._since, 0
        self._since = {}
        for one in tuple(connections):
            doing = _doing(one)
            if doing is None:
                continue
            step = doing, one.cycle
            known, since = before.get(one, (None, now))
            since = since if known == step else now
            if now - since > self._limits[doing]:
                one.transport.abort()
                ended += 1
            else:
                self._since[one] = step, since
        return ended


def _doing(one: Any) -> str | None:
    """What we wait for: "asks", "takes"; None: nothing, the answer is being made."""
    if one.transport.get_write_buffer_size():
        return "takes"
    return "asks" if one.conn.their_state in (h11.IDLE, h11.SEND_BODY) else None
