"""What of a strategy is watched: its methods that wait for other ranks, and how long they may."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed

from lightning_hybrid.errors import RankLostError
from lightning_hybrid.strategy.liveness import EXIT_CODE, GRACE, Liveness, is_failed_collective, write_to_stderr

if TYPE_CHECKING:
    from lightning_hybrid.strategy.processes import ProcessesStrategy

T = TypeVar("T", bound=type)

# What a rank says that it does; the other methods are part of these, or of what Lightning does between them.
SAID = (
    "setup",
    "training_step",
    "validation_step",
    "test_step",
    "predict_step",
    "optimizer_step",
    "save_checkpoint",
    "load_checkpoint",
)
UNSAID = ("setup_environment", "backward", "barrier", "broadcast", "reduce", "all_gather")
MEETING_ADVICE = "on several hosts, 'lightning-hybrid doctor' on each may say why"


def names_lost_ranks(strategy_class: T) -> T:
    """Class decorator: whichever method raises because another rank is lost raises RankLostError instead.

    It names the rank and the reason. Other errors are left as they are, and told to the other ranks.
    """
    for name in (*SAID, *UNSAID):
        method = getattr(strategy_class, name)
        setattr(strategy_class, name, _watched(method, name if name in SAID else None))
    return strategy_class


def _watched(method: Callable[..., Any], what: str | None) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: ProcessesStrategy, *args: Any, **kwargs: Any) -> Any:
        alone = _meeting(self._timeout) if method.__name__ == "setup_environment" else nullcontext()
        with alone if self.liveness is None else self.liveness.doing(what):
            return method(self, *args, **kwargs)

    return call


@contextmanager
def _meeting(timeout: timedelta | None) -> Iterator[None]:
    """While ranks meet, nobody is known by name yet; gloo may wait for ever for a host that went away meanwhile."""
    patience = 2 * seconds(timeout) + GRACE  # for the store, and for the others
    watch = threading.Timer(patience, _end_meeting, [patience])
    watch.daemon = True
    watch.start()
    try:
        yield
    except Exception as error:
        if is_failed_collective(error):
            raise RankLostError(f"ranks could not meet at {_place()}: {error}; {MEETING_ADVICE}") from error
        raise
    finally:
        watch.cancel()


def _end_meeting(patience: float) -> None:
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    write_to_stderr(f"rank {rank} did not meet the others at {_place()} within {patience:.0f} s; {MEETING_ADVICE}")
    os._exit(EXIT_CODE)


def _place() -> str:
    return ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))


def begin_liveness(strategy: ProcessesStrategy) -> Liveness | None:
    """Start to beat and to watch; None for a rank that is alone."""
    if strategy.world_size == 1:
        return None
    limit_collectives(strategy._timeout)
    liveness = Liveness(
        strategy.global_rank,
        strategy.world_size,
        seconds(strategy._timeout),
        lambda: strategy.lightning_module.trainer.global_step if strategy.lightning_module is not None else 0,
        getattr(strategy.launcher, "exits", None),
    )
    liveness.start()
    return liveness


def seconds(timeout: timedelta | None) -> float:
    """Of a timeout; without one, torch's own."""
    return (timeout or torch.distributed.default_pg_timeout).total_seconds()


def end_liveness(strategy: ProcessesStrategy) -> None:
    """Say farewell, and stop to beat and to watch."""
    liveness, strategy.liveness = strategy.liveness, None
    if liveness is None:
        return
    listeners = _phase_listeners(strategy)
    if liveness.say in listeners:
        listeners.remove(liveness.say)
    liveness.stop()


def tell_of(strategy: ProcessesStrategy, exception: BaseException) -> None:
    """Tell the other ranks what ends this one; where that is the loss of another rank, note it on the exception."""
    if strategy.liveness is None:
        return
    lost = strategy.liveness.lost_rank_behind(exception)
    strategy.liveness.last_words(lost or exception)
    if lost is not None:  # of a collective outside the methods that are watched
        exception.add_note(str(lost))


def follow_phases(strategy: ProcessesStrategy) -> None:
    """Tell the other ranks each phase that the module begins, where it names phases as PPOModule does."""
    if strategy.liveness is not None:
        _phase_listeners(strategy).append(strategy.liveness.say)


def _phase_listeners(strategy: ProcessesStrategy) -> list[Callable[[str], None]]:
    listeners: list[Callable[[str], None]] = getattr(
        getattr(strategy.lightning_module, "phases", None), "listeners", []
    )
    return listeners


def limit_collectives(timeout: timedelta | None) -> None:
    """Hold all process groups to the strategy's timeout: DeepSpeed makes groups of its own, with torch's default.

    NCCL's own watchdog ends the process at its timeout and names nobody. It gets longer, so that :class:`Liveness` has
    said by then which rank it is.
    """
    if timeout is None or torch.distributed.get_world_size() == 1:
        return
    for group in torch.distributed.distributed_c10d._world.pg_map:
        spare = GRACE + 5 if "nccl" in torch.distributed.get_backend_config(group) else 0
        torch.distributed.distributed_c10d._set_pg_timeout(timeout + timedelta(seconds=spare), group)
