"""Whether all ranks of a run begin at the same place: each looks for a checkpoint by itself."""

from __future__ import annotations

from lightning_hybrid.engines.agreement import of_all_ranks
from lightning_hybrid.errors import CheckpointError


class Beginning:
    """One agreement of all ranks on whether they begin from a checkpoint.

    Lightning tells its strategy only of a checkpoint that there is: a rank that found none would go on, and meet the
    others in another collective, for as long as the timeout. So a rank that loads one says so before it reads it, and a
    rank that does not load one says so at the first place where that is certain.
    """

    KNOWN_AT = "_CheckpointConnector.resume_end"
    """the barrier at which Lightning has read the checkpoint of a fit, where there is one"""

    def __init__(self) -> None:
        self._agreed = False

    def agree_on(self, checkpoint: str | None) -> None:
        """Say where this rank begins; only the first time in a run counts. All ranks call it.

        Args:
            checkpoint: None for no checkpoint.

        Raises:
            CheckpointError: on every rank, where some begin from a checkpoint and others do not.
        """
        if self._agreed:
            return
        self._agreed = True
        found = of_all_ranks(checkpoint)
        if None in found and any(found):
            raise _disagreement(found)


def _disagreement(found: list[str | None]) -> CheckpointError:
    listed = "\n".join(f"  rank {rank}: {'none' if path is None else repr(path)}" for rank, path in enumerate(found))
    error = CheckpointError(
        f"some ranks go on from a checkpoint, and others found none:\n{listed}\n"
        "keep checkpoints in a folder that all machines share, and give the same ckpt_path to every rank"
    )
    error.on_every_rank = True
    return error
