"""Events to one log line each, for `--memento-debug`."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

from memento_sgl.observe.sink import Event, Sink

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memento_sgl.observe.watch import Watch

logger = logging.getLogger(__name__)


class DebugSink(Sink):
    """Logs what happens as it happens."""

    at_once = True

    def follow(self, watch: Watch) -> DebugLines:
        return DebugLines(watch.rid)


class DebugLines:
    """The lines of one request."""

    def __init__(self, rid: str) -> None:
        self._rid = plain(rid)

    def event(self, event: Event) -> None:
        if event.kind == "place":
            return
        fields = {"index": event.logical, "row": event.row}
        if event.tokens is not None:
            fields["tokens"] = event.tokens
        if (eviction := event.eviction) is not None:
            offset = event.logical - event.row
            fields |= {
                "start": eviction.start,
                "end": eviction.end,
                "resume": eviction.resume,
                "row_start": eviction.start - offset + eviction.tokens,
                "offset": offset,
            }
        text = " ".join(f"{name}={value}" for name, value in fields.items())
        logger.info("memento event=%s rid=%s %s", event.kind, self._rid, text)

    def finished(self, req: Any, record: Mapping[str, Any]) -> None:
        """The accounting says it to everybody."""


def plain(rid: str) -> str:
    """A request id that cannot break a line of `key=value` fields."""
    return rid if re.fullmatch(r"[\w.:/-]{1,128}", rid, re.ASCII) else repr(rid[:128])
