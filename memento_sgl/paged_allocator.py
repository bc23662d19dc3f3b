"""SGLang's paged slot allocator in plain PyTorch, for the CPU platform: upstream's needs Triton."""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator, alloc_extend_naive
from sglang.srt.utils import get_num_new_pages


class TorchPagedAllocator(PagedTokenToKVPoolAllocator):  # type: ignore[misc]
    """Slots of a row are consecutive inside each page; at page size 1 it only counts slots."""

    free_pages: torch.Tensor

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        """Slots for rows `[prefix_len, seq_len)` of each request; int64 `[extend_num_tokens]`.

        Args:
            last_loc: slot of the last row before them, -1 without one; int64 `[B]`.

        Returns:
            None when the pool has too few free pages.
        """
        needed = num_new_pages
        if needed is None:
            needed = get_num_new_pages(
                seq_lens=seq_lens_cpu, page_size=self.page_size, prefix_lens=prefix_lens_cpu
            )
        if needed > len(self.free_pages):
            return None
        slots = torch.empty(extend_num_tokens, dtype=torch.int64, device=self.device)
        alloc_extend_naive(
            prefix_lens,
            seq_lens,
            last_loc,
            self.free_pages,
            slots,
            self.page_size,
            self.device,
        )
        self.free_pages = self.free_pages[needed:]
        return slots

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """The slot of each request's row `seq_len - 1`; int64 `[B]`, None when pages run out."""
        opens = (seq_lens - 1) % self.page_size == 0
        needed = int(opens.sum())
        if needed > len(self.free_pages):
            return None
        slots = last_loc.to(torch.int64) + 1
        slots[opens] = self.free_pages[:needed] * self.page_size
        self.free_pages = self.free_pages[needed:]
        return slots
