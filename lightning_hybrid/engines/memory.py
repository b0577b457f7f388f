"""Who holds how much memory of the device, how much was held at most, and what an allocation that failed asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from lightning_hybrid.engines.belongings import Belonging
from lightning_hybrid.engines.sleep import storages

MIB = 2**20
_PROCESS = Path("/proc/self")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "PiB": 2**50}
_ASKED_FOR = re.compile(rf"(?:tried|unable) to allocate ([\d.]+) ({'|'.join(_UNITS)})", re.IGNORECASE)
# How torch says it on a CPU, where it has no type of its own, and how C++, cuBLAS and vLLM do.
_SAID = (
    "DefaultCPUAllocator: can't allocate memory",
    "std::bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA Error: out of memory",  # vLLM's own allocator
)


def resident_bytes(belongings: Sequence[Belonging], device: torch.device) -> dict[str, int]:
    """Bytes on the device by owner, such as ``actor/weights``; storages that several share count once, for the first.

    What sleeps, or is held by the host for a CUDA device, counts 0.
    """
    seen: set[int] = set()
    found = dict.fromkeys((belonging.owner for belonging in belongings), 0)
    for belonging in belongings:
        for storage in storages(belonging.tensors(), device):
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                found[belonging.owner] += storage.nbytes()
    return found


class PeakMemory:
    """The most memory that was in use since :meth:`start`.

    On CUDA what torch allocated; on a CPU the resident memory of the process, as Linux keeps count of it. Where the
    count cannot be reset (another system, a locked container) it is the resident memory at the end.

    Args:
        device: whose memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._counts = False

    def start(self) -> None:
        """Begin anew with what is in use now."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            (_PROCESS / "clear_refs").write_text("5")
            self._counts = True
        except OSError:
            self._counts = False

    def bytes(self) -> int:
        """The most since :meth:`start`."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self._counts:
            with (_PROCESS / "status").open() as lines:
                return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
        import psutil

        return int(psutil.Process().memory_info().rss)


def out_of_memory_in(error: BaseException) -> BaseException | None:
    """The failed allocation that ``error`` is, or was raised from; None if it is about something else."""
    cause: BaseException | None = error
    while cause is not None:
        if _is_out_of_memory(cause):
            return cause
        cause = cause.__cause__
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)


def requested_bytes(error: BaseException) -> int | None:
    """Bytes that a failed allocation asked for, where its message says so."""
    found = _ASKED_FOR.search(str(error))
    if found is None:
        return None
    units = {name.lower(): size for name, size in _UNITS.items()}
    return int(float(found[1]) * units[found[2].lower()])


def readable(size: int) -> str:
    """A number of bytes as people write it."""
    for unit, bytes_ in reversed(_UNITS.items()):
        if size >= bytes_ > 1:
            return f"{size / bytes_:.1f} {unit}"
    return f"{size} bytes"
