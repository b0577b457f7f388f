"""What passes drew, on its way from the device to the host, which may be a few passes behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_hybrid.generation.slots import Slots

if TYPE_CHECKING:
    from lightning_hybrid.generation.loop import Response


@dataclass(frozen=True)
class Report:
    """What one pass drew.

    Attributes:
        responses: for which it drew, as their slots were then; they may have moved since.
        begin: the slot of the first.
        told: tokens and statuses ``[2, slots]`` on the host, not there before ``landed``.
        landed: passed once they are; None if they are at once.
    """

    responses: list[Response]
    begin: int
    told: Tensor
    landed: torch.cuda.Event | None

    def read(self) -> tuple[list[int], list[int]]:
        """Token and status of each response; waits for the pass if it is still running."""
        if self.landed is not None:
            self.landed.synchronize()
        tokens, statuses = self.told[:, self.begin : self.begin + len(self.responses)].tolist()
        return tokens, statuses


class Reports:
    """Reports on their way, oldest first.

    Args:
        slots: whose tokens and statuses are reported.
        lag: reports that may be on their way when another is sent.
    """

    def __init__(self, slots: Slots, lag: int) -> None:
        self.slots = slots
        self.on_cuda = slots.state.device.type == "cuda"
        told = slots.told
        pages = range(lag + 1)
        self.pages = [torch.empty(told.shape, dtype=told.dtype, pin_memory=self.on_cuda) for _ in pages]
        self.on_the_way: deque[Report] = deque()
        self.sent = 0

    def __len__(self) -> int:
        return len(self.on_the_way)

    def send(self, begin: int, responses: list[Response]) -> None:
        """Send what the pass launched last draws for ``responses``, in the slots from ``begin`` on."""
        page = self.pages[self.sent % len(self.pages)]
        page.copy_(self.slots.told, non_blocking=True)
        landed = None
        if self.on_cuda:
            landed = torch.cuda.Event()
            landed.record()
        self.on_the_way.append(Report(responses, begin, page, landed))
        self.sent += 1

    def due(self, behind: int) -> Iterator[Report]:
        """Take reports until no more than ``behind`` are on their way."""
        while len(self.on_the_way) > behind:
            yield self.on_the_way.popleft()
