"""What ranks tell each other through the store of the process group, outside of all collectives."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed import distributed_c10d

INTERVAL = 1.0  # seconds between a rank's beats


@dataclass(frozen=True)
class Beat:
    """One rank's word on itself.

    Attributes:
        count: of its beats. That it grows is what says that the rank lives; clocks of hosts are not compared.
        doing: such as ``rollout, step 12``.
        seconds: for which it has been doing that, by its own clock.
        words: of the error that stopped it; None while nothing did.
        follows: whether that error is itself the loss of another rank.
        left: whether it has ended its run.
        host: the name of its machine.
    """

    count: int
    doing: str
    seconds: float
    words: str | None = None
    follows: bool = False
    left: bool = False
    host: str = ""


@dataclass(frozen=True)
class Heard:
    """The last beat of a rank, and when it was heard, in seconds of the reader's clock."""

    beat: Beat
    at: float


class Beats(threading.Thread):
    """Send this rank's beats and receive those of others, through a connection of its own.

    The main thread may be blocked in a collective, or in an operation on its own connection. This thread may be blocked
    too, when the process that holds the store was stopped; so nobody waits for it, and everybody reads what it left
    behind: :attr:`heard`, :attr:`answered_at` and :attr:`failure`, which is None again once the store answers.

    Args:
        rank: of this process.
        watched: ranks to listen to continuously; to the others only after :meth:`listen_to_all`.
        world_size: of the run.
        describe: called for this rank's own next beat, with its count.
        clock: seconds in which to note when something was heard.
    """

    def __init__(
        self,
        rank: int,
        watched: Iterable[int],
        world_size: int,
        describe: Callable[[int], Beat],
        clock: Callable[[], float],
    ) -> None:
        super().__init__(daemon=True, name="beats of ranks")
        self.rank = rank
        self.others = [other for other in range(world_size) if other != rank]
        self.heard: dict[int, Heard] = {}
        self.answered_at = clock()
        self.failure: Exception | None = None
        self._describe = describe
        self._clock = clock
        self._count = 0
        self._wake = threading.Event()
        self._round = threading.Condition()
        shared: Any = distributed_c10d._get_default_store()
        self._run = shared.add(f"lightning_hybrid/runs/{rank}", 1)
        self._shared = shared
        self._store = self._connection()
        self._begun: set[int] = set()
        self._listen_to(watched)

    def listen_to_all(self) -> None:
        """From now on; the silence of those not watched before begins now."""
        self._listen_to(self.others)

    def _listen_to(self, ranks: Iterable[int]) -> None:
        now = self._clock()
        self.heard |= {rank: Heard(Beat(-1, "starting", 0.0), now) for rank in ranks if rank not in self.heard}

    def run(self) -> None:
        """Beat until the last beat, which says that this rank has left; connect anew after the store has failed."""
        while not self._beat().left:
            self._wake.wait(INTERVAL)
            self._wake.clear()

    def now(self, patience: float) -> None:
        """Beat at once, and wait until that was done, at most ``patience`` seconds."""
        with self._round:
            wanted = self._count + 2  # the round that runs may have described this rank already
            deadline = time.monotonic() + patience
            while self._count < wanted and self.is_alive() and self.failure is None and time.monotonic() < deadline:
                self._wake.set()
                self._round.wait(0.05)

    def _beat(self) -> Beat:
        beat = self._describe(self._count)
        try:
            # Not to say farewell: the process that holds the store may have left just before, and will not be back.
            if self.failure is not None and not beat.left:
                _knock(self._shared)
                self._store = self._connection()
            self._exchange(beat)
            self.failure = None
        except Exception as error:  # whatever it is, nothing is heard while it lasts; it is judged by who asks for it
            self.failure = error
        with self._round:
            self._round.notify_all()
        return beat

    def _exchange(self, beat: Beat) -> None:
        self._store.set(str(self.rank), json.dumps(asdict(beat)))
        for other, told in self._receive():
            if told.count != self.heard[other].beat.count:
                self.heard[other] = Heard(told, self._clock())
        self.answered_at = self._clock()
        self._count += 1

    def _receive(self) -> list[tuple[int, Beat]]:
        # To get what was never set would wait for it.
        self._begun |= {other for other in self.heard.keys() - self._begun if self._store.check([str(other)])}
        begun = sorted(self._begun)
        told = self._store.multi_get([str(other) for other in begun]) if begun else []
        return [(other, Beat(**json.loads(text))) for other, text in zip(begun, told, strict=True)]

    def _connection(self) -> Any:
        """One more to the default group's store, in a corner of this run: a process may run several."""
        return PrefixStore(f"lightning_hybrid/beats/{self._run}", self._shared.clone())


def _knock(store: Any) -> None:
    """Raise OSError at once where nobody listens; torch would try again and again, and abort a process that ends."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if isinstance(store, TCPStore):
        socket.create_connection((store.host, store.port), timeout=INTERVAL).close()
