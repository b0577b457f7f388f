"""Small numbers from the host to the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sent(values: Any, device: torch.device) -> Tensor:
    """Numbers, nested in lists as for :func:`torch.tensor`, on ``device``; the host does not wait until they are there.

    A copy from pageable memory would wait for all that the device has still to do; this one is from pinned memory.
    """
    return torch.tensor(values, pin_memory=device.type == "cuda").to(device, non_blocking=True)
