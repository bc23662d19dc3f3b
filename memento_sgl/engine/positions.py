"""Where a row's tokens stand in the text, on the device and in SGLang's counts.

offsets[slot]   tokens evicted from the request in `slot`: rope position = row index + offset
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from memento_sgl.engine.staging import staged


class Positions:
    """Offsets by request slot.

    Attributes:
        offsets: int64 `[request slots]`.
        evicting: false until the first eviction of the process, so that traffic without blocks
            pays nothing for positions.
    """

    def __init__(self) -> None:
        self.offsets = torch.empty(0)
        self.evicting = False

    def attach(self, table: torch.Tensor) -> None:
        """Bind to the request table, `[request slots, rows]`."""
        self.offsets = torch.zeros(table.shape[0], dtype=torch.int64, device=table.device)

    def set(self, slots: Sequence[int], evicted: Sequence[int]) -> None:
        """Tokens that are missing from the rows in `slots` from now on."""
        self.evicting = True
        where, what = staged([slots, evicted], self.offsets.device)
        self.offsets[where] = what

    def place(self, batch: Any) -> None:
        """After a prefill batch got its slots, which others may have had."""
        evicted = [req.memento.evicted for req in batch.reqs]
        if self.evicting or any(evicted):
            self.set([req.kv.req_pool_idx for req in batch.reqs], evicted)
            now = batch.orig_seq_lens
            batch.orig_seq_lens = staged(logical_lengths(batch.reqs), now.device, now.dtype)


def logical_lengths(reqs: Sequence[Any]) -> list[int]:
    """What SGLang's `orig_seq_lens` counts in a prefill: the whole prompt from the first chunk on,
    or everything up to the chunk's end where that is more."""
    return [max(req.extend_end + req.memento.evicted, len(req.origin_input_ids)) for req in reqs]
