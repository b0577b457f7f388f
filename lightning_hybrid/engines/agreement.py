"""One rank's failure, raised on every rank."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

from lightning_hybrid.errors import LightningHybridError, RewardError

T = TypeVar("T")
LONGEST = 2000


def agree(
    result_or_error: T | Exception, what: str = "the reward", error: type[LightningHybridError] = RewardError
) -> T:
    """Raises on every rank when one rank holds an error; otherwise hands back this rank's result.

    A rank that raised alone would leave the others waiting in their next collective. So a rank catches its error, and
    all ranks bring what they have here:

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
    failures = {rank: message for rank, message in enumerate(_gather(own)) if message is not None}
    if not failures:
        return result_or_error  # type: ignore[return-value]  # no failure anywhere, so this rank holds a result
    listed = "\n".join(f"  rank {rank}: {message}" for rank, message in failures.items())
    alone = not _several_ranks()
    agreed = error(
        failures[0] if alone else f"{what} failed on {len(failures)} of {dist.get_world_size()} ranks:\n{listed}"
    )
    agreed.on_every_rank = True
    raise agreed from own


def _gather(error: Exception | None) -> list[str | None]:
    """The message of each rank's error, in the order of the ranks; None for a rank that is fine."""
    message = None if error is None else _message(error)[:LONGEST]
    if not _several_ranks():
        return [message]
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    return messages


def _message(error: Exception) -> str:
    # Other exceptions say little without their type.
    return str(error) if isinstance(error, RewardError) else f"{type(error).__name__}: {error}"


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
