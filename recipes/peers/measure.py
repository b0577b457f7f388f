"""Clock, memory, and the bandwidth that decoding is bound by."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_SELF = Path("/proc/self")
_EVERY = 0.005  # seconds


def now() -> float:
    """Seconds, after the device has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class PeakMemory:
    """Memory that a block took at its peak over what was held before it, in :attr:`bytes`.

    On CUDA what PyTorch allocated; on a CPU the growth of the resident set, as Linux keeps it. None elsewhere.
    """

    bytes: int | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Measure a block; the largest of several counts."""
        before = _reset_peak()
        yield
        grown = None if before is None else max(0, _peak() - before)
        if grown is not None:
            self.bytes = max(grown, self.bytes or 0)


class Resident:
    """Memory of this process, or of its CUDA device, in each of the phases that follow each other, at most.

    On a CPU the resident set; on CUDA what the driver has given out, to whomever: PyTorch's own figures leave out what
    vLLM allocates, and count it while it sleeps. It is looked at every few milliseconds.

    Attributes:
        bytes: by phase.
    """

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}
        self._phase: str | None = None
        self._done = threading.Event()

    @staticmethod
    def now() -> int:
        """Bytes at this moment."""
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            return total - free
        return int((_SELF / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def enter(self, phase: str | None) -> None:
        """Begin a phase, or none; what an earlier one has freed does not count in it."""
        self._phase = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        else:
            ctypes.CDLL(None).malloc_trim(0)
        self._phase = phase

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Look, while the block runs."""
        thread = threading.Thread(target=self._look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()

    def _look(self) -> None:
        while not self._done.wait(_EVERY):
            size, phase = self.now(), self._phase
            if phase is not None:
                self.bytes[phase] = max(size, self.bytes.get(phase, 0))


def _reset_peak() -> int | None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what an earlier peer freed must not hide what this one takes
        (_SELF / "clear_refs").write_text("5")  # the peak starts again from what is resident now
    except (OSError, AttributeError):
        return None
    return _peak()


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    lines = (_SELF / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written together, of copying half a GiB: the best of several runs."""
    source = torch.zeros(2**29, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(10):
        begin = now()
        target.copy_(source)
        seconds.append(now() - begin)
    return 2 * source.numel() / min(seconds)


def bytes_to_read(model: Any, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> int:
    """The least that decoding these responses must read: per step all weights once, and K and V of the live rows.

    Args:
        model: a causal LM.
        prompts: token ids.
        responses: sampled ids; a row lives for as many steps as it has tokens.
    """
    lengths = [len(response) for response in responses]
    positions = sum(n * len(prompt) + n * (n - 1) // 2 for prompt, n in zip(prompts, lengths, strict=True))
    return max(lengths) * _weight_bytes_per_step(model) + positions * cache_bytes_per_token(model)


def _weight_bytes_per_step(model: Any) -> int:
    """All parameters, except an embedding that is not also the output head: of that, a step reads a few rows."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    return int(total if embedding is head else total - embedding.numel() * embedding.element_size())


def cache_bytes_per_token(model: Any) -> int:
    """Keys and values of a token in all layers."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * model.dtype.itemsize)
