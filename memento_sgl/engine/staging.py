"""Host values on their way to the device, without making the scheduler wait for it."""

from __future__ import annotations

from typing import Any

import torch


def staged(
    values: Any, device: torch.device | str, dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    """A list, nested list or numpy array of numbers as a tensor on `device`.

    From pageable memory a copy to a GPU waits until the GPU has taken it, which is after the step
    in flight. From pinned memory it is put in line on the current stream.
    """
    host = torch.as_tensor(values, dtype=dtype)
    if torch.device(device).type == "cpu":
        return host
    pinned = _pins(device)
    return (host.pin_memory() if pinned else host).to(device, non_blocking=pinned)


def _pins(device: torch.device | str) -> bool:
    from sglang.srt.utils import is_pin_memory_available

    return bool(is_pin_memory_available(torch.device(device).type))
