"""Runs decode steps: as they are, or from CUDA graphs of a few sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from lightning_hybrid.containers import Decoder
from lightning_hybrid.containers.attention import kernel_serves
from lightning_hybrid.generation.step import Step


class Steps(Protocol):
    """Runs steps.

    Attributes:
        step: which.
    """

    step: Step

    def __call__(self, rows: int, bounds: list[int]) -> None:
        """One more token in slots ``0 … rows - 1``; the other arguments are those of :meth:`Step.advance`."""
        ...


class PlainSteps:
    """Runs steps as they are, for exactly the live rows."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def __call__(self, rows: int, bounds: list[int]) -> None:
        """One more token in slots ``0 … rows - 1``."""
        self.step.advance(rows, bounds)


class GraphSteps:
    """Replays steps from CUDA graphs, each for the smallest size of a ladder that holds the live rows.

    Launching a step's kernels one by one takes longer than running them; a graph is one launch. The first step of a
    size runs as it is: it counts, and it compiles kernels and sets up libraries, which a capture may not. The second
    one is captured, the others are replays. Slots beyond the live rows are free and take no harm.

    Args:
        step: which.
        studio: where graphs are captured.
    """

    def __init__(self, step: Step, studio: Studio) -> None:
        self.step, self.studio = step, studio
        self.sizes = ladder(step.cache.slots)
        self.ran: set[int] = set()
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def __call__(self, rows: int, bounds: list[int]) -> None:
        """One more token in slots ``0 … rows - 1``."""
        size = rung(self.sizes, rows)
        if size not in self.ran:
            self.ran.add(size)
            self.studio.rehearse(lambda: self.step.advance(size, bounds))
            return
        if size not in self.graphs:
            self.graphs[size] = self.studio.capture(lambda: self.step.advance(size, bounds))
        self.graphs[size].replay()


class Studio:
    """Where graphs are captured: one stream, and memory that they share, since no two of them ever run at once."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.memory = torch.cuda.graph_pool_handle()

    def rehearse(self, play: Callable[[], None]) -> None:
        """Run ``play`` on the stream on which it will be captured: libraries keep memory for each stream."""
        present = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(present)
        with torch.cuda.stream(self.stream):
            play()
        present.wait_stream(self.stream)

    def capture(self, play: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """A graph of what ``play`` launches; nothing of it runs yet."""
        graph = torch.cuda.CUDAGraph()
        # Other threads (a data loader that pins memory, NCCL's watchdog) go on with what they do.
        with torch.cuda.graph(graph, pool=self.memory, stream=self.stream, capture_error_mode="thread_local"):
            play()
        return graph


def graphs_serve(decoder: Decoder) -> bool:
    """Whether a decoder's steps can be captured: our kernel attends, and no weights or sums are fetched in between."""
    return kernel_serves(decoder.device, decoder.dtype) and decoder.weights.steady and decoder.shard.size == 1


def ladder(slots: int) -> list[int]:
    """Sizes for which graphs are captured: 4, 8, 16, 24, 32, 48, 64, 96, 128, … and all ``slots``.

    A graph of at most half as many rows again as are alive costs little; one for each number of rows would take long
    to capture. Below 4 rows projections are padded to 4 anyway.
    """
    sizes, power = [4, 8], 16
    while power < slots:
        sizes += [power, power * 3 // 2]
        power *= 2
    return [size for size in sizes if size < slots] + [slots]


def rung(sizes: list[int], rows: int) -> int:
    """The smallest of ``sizes`` (rising) that holds ``rows``."""
    return next(size for size in sizes if size >= rows)
