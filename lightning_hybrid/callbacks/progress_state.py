"""What a checkpoint says about the progress of Lightning's loops."""

from __future__ import annotations

from typing import Any


def as_between_batches(fit_loop: dict[str, Any], batches_per_epoch: float) -> None:
    """Make a saved loop state say that the batches that are done are done, and nothing else has begun.

    Lightning counts a batch as ready before it is trained, and an epoch as done when training ends within it. Resumed
    from such a state, it would skip the last batch of an epoch, log one row too high, or begin an epoch anew.

    Args:
        fit_loop: the state of Lightning's fit loop, changed in place.
        batches_per_epoch: infinite where unknown.
    """
    batches, epochs = fit_loop["epoch_loop.batch_progress"], fit_loop["epoch_progress"]
    whole = batches["current"]["completed"] >= batches_per_epoch
    if whole:
        batches["current"]["completed"] = 0
    batches["is_last_batch"] = False
    for part in ("total", "current"):
        _settle(batches[part], ahead=0)
        # `ready` counts the epoch that is running.
        epochs[part]["completed"] = epochs[part]["ready"] - (not whole)
        _settle(epochs[part], ahead=1)


def _settle(progress: dict[str, int], ahead: int) -> None:
    """Everything that was done is done; ``ahead`` more have begun."""
    done = progress["completed"]
    progress.update(ready=done + ahead, started=done + ahead, processed=done)
