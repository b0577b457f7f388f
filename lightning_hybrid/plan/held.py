"""Who holds how many bytes, and where, at one moment of an iteration."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

DEVICE, HOST = "device", "host"
KINDS = (
    "weights",
    "gradients",
    "master weights",
    "optimizer states",
    "KV cache",
    "activations",
    "logits",
    "buffers",
)


@dataclass(frozen=True)
class Held:
    """Bytes of one kind on one rank.

    Attributes:
        owner: name of a model of the run, such as ``"actor"``.
        kind: one of :data:`KINDS`.
        bytes: how many.
        where: on the device, or in the host's memory.
    """

    owner: str
    kind: str
    bytes: int
    where: str = DEVICE


@dataclass(frozen=True)
class Moment:
    """Everything that is held at once.

    Attributes:
        name: of what happens, such as ``"actor's optimizer step"``.
        held: by all owners.
    """

    name: str
    held: tuple[Held, ...]

    def bytes(self, *, owner: str | None = None, kind: str | None = None, where: str = DEVICE) -> int:
        """How much is held: in all, or by one owner, or of one kind."""
        return sum(
            part.bytes
            for part in self.held
            if part.where == where and owner in (None, part.owner) and kind in (None, part.kind)
        )


def moment(name: str, *parts: Iterable[Held]) -> Moment:
    """A moment at which all of ``parts`` are held."""
    return Moment(name, tuple(held for part in parts for held in part if held.bytes))


def gib(size: float) -> str:
    """Bytes as GiB, with more digits the fewer there are."""
    value = size / 2**30
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3f}"
