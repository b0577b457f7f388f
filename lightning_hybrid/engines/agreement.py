"""What ranks tell each other as Python objects; above all one rank's failure, raised on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from lightning_hybrid.errors import LightningHybridError, RewardError

T = TypeVar("T")
LONGEST = 2000


def own_rank() -> int:
    """Of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def number_of_ranks() -> int:
    """In the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def of_all_ranks(value: T) -> list[T]:
    """Each rank's ``value``, in their order; a collective of the default process group. Alone, nothing is sent.

    Args:
        value: this rank's; anything that can be pickled.
    """
    ranks = number_of_ranks()
    if ranks == 1:
        return [value]
    values: list[Any] = [None] * ranks
    dist.all_gather_object(values, value)
    return values


def on_every_rank(
    compute: Callable[[], T], what: str = "the reward", error: type[LightningHybridError] = RewardError
) -> T:
    """What ``compute`` returns; where it fails on one rank, every rank raises. A collective, as :func:`agree` is.

    Args:
        compute: what may fail on one rank alone. Where it calls collectives itself, a rank that fails alone does so
            before or after all of them.
        what: fails, for the message.
        error: raised where a rank failed.
    """
    result: T | Exception
    try:
        result = compute()
    except Exception as raised:
        result = raised
    return agree(result, what, error)


def agree(
    result_or_error: T | Exception, what: str = "the reward", error: type[LightningHybridError] = RewardError
) -> T:
    """Raises on every rank when one rank holds an error; otherwise hands back this rank's result.

    A rank that raised alone would leave the others waiting in their next collective. So a rank catches its error, as
    :func:`on_every_rank` does for it, and all ranks bring what they have here:

    Example:
        >>> try:
        ...     scores = reward(prompts, responses)
        ... except RewardError as error:
        ...     scores = error
        >>> scores = agree(scores)

    This is a collective: every rank of the default process group must call it. Without one, or alone in it, nothing is
    sent.

    Args:
        result_or_error: What this rank computed, or the exception that stopped it.
        what: Failed, for the message.
        error: Raised where a rank failed.

    Returns:
        The result, unchanged.

    Raises:
        LightningHybridError: ``error``, where a rank failed; the message names all ranks that did and what each said.
            On a failing rank, its own exception is the cause.
    """
    own = result_or_error if isinstance(result_or_error, Exception) else None
    messages = of_all_ranks(None if own is None else _message(own)[:LONGEST])
    failures = {rank: message for rank, message in enumerate(messages) if message is not None}
    if not failures:
        return result_or_error  # type: ignore[return-value]  # no failure anywhere, so this rank holds a result
    listed = "\n".join(f"  rank {rank}: {message}" for rank, message in failures.items())
    alone = len(messages) == 1
    agreed = error(failures[0] if alone else f"{what} failed on {len(failures)} of {len(messages)} ranks:\n{listed}")
    agreed.on_every_rank = True
    raise agreed from own


def _message(error: Exception) -> str:
    # Other exceptions say little without their type.
    return str(error) if isinstance(error, RewardError) else f"{type(error).__name__}: {error}"
