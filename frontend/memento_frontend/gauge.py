"""KV tokens of one request while it runs, from the events of its stream."""

from __future__ import annotations

from dataclasses import dataclass, field

from memento_frontend import events as e


@dataclass
class KvGauge:
    """KV tokens held now, their peak, and what would be held without eviction.

    Counts are the server's own at the end of a stream with a record (`exact`). Until then they
    follow the usage that chunks tell, and an eviction of unknown size is taken from the usage
    around its block: off by a few tokens. None: the server does not count.
    """

    now: int | None = None
    peak: int | None = None
    without: int | None = None
    exact: bool = False
    _evicted: int = 0
    _counted: int = 0  # output tokens
    _opened: int = 0
    _sizes: dict[int, int] = field(default_factory=dict)  # about, of finished blocks

    def count(self, prompt_tokens: int | None, output_tokens: int | None) -> None:
        """Take the usage of the newest chunk."""
        if prompt_tokens is None or output_tokens is None:
            return
        self._counted = output_tokens
        self.without = prompt_tokens + output_tokens
        self.now = self.without - self._evicted
        self.peak = max(self.peak or 0, self.now)

    def add(self, event: e.Event) -> None:
        """Take an event of the newest chunk."""
        match event:
            case e.BlockOpened():
                self._opened = self._counted
            case e.BlockClosed():
                self._sizes[event.number] = max(0, self._counted - self._opened - 1)
            case e.BlockEvicted():
                self._evict(event)
            case e.Done(accounting=dict() as record):
                self.now, self.peak = record["final_kv_tokens"], record["peak_kv_tokens"]
                self.without = record["peak_kv_tokens_without"]
                self.exact = True

    def _evict(self, event: e.BlockEvicted) -> None:
        size = event.tokens
        if size is None:
            size = self._sizes.get(event.number, 0)
        self._evicted += size
        if self.now is not None:
            self.now -= size
