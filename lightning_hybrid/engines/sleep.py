"""Takes the memory of tensors away while nobody needs them, and gives it back with what was in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

# What a storage holds after it woke: what it held before, zeros, or whatever the memory had.
Content = Literal["values", "zeros", "anything"]


@dataclass
class _Bed:
    """A storage that sleeps.

    Attributes:
        storage: of size 0 meanwhile; this reference keeps it, and so its identity, alive.
        size: bytes it had.
        content: what it holds after waking.
        values: its bytes in host memory, where they are kept.
    """

    storage: torch.UntypedStorage
    size: int
    content: Content
    values: torch.UntypedStorage | None


class Sleeper:
    """Puts storages to sleep and wakes them.

    What a storage holds is copied to host memory (pinned for CUDA, so that copies run at the speed of the bus) or
    given up, and the storage itself is resized to nothing. Since it remains the same storage, every tensor on it
    (flat buffers of ZeRO, parameters that are views into them, fragments, fused weights of containers) is right again
    once it is awake, without being bound anew. Only raw addresses do not survive, such as those in CUDA graphs.

    Reading a tensor on a sleeping storage ends the process: whoever puts something to sleep makes sure that nobody
    does.

    Args:
        device: whose memory is to be freed; storages elsewhere, such as ZeRO-Offload's, stay as they are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._beds: dict[int, _Bed] = {}
        # Pinning memory takes longer than filling it: buffers are kept from one sleep to the next.
        self._pinned: dict[int, torch.UntypedStorage] = {}

    @property
    def empty(self) -> bool:
        """Whether nothing sleeps."""
        return not self._beds

    def sleep(self, tensors: Iterable[Tensor], content: Content = "values") -> bool:
        """Free the memory of all storages under ``tensors``; those that sleep already stay so.

        If host memory runs out nothing has changed.

        Args:
            tensors: may be views, and share storages with each other.
            content: of the storages after they woke.

        Returns:
            Whether any storage fell asleep.
        """
        beds = [self._bed(storage, content) for storage in storages(tensors, self.device)]
        self._finish_copies()
        for bed in beds:
            bed.storage.resize_(0)
            self._beds[bed.storage._cdata] = bed
        if beds and self.device.type == "cuda":
            torch.cuda.empty_cache()  # for other processes, and for allocations of another size
        return bool(beds)

    def wake(self, tensors: Iterable[Tensor] | None = None) -> None:
        """Give the memory and the content back to the storages under ``tensors``; by default to all that sleep.

        If memory runs out, what has not woken sleeps on with its values kept: waking it again goes on from there.
        """
        if self.empty:
            return
        chosen = list(self._beds) if tensors is None else [storage_of(tensor) for tensor in tensors]
        for identity in dict.fromkeys(chosen):
            if identity in self._beds:
                _wake(self._beds[identity])
                self._keep_pinned(self._beds.pop(identity))
        self._finish_copies()

    def settle(self, tensors: Sequence[Tensor]) -> None:
        """Bind tensors that sleep to their values in host memory, for good; views of one storage stay so."""
        beds = {storage_of(tensor): self._beds.get(storage_of(tensor)) for tensor in tensors}
        for tensor in tensors:
            bed = beds[storage_of(tensor)]
            if bed is not None and bed.values is not None:
                on_host = torch.empty(0, dtype=tensor.dtype)
                tensor.data = on_host.set_(bed.values, tensor.storage_offset(), tensor.shape, tensor.stride())
        for identity in beds:
            self._beds.pop(identity, None)

    def _bed(self, storage: torch.UntypedStorage, content: Content) -> _Bed:
        values = None
        if content == "values":
            values = self._host(storage)
            values.copy_(storage, non_blocking=True)
        return _Bed(storage, storage.nbytes(), content, values)

    def _host(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """Host memory of a storage's size, the one that held it last time where there is one."""
        size = storage.nbytes()
        if self.device.type != "cuda":
            return torch.UntypedStorage(size)
        kept = self._pinned.pop(storage._cdata, None)
        if kept is not None and kept.nbytes() == size:
            return kept
        return torch.empty(size, dtype=torch.uint8, pin_memory=True).untyped_storage()

    def _keep_pinned(self, bed: _Bed) -> None:
        if bed.values is not None and self.device.type == "cuda":
            self._pinned[bed.storage._cdata] = bed.values

    def _finish_copies(self) -> None:
        """Wait until the device has read, or written, what it was told to."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _wake(bed: _Bed) -> None:
    bed.storage.resize_(bed.size)
    if bed.values is not None:
        bed.storage.copy_(bed.values, non_blocking=True)
    elif bed.content == "zeros":
        torch.empty(0, dtype=torch.uint8, device=bed.storage.device).set_(bed.storage).zero_()


def storage_of(tensor: Tensor) -> int:
    """What a tensor's storage is known by, whatever its size and address are."""
    return int(tensor.untyped_storage()._cdata)


def storages(tensors: Iterable[Tensor], device: torch.device) -> Iterator[torch.UntypedStorage]:
    """The storages under ``tensors`` that take memory of this kind of device, each once."""
    seen = set()
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen and storage.device.type == device.type and storage.nbytes():
            seen.add(storage._cdata)
            yield storage


def give_own_storage(tensors: Sequence[Tensor]) -> None:
    """Move tensors off storages that cannot be resized: mapped files, memory of other processes or of NumPy.

    Tensors that are the same view of such a storage (tied weights) stay so.
    """
    copies: dict[tuple[Any, ...], Tensor] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if not storage.nbytes() or _is_resizable(storage):
            continue
        view = (storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
        if view not in copies:
            copies[view] = tensor.detach().clone()
        tensor.data = copies[view]


def _is_resizable(storage: torch.UntypedStorage) -> bool:
    # On CUDA every storage calls itself shared.
    return storage.resizable() and not (storage.device.type == "cpu" and storage.is_shared())
